"""The prior engine that runs in this process on transformers, with the very parameters that are being trained."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from priorzero.llm.engines.base import PriorBuilder, PriorCache
from priorzero.llm.engines.prompt_cache import PromptCache
from priorzero.llm.packing import PromptRow
from priorzero.types import ActionPrior, PriorRequest, PromptTooLongError


class _Cancelled(Exception):
    """The caller has stopped waiting."""


class TransformersEngine:
    """Implements :class:`~priorzero.types.PriorEngine` with a transformers model in this process.

    The model is shared with the learner: ``sync_weights`` has nothing to copy, and what was kept from earlier
    parameters is thrown away. ``priors`` runs in a thread, one call at a time; a cancelled call stops at its next
    forward pass and does not return before its thread has let go of the model.

    Args:
        builder: puts the questions.
        rows_per_forward: questions computed at once.
        cache_size: answers kept for questions that come again under the same parameters.
        prompt_cache_tokens: tokens of earlier prompts whose keys and values are kept, so that ``score`` computes only
            what is new in a prompt. Takes one row per forward pass; 0 keeps none.

    Raises:
        ValueError: prompts are to be kept and several rows computed at once.
    """

    exclusive = True

    def __init__(
        self, builder: PriorBuilder, *, rows_per_forward: int = 4, cache_size: int = 4096, prompt_cache_tokens: int = 0
    ) -> None:
        if prompt_cache_tokens and rows_per_forward != 1:
            raise ValueError(f"prompt_cache_tokens={prompt_cache_tokens} takes rows_per_forward=1")
        self.version = 0
        self.builder = builder
        self.rows_per_forward = rows_per_forward
        self.cache = PriorCache(builder, size=cache_size)
        self.keeps_prompts = prompt_cache_tokens > 0
        self.prompts = PromptCache(prompt_cache_tokens)
        self._one_at_a_time = asyncio.Lock()
        self._tokens = 0
        self._seconds = 0.0

    async def ready(self) -> None: ...

    async def check(self) -> None: ...

    async def suspend(self) -> None: ...

    async def sync_weights(self, version: int) -> None:
        await self.clear_cache()
        self.version = version

    async def clear_cache(self) -> None:
        self.cache.clear()
        self.prompts.clear()

    async def close(self) -> None:
        await self.clear_cache()

    def take_statistics(self) -> dict[str, float]:
        """As the protocol says; ``prior/tokens_per_s`` counts the tokens of prompts and commands that were computed."""
        taken = {
            **self.cache.take_statistics(),
            "prior/tokens_per_s": self._tokens / (self._seconds or 1.0),
            "prior/prefix_cache_hit_rate": self.prompts.take_hit_rate(),
        }
        self._tokens, self._seconds = 0, 0.0
        return taken

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        """As the protocol says.

        Raises:
            ValueError: a request has no valid actions.
        """
        async with self._one_at_a_time:
            answers, new = self.cache.look_up(requests)
            if new:
                stop = threading.Event()
                work = asyncio.ensure_future(asyncio.to_thread(self._compute, new, stop))
                try:
                    answers.update(await asyncio.shield(work))
                except asyncio.CancelledError:
                    stop.set()
                    await asyncio.wait([work])
                    work.exception()  # taken note of: it is _Cancelled, or came too late to matter
                    raise
            return [answers[request] for request in requests]

    def _compute(self, requests: list[PriorRequest], stop: threading.Event) -> dict[PriorRequest, ActionPrior]:
        started = time.perf_counter()
        answers = {}
        fitting: list[tuple[PriorRequest, Any]] = []
        prepare = self.builder.row if self.builder.style.mode == "score" else self.builder.prompt_ids
        for request in requests:
            try:
                fitting.append((request, prepare(request)))
            except PromptTooLongError as error:
                answers[request] = self.cache.uniform(request, error, version=self.version)
        compute = self._score if self.builder.style.mode == "score" else self._rank
        for start in range(0, len(fitting), self.rows_per_forward):
            if stop.is_set():
                raise _Cancelled
            chunk, inputs = zip(*fitting[start : start + self.rows_per_forward], strict=True)
            for request, prior in zip(chunk, compute(chunk, inputs, stop), strict=True):
                # Kept at once: a try that runs out of time leaves less to do for the next one.
                self.cache.put(request, prior)
                answers[request] = prior
        self._seconds += time.perf_counter() - started
        return answers

    @torch.inference_mode()
    def _score(
        self, requests: Sequence[PriorRequest], rows: Sequence[PromptRow], stop: threading.Event
    ) -> list[ActionPrior]:
        if self.keeps_prompts:
            past = self.prompts.begin(rows[0].prompt_ids)
            known = past.get_seq_length()
            token_logprobs, completion_mask = self.builder.llm.token_logprobs(rows, past=past)  # (R, T)
            self._tokens += past.get_seq_length() - known
            self.prompts.keep(rows[0].prompt_ids, past)
        else:
            token_logprobs, completion_mask = self.builder.llm.token_logprobs(rows)  # (R, T)
            self._tokens += sum(len(row.prompt_ids) for row in rows) + int(completion_mask.sum())
        all_logprobs = token_logprobs.cpu().numpy()
        lengths = completion_mask.sum(dim=1).tolist()
        priors, start = [], 0
        for request in requests:
            end = start + len(request.valid_actions)
            logprobs = [all_logprobs[r, : lengths[r]] for r in range(start, end)]
            priors.append(self.builder.from_logprobs(logprobs, version=self.version))
            start = end
        return priors

    @torch.inference_mode()
    def _rank(
        self, requests: Sequence[PriorRequest], prompts: Sequence[list[int]], stop: threading.Event
    ) -> list[ActionPrior]:
        from transformers import StoppingCriteria

        class StopWhenCancelled(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
                return torch.full((input_ids.shape[0],), stop.is_set(), dtype=torch.bool, device=input_ids.device)

        llm = self.builder.llm
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        pad_id = llm.tokenizer.pad_token_id if llm.tokenizer.pad_token_id is not None else llm.tokenizer.eos_token_id
        input_ids = [[pad_id] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
        attention_mask = [[0] * n + [1] * (width - n) for n in padding]
        with llm.autocast():
            output = llm.model.generate(
                input_ids=torch.tensor(input_ids, device=llm.device),
                attention_mask=torch.tensor(attention_mask, device=llm.device),
                max_new_tokens=self.builder.generate_max_len,
                do_sample=False,
                repetition_penalty=1.0,  # some models come with another; the prior is what the model itself says
                pad_token_id=pad_id,
                stopping_criteria=[StopWhenCancelled()],
            )
        if stop.is_set():
            raise _Cancelled
        texts = llm.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        self._tokens += sum(map(len, prompts)) + output[:, width:].numel()
        return [
            self.builder.from_text(text, request, version=self.version)
            for request, text in zip(requests, texts, strict=True)
        ]
