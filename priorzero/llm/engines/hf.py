"""Prior engine on transformers, in this process, with the parameters that are being trained."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from loguru import logger

from priorzero.llm.engines.base import PriorBuilder, PriorCache
from priorzero.llm.engines.prompt_cache import PromptCache
from priorzero.llm.packing import PromptRow, split_completions
from priorzero.llm.prompts import Thought
from priorzero.llm.scoring_graphs import GraphScorer
from priorzero.runtime.concurrency import run_in_thread
from priorzero.types import ActionPrior, EngineError, PriorRequest, PromptTooLongError

# Limits of one forward pass. They bound its memory: about 3 GB for the logits (ten bytes each), and 1 to 5 GB for the
# rest. A GPU has enough to compute with much fewer tokens, so a larger pass would not be faster.
TOKENS_PER_FORWARD = 2**15
LOGITS_PER_FORWARD = 2**28

Output = TypeVar("Output")


class _Cancelled(Exception):
    """The caller no longer waits for the result."""


class TransformersEngine:
    """Implements :class:`~priorzero.types.PriorEngine` with a transformers model in this process.

    The learner uses the same model, so ``sync_weights`` copies nothing; it only clears the caches. ``priors`` runs in a
    thread, one call at a time. A cancelled call stops before its next forward pass, and returns only when its thread no
    longer uses the model.

    If a GPU's memory does not suffice for several requests at once, ``tokens_per_forward`` is halved. This does not
    change the priors, except for rounding. If it does not suffice for one request, EngineError is raised.

    Args:
        builder: its ``llm`` computes the priors.
        rows_per_forward: largest number of requests in one forward pass; None: any number.
        tokens_per_forward: largest number of tokens of all requests in one forward pass. A single request may have
            more. The number of logits is limited as well, to :data:`LOGITS_PER_FORWARD`.
        prompt_cache_tokens: ``score``: tokens of earlier prompts whose keys and values are cached; 0 for none. It
            requires ``rows_per_forward=1``.
    """

    exclusive = True

    def __init__(
        self,
        builder: PriorBuilder,
        *,
        rows_per_forward: int | None = None,
        tokens_per_forward: int = TOKENS_PER_FORWARD,
        prompt_cache_tokens: int = 0,
    ) -> None:
        if prompt_cache_tokens and rows_per_forward != 1:
            raise ValueError(f"prompt_cache_tokens={prompt_cache_tokens} requires rows_per_forward=1")
        self.version = 0
        self.builder = builder
        self.rows_per_forward = rows_per_forward
        self.tokens_per_forward = tokens_per_forward
        self.cache = PriorCache(builder)
        self.prompt_cache = PromptCache(prompt_cache_tokens)
        self._uses_prompt_cache = prompt_cache_tokens > 0
        is_cuda = builder.llm.device.type == "cuda"
        self._token_logprobs = GraphScorer(builder.llm).token_logprobs if is_cuda else builder.llm.token_logprobs
        self._lock = asyncio.Lock()
        self._computed_tokens = 0
        self._computing_s = 0.0

    async def ready(self) -> None: ...

    async def check(self) -> None: ...

    async def suspend(self) -> None: ...

    async def sync_weights(self, version: int) -> None:
        await self.clear_cache()
        self.version = version

    async def clear_cache(self) -> None:
        self.cache.clear()
        self.prompt_cache.clear()

    async def close(self) -> None:
        await self.clear_cache()

    def take_statistics(self) -> dict[str, float]:
        """As in the protocol. ``prior/tokens_per_s`` counts the tokens of prompts and commands that were computed."""
        statistics = {
            **self.cache.take_statistics(),
            "prior/tokens_per_s": self._computed_tokens / (self._computing_s or 1.0),
            "prior/prefix_cache_hit_rate": self.prompt_cache.take_hit_rate(),
        }
        self._computed_tokens, self._computing_s = 0, 0.0
        return statistics

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        async with self._lock:
            priors, missing = self.cache.look_up(requests)
            if missing:
                stop = threading.Event()
                priors.update(await run_in_thread(lambda: self._compute(missing, stop), on_cancel=stop.set))
            return [priors[request] for request in requests]

    def _compute(self, requests: list[PriorRequest], stop: threading.Event) -> dict[PriorRequest, ActionPrior]:
        started = time.perf_counter()
        style = self.builder.style
        # Priors are cached after each forward pass, so that after a timeout the next attempt computes only the rest.
        priors: dict[PriorRequest, ActionPrior] = {}
        prompts = self._tokenize(requests, self.builder.prompt_ids, priors) if style.generates else {}
        for texts in self._in_batches(prompts, self._generate, stop):
            if style.mode == "rank":
                self._rank(texts, priors)
            else:
                self._score({request: self.builder.thought(text) for request, text in texts.items()}, priors, stop)
        if not style.generates:
            self._score(dict.fromkeys(requests), priors, stop)
        self._computing_s += time.perf_counter() - started
        return priors

    def _rank(self, texts: Mapping[PriorRequest, str], priors: dict[PriorRequest, ActionPrior]) -> None:
        """Add the priors of requests to ``priors``; ``texts`` contain the rankings."""
        for request, text in texts.items():
            priors[request] = self.builder.from_text(text, request, version=self.version)
            self.cache.put(request, priors[request])

    def _score(
        self,
        thoughts: Mapping[PriorRequest, Thought | None],
        priors: dict[PriorRequest, ActionPrior],
        stop: threading.Event,
    ) -> None:
        """Add the priors of requests to ``priors``; the valid actions are scored behind the prompt and the thought."""
        rows = self._tokenize(thoughts, lambda request: self.builder.row(request, thoughts[request]), priors)
        for batch in self._in_batches(rows, self._completion_logprobs, stop):
            for request, logprobs in batch.items():
                priors[request] = self.builder.from_logprobs(logprobs, version=self.version, thought=thoughts[request])
                self.cache.put(request, priors[request])

    def _tokenize(
        self,
        requests: Iterable[PriorRequest],
        tokenize: Callable[[PriorRequest], Any],
        priors: dict[PriorRequest, ActionPrior],
    ) -> dict[PriorRequest, Any]:
        """The tokenized inputs of the requests; the priors of those that are too long are added to ``priors``."""
        inputs = {}
        for request in requests:
            try:
                inputs[request] = tokenize(request)
            except PromptTooLongError as error:
                priors[request] = self.cache.too_long(request, error, version=self.version)
        return inputs

    def _in_batches(
        self,
        inputs: Mapping[PriorRequest, Any],
        compute: Callable[[Sequence[Any], threading.Event], list[Output]],
        stop: threading.Event,
    ) -> Iterator[dict[PriorRequest, Output]]:
        """Compute inputs, rows or prompts, in batches that fit into the memory; yields the outputs of each batch."""
        remaining = list(inputs.items())
        while remaining:
            if stop.is_set():
                raise _Cancelled
            batch = dict(remaining[: self._num_in_forward([one for _, one in remaining])])
            outputs = self._forward(list(batch.values()), compute, stop)
            if outputs is not None:  # otherwise it is repeated with a smaller batch
                yield dict(zip(batch, outputs, strict=True))
                del remaining[: len(batch)]

    def _num_in_forward(self, inputs: Sequence[Any]) -> int:
        """How many of the first inputs, rows or prompts, one forward pass takes; at least one."""
        vocab_size = self.builder.llm.model.config.get_text_config(decoder=True).vocab_size
        tokens = logits = 0
        for n, one in enumerate(inputs[: self.rows_per_forward]):
            num_tokens, num_predicted = self._size(one)
            tokens, logits = tokens + num_tokens, logits + num_predicted * vocab_size
            if n and (tokens > self.tokens_per_forward or logits > LOGITS_PER_FORWARD):
                return n
        return len(inputs[: self.rows_per_forward])

    def _size(self, one: Any) -> tuple[int, int]:
        """Numbers of tokens of one row or prompt that are computed and that are predicted at the same time."""
        if isinstance(one, PromptRow):
            num_predicted = sum(map(len, one.completions))
            return len(one.prompt_ids) + num_predicted, num_predicted
        return len(one) + self.builder.generate_max_len, 1

    def _forward(
        self,
        inputs: Sequence[Any],
        compute: Callable[[Sequence[Any], threading.Event], list[Output]],
        stop: threading.Event,
    ) -> list[Output] | None:
        """The outputs of a batch of inputs; None if the memory does not suffice for so many at once."""
        try:
            return compute(inputs, stop)
        except torch.OutOfMemoryError as error:
            num_tokens = sum(self._size(one)[0] for one in inputs)
            if len(inputs) == 1:
                raise EngineError(
                    f"out of GPU memory while computing one prior, with {num_tokens} tokens; type --set "
                    "llm.prompt_max_len=512, then --set llm.use_lora=true"
                ) from error
        self.tokens_per_forward = num_tokens // 2
        torch.cuda.empty_cache()
        logger.warning(
            f"out of GPU memory while computing {len(inputs)} priors; a forward pass now has at most "
            f"{self.tokens_per_forward} tokens"
        )
        return None

    @torch.inference_mode()
    def _completion_logprobs(self, rows: Sequence[PromptRow], stop: threading.Event) -> list[list[np.ndarray]]:
        """Token log-probabilities of each completion of each row."""
        if self._uses_prompt_cache:
            past = self.prompt_cache.lookup(rows[0].prompt_ids)
            num_cached = past.get_seq_length()
            token_logprobs, completion_mask = self.builder.llm.token_logprobs(rows, past=past)  # (R, T)
            self._computed_tokens += past.get_seq_length() - num_cached
            self.prompt_cache.store(rows[0].prompt_ids, past)
        else:
            token_logprobs, completion_mask = self._token_logprobs(rows)  # (R, T)
            self._computed_tokens += sum(self._size(row)[0] for row in rows)
        logprobs = iter(split_completions(token_logprobs, completion_mask))
        return [list(itertools.islice(logprobs, len(row.completions))) for row in rows]

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]], stop: threading.Event) -> list[str]:
        """The text that the LLM writes behind each prompt."""
        from transformers import StoppingCriteria

        class StopWhenCancelled(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
                return torch.full((input_ids.shape[0],), stop.is_set(), dtype=torch.bool, device=input_ids.device)

        llm = self.builder.llm
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        pad_id = llm.stop_ids[0]  # masked; a tokenizer's own pad_token may have no row in the embedding
        input_ids = [[pad_id] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
        attention_mask = [[0] * n + [1] * (width - n) for n in padding]
        with llm.autocast():
            output = llm.model.generate(
                input_ids=torch.tensor(input_ids, device=llm.device),
                attention_mask=torch.tensor(attention_mask, device=llm.device),
                max_new_tokens=self.builder.generate_max_len,
                do_sample=False,
                repetition_penalty=1.0,  # overrides the default of models that have another
                eos_token_id=llm.stop_ids,
                pad_token_id=pad_id,
                stopping_criteria=[StopWhenCancelled()],
            )
        if stop.is_set():
            raise _Cancelled
        self._computed_tokens += sum(map(len, prompts)) + output[:, width:].numel()
        texts: list[str] = llm.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return texts
