"""The prior engine that runs in this process on transformers, with the very parameters that are being trained."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from priorzero.models import LanguageModel
from priorzero.priors import parse_ranking, prior_from_ranking, prior_from_scores
from priorzero.prompts import PromptStyle, answer_text
from priorzero.types import ActionPrior, PriorRequest


class _Cancelled(Exception):
    """The caller has stopped waiting."""


class TransformersEngine:
    """Implements :class:`~priorzero.types.PriorEngine` with a transformers model in this process.

    The model is shared with the learner: ``sync_weights`` has nothing to copy, and answers that were kept from earlier
    parameters are thrown away. ``priors`` runs in a thread; a cancelled call stops at its next forward pass and does
    not return before its thread has let go of the model.

    Args:
        llm: the language model.
        style: tells ``score`` from ``rank``.
        normalise: ``"mean"`` or ``"sum"`` of an action's token log-probabilities (``score``).
        temperature: of the prior over the valid actions.
        generate_max_len: tokens the model may write (``rank``). Generation is greedy, so the same question under the
            same parameters has one answer.
        rows_per_forward: questions computed at once.
        cache_size: answers kept for questions that come again under the same parameters.
    """

    def __init__(
        self,
        llm: LanguageModel,
        *,
        style: PromptStyle,
        normalise: str = "mean",
        temperature: float = 1.0,
        generate_max_len: int = 128,
        rows_per_forward: int = 4,
        cache_size: int = 4096,
    ) -> None:
        self.version = 0
        self.llm = llm
        self.style = style
        self.normalise = normalise
        self.temperature = temperature
        self.generate_max_len = generate_max_len
        self.rows_per_forward = rows_per_forward
        self.cache_size = cache_size
        self.cache_hits = 0
        self._cache: OrderedDict[PriorRequest, ActionPrior] = OrderedDict()

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        """One prior per request, in order.

        Raises:
            ValueError: a request has no valid actions, or its prompt does not fit into the model.
        """
        stop = threading.Event()
        work = asyncio.ensure_future(asyncio.to_thread(self._priors, list(requests), stop))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait([work])
            work.exception()  # taken note of: it is _Cancelled, or came too late to matter
            raise

    async def sync_weights(self, version: int) -> None:
        self._cache.clear()
        self.version = version

    async def close(self) -> None:
        self._cache.clear()

    def _priors(self, requests: list[PriorRequest], stop: threading.Event) -> list[ActionPrior]:
        new = [request for request in dict.fromkeys(requests) if request not in self._cache]
        self.cache_hits += len(requests) - len(new)
        answer = self._score if self.style.mode == "score" else self._rank
        for start in range(0, len(new), self.rows_per_forward):
            if stop.is_set():
                raise _Cancelled
            chunk = new[start : start + self.rows_per_forward]
            # Kept at once: a try that runs out of time leaves less to do for the next one.
            self._cache.update(zip(chunk, answer(chunk, stop), strict=True))
        for request in requests:
            self._cache.move_to_end(request)
        answers = [self._cache[request] for request in requests]
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return answers

    @torch.inference_mode()
    def _score(self, requests: list[PriorRequest], stop: threading.Event) -> list[ActionPrior]:
        rows = []
        for request in requests:
            if not request.valid_actions:
                raise ValueError("a prior needs at least one valid action")
            answers = [answer_text(action, style=self.style) for action in request.valid_actions]
            rows.append(self.llm.row(request.prompt, answers, end_of_turn=True))
        token_logprobs, completion_mask = self.llm.token_logprobs(rows)  # (R, T)
        scores = token_logprobs.sum(dim=1)
        if self.normalise == "mean":
            scores = scores / completion_mask.sum(dim=1)
        priors, start = [], 0
        for request in requests:
            end = start + len(request.valid_actions)
            logprobs = prior_from_scores(scores[start:end].cpu().numpy(), temperature=self.temperature)
            priors.append(ActionPrior(logprobs=logprobs, source="score", version=self.version))
            start = end
        return priors

    @torch.inference_mode()
    def _rank(self, requests: list[PriorRequest], stop: threading.Event) -> list[ActionPrior]:
        from transformers import StoppingCriteria

        class StopWhenCancelled(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
                return torch.full((input_ids.shape[0],), stop.is_set(), dtype=torch.bool, device=input_ids.device)

        tokenizer = self.llm.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        prompts = [request.prompt for request in requests]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        self.llm.check_length(inputs["input_ids"].shape[1] + self.generate_max_len)
        with self.llm.autocast():
            output = self.llm.model.generate(
                **inputs.to(self.llm.device),
                max_new_tokens=self.generate_max_len,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=[StopWhenCancelled()],
            )
        if stop.is_set():
            raise _Cancelled
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        priors = []
        for request, text in zip(requests, texts, strict=True):
            ranking = parse_ranking(text, request.valid_actions)
            logprobs = prior_from_ranking(ranking, len(request.valid_actions), temperature=self.temperature)
            priors.append(
                ActionPrior(
                    logprobs=logprobs, source="rank", version=self.version, completion=text, parsed=bool(ranking)
                )
            )
        return priors


def agreement(prior: ActionPrior, visit_counts: np.ndarray) -> bool:
    """Whether the prior's first choice is the search's."""
    return int(prior.logprobs.argmax()) == int(visit_counts.argmax())
