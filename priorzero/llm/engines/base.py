"""What all engines share: the tokens of a request, the prior from the model's output, and a cache of priors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
from loguru import logger

from priorzero.llm.chat_template import control_tokens
from priorzero.llm.models import LanguageModel
from priorzero.llm.packing import PromptRow, escape_special_tokens
from priorzero.llm.priors import parse_ranking, prior_from_ranking, prior_from_scores, uniform_prior
from priorzero.llm.prompts import PromptStyle, Thought, completion_text, read_thought, training_context
from priorzero.llm.tokenizing import prompt_token_ids
from priorzero.types import ActionPrior, PriorRequest

MAX_CACHED_PRIORS = 4096


@dataclass(frozen=True)
class PriorBuilder:
    """Tokenizes requests for ``llm``, the training copy, and builds priors from its output.

    ``generate_max_len`` limits the tokens of a generated text. Generation is greedy, so equal requests have equal
    priors under the same parameters.
    """

    llm: LanguageModel
    style: PromptStyle
    _: KW_ONLY
    temperature: float = 1.0
    generate_max_len: int = 128

    def row(self, request: PriorRequest, thought: Thought | None = None) -> PromptRow:
        """``score``: token ids of the prompt and of each valid action, with the end of the turn or a newline.

        With chain of thought, the ``thought`` follows the prompt, as in training.

        Raises PromptTooLongError if the row does not fit into the model.
        """
        if not request.valid_actions:
            raise ValueError("a prior needs at least one valid action")
        completion = None if thought is None else thought.text
        context = training_context(request.prompt, completion, style=self.style)
        assert context is not None, "chain of thought without a thought"
        completions = [completion_text(action, style=self.style) for action in request.valid_actions]
        return self.llm.row(context, completions, end_of_turn=self.style.ends_turn)

    def prompt_ids(self, request: PriorRequest) -> list[int]:
        """``rank`` and chain of thought: token ids of the prompt, behind which text is generated.

        Raises PromptTooLongError if the prompt and ``generate_max_len`` tokens do not fit into the model.
        """
        ids = prompt_token_ids(self.llm.tokenizer, request.prompt)
        self.llm.check_length(len(ids) + self.generate_max_len)
        return ids

    def lossy_actions(self, request: PriorRequest) -> list[str]:
        """Valid actions that tokenizing and decoding changes, for example because of unknown letters.

        ``score`` gives such an action the probability of the changed text. ``rank`` cannot recognise it in a list.
        """
        tokenizer = self.llm.tokenizer
        escaped = [escape_special_tokens(action, control_tokens(tokenizer)) for action in request.valid_actions]
        ids = tokenizer(escaped, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        return [action for action, a, b in zip(request.valid_actions, escaped, decoded, strict=True) if a != b]

    def thought(self, text: str) -> Thought:
        """``score`` with chain of thought: the thought in the generated text."""
        return read_thought(text, tokenizer=self.llm.tokenizer)

    def from_logprobs(
        self, logprobs: Sequence[np.ndarray], *, version: int, thought: Thought | None = None
    ) -> ActionPrior:
        """``score``: the prior from the token log-probabilities of each action (K arrays ``[T_k]``).

        ``thought`` is that of the row.
        """
        sums = np.array([tokens.sum() for tokens in logprobs], dtype=np.float32)
        scores = sums / [len(tokens) for tokens in logprobs]
        return ActionPrior(
            logprobs=prior_from_scores(scores, temperature=self.temperature),
            source="score",
            version=version,
            completion=None if thought is None else thought.text,
            parsed=thought is None or thought.has_heading,
            rollout_logprobs=sums,
        )

    def from_text(self, text: str, request: PriorRequest, *, version: int) -> ActionPrior:
        """``rank``: the prior from the generated text."""
        ranking = parse_ranking(text, request.valid_actions)
        logprobs = prior_from_ranking(ranking, len(request.valid_actions), temperature=self.temperature)
        return ActionPrior(logprobs=logprobs, source="rank", version=version, completion=text, parsed=bool(ranking))


class PriorCache:
    """LRU cache of the priors under the current parameters. It also counts requests that the model cannot represent."""

    def __init__(self, builder: PriorBuilder) -> None:
        self._builder = builder
        self._priors: OrderedDict[PriorRequest, ActionPrior] = OrderedDict()
        self._num_requests = self._num_hits = self._num_too_long = self._num_lossy = 0
        self._warned_too_long = self._warned_lossy = False

    def look_up(self, requests: Sequence[PriorRequest]) -> tuple[dict[PriorRequest, ActionPrior], list[PriorRequest]]:
        """The cached priors, and the requests that must be computed, without duplicates."""
        cached, missing = {}, []
        for request in dict.fromkeys(requests):
            if request in self._priors:
                self._priors.move_to_end(request)
                cached[request] = self._priors[request]
            else:
                missing.append(request)
        self._num_requests += len(requests)
        self._num_hits += len(requests) - len(missing)
        for request in missing:
            self._count_lossy(request)
        return cached, missing

    def _count_lossy(self, request: PriorRequest) -> None:
        lossy = self._builder.lossy_actions(request)
        self._num_lossy += len(lossy)
        if lossy and not self._warned_lossy:
            self._warned_lossy = True
            logger.warning(
                f"the LLM's tokenizer cannot represent the action {lossy[0]!r} exactly, so the LLM may confuse it with "
                "another action; prior/lossy_actions counts such actions"
            )

    def put(self, request: PriorRequest, prior: ActionPrior) -> None:
        """Add a prior. If the cache is full, the least recently used one is dropped."""
        self._priors[request] = prior
        if len(self._priors) > MAX_CACHED_PRIORS:
            self._priors.popitem(last=False)

    def too_long(self, request: PriorRequest, reason: Exception, *, version: int) -> ActionPrior:
        """The uniform prior of a prompt that does not fit into the model. It is counted, and logged the first time."""
        self._num_too_long += 1
        if not self._warned_too_long:
            self._warned_too_long = True
            logger.warning(
                f"a prompt is too long ({reason}), so its prior is uniform; prior/too_long counts such prompts. Lower "
                "llm.history_length or llm.observation_chars or, with vLLM, raise vllm.max_model_len"
            )
        return uniform_prior(len(request.valid_actions), version=version)

    def clear(self) -> None:
        self._priors.clear()

    def take_statistics(self) -> dict[str, float]:
        """Metrics since the last call."""
        statistics = {
            "prior/remembered": self._num_hits / max(1, self._num_requests),
            "prior/too_long": float(self._num_too_long),
            "prior/lossy_actions": float(self._num_lossy),
        }
        self._num_requests = self._num_hits = self._num_too_long = self._num_lossy = 0
        return statistics
