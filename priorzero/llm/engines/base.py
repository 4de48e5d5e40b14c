"""What every engine does alike: the tokens of a question, the prior from what was computed, and remembering it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from loguru import logger

from priorzero.llm.models import LanguageModel
from priorzero.llm.packing import PromptRow, without_special_tokens
from priorzero.llm.priors import parse_ranking, prior_from_ranking, prior_from_scores, uniform_prior
from priorzero.llm.prompts import PromptStyle, completion_text
from priorzero.types import ActionPrior, PriorRequest


@dataclass(frozen=True)
class PriorBuilder:
    """How a question is put to the LLM and its answer read.

    Attributes:
        llm: the training copy; gives the tokenizer.
        style: tells ``score`` from ``rank``.
        temperature: of the prior over the valid actions.
        generate_max_len: tokens the LLM may write (``rank``). Generation is greedy, so the same question under the same
            parameters has one answer.
    """

    llm: LanguageModel
    style: PromptStyle
    temperature: float = 1.0
    generate_max_len: int = 128

    def row(self, request: PriorRequest) -> PromptRow:
        """``score``: token ids of the prompt and of each valid action with the token that ends it.

        Raises:
            PromptTooLongError: they do not fit into the model.
        """
        if not request.valid_actions:
            raise ValueError("a prior needs at least one valid action")
        answers = [completion_text(action, style=self.style) for action in request.valid_actions]
        return self.llm.row(request.prompt, answers, end_of_turn=self.style.ends_turn)

    def prompt_ids(self, request: PriorRequest) -> list[int]:
        """``rank``: token ids of the prompt.

        Raises:
            PromptTooLongError: they do not fit into the model together with what it may write.
        """
        ids = self.llm.tokenizer(request.prompt, add_special_tokens=False)["input_ids"]
        self.llm.check_length(len(ids) + self.generate_max_len)
        return ids

    def lossy_actions(self, request: PriorRequest) -> list[str]:
        """Valid actions that the tokenizer does not give back as they are, such as letters that it does not know.

        ``score`` takes the probability of what it makes of them, ``rank`` cannot read them from what the LLM writes.
        """
        tokenizer = self.llm.tokenizer
        plain = [without_special_tokens(action, tokenizer.all_special_tokens) for action in request.valid_actions]
        ids = tokenizer(plain, add_special_tokens=False)["input_ids"]
        again = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        return [action for action, a, b in zip(request.valid_actions, plain, again, strict=True) if a != b]

    def from_logprobs(self, logprobs: Sequence[np.ndarray], *, version: int) -> ActionPrior:
        """``score``: the prior from the token log-probabilities of each action."""
        sums = np.array([tokens.sum() for tokens in logprobs], dtype=np.float32)
        scores = sums / [len(tokens) for tokens in logprobs]
        return ActionPrior(
            logprobs=prior_from_scores(scores, temperature=self.temperature),
            source="score",
            version=version,
            rollout_logprobs=sums,
        )

    def from_text(self, text: str, request: PriorRequest, *, version: int) -> ActionPrior:
        """``rank``: the prior from what the LLM wrote."""
        ranking = parse_ranking(text, request.valid_actions)
        logprobs = prior_from_ranking(ranking, len(request.valid_actions), temperature=self.temperature)
        return ActionPrior(logprobs=logprobs, source="rank", version=version, completion=text, parsed=bool(ranking))


class PriorCache:
    """The latest answers under the current parameters, so that the same question is not computed twice.

    Args:
        builder: puts the questions.
        size: answers kept.
    """

    def __init__(self, builder: PriorBuilder, *, size: int) -> None:
        self._maker = builder
        self._size = size
        self._answers: OrderedDict[PriorRequest, ActionPrior] = OrderedDict()
        self.asked = 0
        self.known = 0
        self.too_long = 0
        self.lossy = 0
        self._told_of_length = False
        self._told_of_loss = False

    def look_up(self, requests: Iterable[PriorRequest]) -> tuple[dict[PriorRequest, ActionPrior], list[PriorRequest]]:
        """The answers that are known, and the questions that are new, each once."""
        requests = list(requests)
        known = {}
        for request in dict.fromkeys(requests):
            if request in self._answers:
                self._answers.move_to_end(request)
                known[request] = self._answers[request]
        new = [request for request in dict.fromkeys(requests) if request not in known]
        self.asked += len(requests)
        self.known += len(requests) - len(new)
        for request in new:
            self._count_lossy(request)
        return known, new

    def _count_lossy(self, request: PriorRequest) -> None:
        lossy = self._maker.lossy_actions(request)
        self.lossy += len(lossy)
        if lossy and not self._told_of_loss:
            self._told_of_loss = True
            logger.warning(
                f"the LLM's tokenizer does not give {lossy[0]!r} back as it is, so the LLM may take it for another "
                "action; prior/lossy_actions counts such actions"
            )

    def put(self, request: PriorRequest, prior: ActionPrior) -> None:
        self._answers[request] = prior
        while len(self._answers) > self._size:
            self._answers.popitem(last=False)

    def uniform(self, request: PriorRequest, reason: Exception, *, version: int) -> ActionPrior:
        """The answer to a prompt that does not fit into the model; counted, and logged the first time."""
        self.too_long += 1
        if not self._told_of_length:
            self._told_of_length = True
            logger.warning(
                f"a prompt is too long for the model ({reason}); its search goes on with a uniform prior. "
                "prior/too_long counts them; a smaller llm.history_length or llm.observation_chars or, with "
                "vLLM, a larger vllm.max_model_len helps"
            )
        return uniform_prior(len(request.valid_actions), version=version)

    def clear(self) -> None:
        """Forget all answers: the parameters have changed."""
        self._answers.clear()

    def take_statistics(self) -> dict[str, float]:
        """Metrics since the last call."""
        taken = {
            "prior/remembered": self.known / max(1, self.asked),
            "prior/too_long": float(self.too_long),
            "prior/lossy_actions": float(self.lossy),
        }
        self.asked = self.known = self.too_long = self.lossy = 0
        return taken
