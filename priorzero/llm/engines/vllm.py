"""Prior engine on vLLM, which runs in its own processes and loads the learner's parameters after each update.

docs/engines.md describes how it scores actions and what was measured.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import shutil
import tempfile
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger

from priorzero.llm.engines.base import PriorBuilder, PriorCache
from priorzero.llm.engines.vllm_process import engine_arguments, first_logged_error, process_environment
from priorzero.llm.engines.vllm_weights import (
    PARITY_TOLERANCE,
    ExportedWeights,
    ParityCheck,
    export_weights,
    parity_row,
)
from priorzero.llm.packing import PromptRow
from priorzero.runtime.concurrency import gather_or_cancel, run_in_thread, scratch_folders
from priorzero.settings import VLLMSettings
from priorzero.types import ActionPrior, EngineError, PriorRequest, PromptTooLongError

# Time limit for one token, which tells a slow engine from one that hangs.
CHECK_TIMEOUT_S = 60.0


@dataclass
class _Statistics:
    """Counters since the last :meth:`VLLMEngine.take_statistics`."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    rescored: int = 0
    aborted: int = 0
    busy_s: float = 0.0
    queue_s: list[float] = field(default_factory=list)

    def scalars(self) -> dict[str, float]:
        computed = self.prompt_tokens - self.cached_tokens + self.generated_tokens
        return {
            "prior/tokens_per_s": computed / (self.busy_s or 1.0),
            "prior/prefix_cache_hit_rate": self.cached_tokens / max(1, self.prompt_tokens),
            "prior/queue_mean_s": float(np.mean(self.queue_s or [0.0])),
            "prior/queue_max_s": float(np.max(self.queue_s or [0.0])),
            "prior/rescored": float(self.rescored),
            "prior/aborted": float(self.aborted),
        }


class _EngineDied(RuntimeError):
    """vLLM's processes have ended."""


class VLLMEngine:
    """Implements :class:`~priorzero.types.PriorEngine` with vLLM's ``AsyncLLM``.

    All requests of a call run concurrently. A cancelled call aborts its unfinished requests. Parameters are transferred
    through a folder; if the LLM has low-rank adapters, only the adapters are. After each start and each weight sync,
    vLLM's log-probabilities on a fixed prompt must agree with those of the training copy (:class:`ParityCheck`).

    ``model`` is the folder or hub id from which the training copy was loaded. ``cfg.max_model_len`` must be set.
    """

    def __init__(
        self,
        builder: PriorBuilder,
        *,
        model: str,
        cfg: VLLMSettings,
        log_file: Path,
        trust_remote_code: bool = False,
    ) -> None:
        self.version = 0
        self.builder = builder
        self.model = model
        self.cfg = cfg
        self.log_file = log_file
        self.exclusive = cfg.sleep
        self.cache = PriorCache(builder)
        self.restarts = 0
        self._uses_lora = hasattr(builder.llm.model, "peft_config")
        self._arguments = engine_arguments(builder.llm, cfg, tokenizer=model, trust_remote_code=trust_remote_code)
        self._engine: Any = None  # vLLM's AsyncLLM
        self._running = False  # started, and the parity check has passed
        self._crashed = False
        self._asleep = False
        self._log_start = 0
        self._start_lock = asyncio.Lock()
        self._request_ids = itertools.count()
        self._active_calls = 0
        self._busy_since = 0.0
        self._statistics = _Statistics()
        self._parity = ParityCheck(tolerance=cfg.parity_tolerance or PARITY_TOLERANCE[builder.llm.compute_dtype])
        self._weights: ExportedWeights | None = None  # what vLLM serves, or is to serve
        self._scratch_owner = tempfile.TemporaryDirectory(prefix="priorzero-vllm-")  # deleted at exit at the latest
        self._scratch = Path(self._scratch_owner.name)
        scratch_folders.add(self._scratch)

    # ---- start and stop ----

    async def ready(self) -> None:
        """As in the protocol. A crashed engine is restarted at most ``vllm.restarts`` times in a run."""
        if self._running:
            return
        async with self._start_lock:
            if self._running:
                return
            if self._crashed:
                await self._shut_down()
                self._count_restart()
            if self._weights is None:
                self._weights = await self._export(self.version)
            started = time.perf_counter()
            await self._start(self._weights)
            try:
                async with asyncio.timeout(self.cfg.sync_timeout_s):
                    await self._check_parity(self._weights, previous=None, seconds=time.perf_counter() - started)
            except (_EngineDied, TimeoutError) as error:
                raise EngineError(f"vLLM started but does not respond; its log is {self.log_file}") from error
            self._running = True  # not earlier: requests must wait for the parity check

    def _count_restart(self) -> None:
        if self.restarts >= self.cfg.restarts:
            raise EngineError(
                f"vLLM crashed, and has been restarted {self.restarts} times already (vllm.restarts="
                f"{self.cfg.restarts}); its log is {self.log_file}"
            )
        self._crashed = False
        self.restarts += 1
        logger.warning(f"vLLM has crashed and is restarted (its log is {self.log_file})")

    def _mark_crashed(self) -> None:
        self._running, self._crashed = False, True

    async def _start(self, weights: ExportedWeights) -> None:
        model = self.model if weights.folder is None or self._uses_lora else str(weights.folder)
        # vLLM requires its share of the memory to be free, and fails if any is freed while it measures what it needs.
        torch.cuda.empty_cache()
        try:
            await run_in_thread(lambda: self._start_process(model))
            if self._uses_lora:
                async with asyncio.timeout(self.cfg.sync_timeout_s):
                    await self._fail_if_dead(self._load(weights))
        except asyncio.CancelledError:
            await self._shut_down()
            raise
        except EngineError:
            raise
        except Exception as error:  # vLLM raises errors of many types
            cause = first_logged_error(self.log_file, start=self._log_start) or f"{type(error).__name__}: {error}"
            memory = "cpu_kv_cache_gib" if self.builder.llm.device.type == "cpu" else "gpu_memory_utilization"
            raise EngineError(
                f"vLLM did not start: {' '.join(cause.split())[:400]}. Its log is {self.log_file}; its memory is set "
                f"by vllm.{memory}={getattr(self.cfg, memory):g}; --engine transformers does not need vLLM"
            ) from error

    def _start_process(self, model: str) -> None:
        """Start vLLM. The engine is not returned, because the executor's thread would keep a reference to it."""
        self._log_start = self.log_file.stat().st_size if self.log_file.is_file() else 0
        with process_environment(log_file=self.log_file, scratch=self._scratch):
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **self._arguments))

    async def check(self) -> None:
        """As in the protocol. The engine works if it generates one token within :data:`CHECK_TIMEOUT_S`."""
        if not self._running:
            return
        checked = self._engine
        limit = min(CHECK_TIMEOUT_S, self.cfg.sync_timeout_s)
        try:
            async with asyncio.timeout(limit):
                await self._generate(self.builder.llm.stop_ids[:1], max_tokens=1)
        except _EngineDied:
            pass  # already marked as crashed
        except TimeoutError:
            logger.warning(f"vLLM did not generate one token within {limit:g} s; it counts as crashed and is killed")
            if checked is self._engine:  # otherwise it has been restarted meanwhile
                self._mark_crashed()

    async def _shut_down(self) -> None:
        self._running = False
        if self._engine is not None:
            # They ignore the SIGTERM that asks them to exit, and are killed after this time.
            await asyncio.to_thread(self._engine.shutdown, timeout=0.1)
            self._engine = None
            gc.collect()  # otherwise its reference cycles are collected at exit, when modules are gone

    async def close(self) -> None:
        self.cache.clear()
        async with self._start_lock:
            await self._shut_down()
        self._scratch_owner.cleanup()
        scratch_folders.discard(self._scratch)

    # ---- requests ----

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        """As in the protocol. If vLLM dies, a RuntimeError is raised, and :meth:`ready` restarts it."""
        priors, missing = self.cache.look_up(requests)
        with self._measure_busy_time():
            computed = await gather_or_cancel(*(self._prior(request) for request in missing))
        priors.update(zip(missing, computed, strict=True))
        return [priors[request] for request in requests]

    async def _prior(self, request: PriorRequest) -> ActionPrior:
        try:
            if self.builder.style.mode == "score":
                prior = await self._scored_prior(request)
            else:
                text = await self._generated_text(request)
                prior = self.builder.from_text(text, request, version=self.version)
        except PromptTooLongError as error:
            return self.cache.too_long(request, error, version=self.version)
        self.cache.put(request, prior)  # at once, so that after a timeout the next attempt computes only the rest
        return prior

    async def _scored_prior(self, request: PriorRequest) -> ActionPrior:
        use_cot = self.builder.style.use_cot
        thought = self.builder.thought(await self._generated_text(request)) if use_cot else None
        row = self.builder.row(request, thought)
        self._check_length(len(row.prompt_ids) + max(map(len, row.completions)) + 1)
        return self.builder.from_logprobs(await self._row_logprobs(row), version=self.version, thought=thought)

    def _check_length(self, length: int) -> None:
        limit = self.cfg.max_model_len
        if length > limit:
            raise PromptTooLongError(f"{length} tokens do not fit into vLLM's limit of {limit} tokens")

    async def _generated_text(self, request: PriorRequest) -> str:
        prompt_ids = self.builder.prompt_ids(request)
        self._check_length(len(prompt_ids) + self.builder.generate_max_len)
        llm = self.builder.llm
        output = await self._generate(prompt_ids, max_tokens=self.builder.generate_max_len, stop_token_ids=llm.stop_ids)
        return llm.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)

    async def _row_logprobs(self, row: PromptRow) -> list[np.ndarray]:
        """Token log-probabilities of each completion of a row, one vLLM request for each."""
        return await gather_or_cancel(
            *(self._completion_logprobs(row.prompt_ids, c, read_cache=True) for c in row.completions)
        )

    async def _completion_logprobs(
        self, prompt_ids: Sequence[int], completion: Sequence[int], *, read_cache: bool
    ) -> np.ndarray:
        """Token log-probabilities of a completion, requested as vLLM's prompt log-probabilities of the whole sequence.

        By default vLLM does not read its prefix cache for such requests, since cached tokens have no log-probabilities.
        Only the completion's are needed here, so the prompt may come from the cache.
        """
        output = await self._generate(
            [*prompt_ids, *completion],
            max_tokens=1,
            prompt_logprobs=0,
            skip_reading_prefix_cache=not read_cache,
            flat_logprobs=True,
        )
        # If an earlier request had the same prompt and a completion with the same beginning, completion tokens were
        # read from the cache as well, and their log-probabilities are undefined. Repeat without the cache.
        if read_cache and (output.num_cached_tokens or 0) > len(prompt_ids) - 1:
            self._statistics.rescored += 1
            return await self._completion_logprobs(prompt_ids, completion, read_cache=False)
        positions, n = output.prompt_logprobs, len(completion)
        return np.array([positions[len(positions) - n + i][token].logprob for i, token in enumerate(completion)])

    async def _generate(self, token_ids: list[int], **sampling: Any) -> Any:
        """vLLM's final output for one request; generation is greedy."""
        from vllm import SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError

        request_id = f"prior-{next(self._request_ids)}"
        parameters = SamplingParams(temperature=0.0, detokenize=False, **sampling)
        engine, output = self._engine, None
        lora = self._lora_request() if self._uses_lora else None
        try:
            async for latest in engine.generate(
                {"prompt_token_ids": token_ids}, parameters, request_id, lora_request=lora
            ):
                output = latest
        except asyncio.CancelledError:
            self._statistics.aborted += 1
            if self._running and engine is self._engine:
                await asyncio.shield(engine.abort(request_id))
            raise
        except EngineDeadError as error:
            if engine is self._engine:  # otherwise it has been restarted meanwhile
                self._mark_crashed()
            raise _EngineDied("vLLM has died") from error
        assert output is not None
        self._count(output, num_prompt_tokens=len(token_ids))
        return output

    def _count(self, output: Any, *, num_prompt_tokens: int) -> None:
        statistics = self._statistics
        statistics.prompt_tokens += num_prompt_tokens
        statistics.cached_tokens += output.num_cached_tokens or 0
        statistics.generated_tokens += len(output.outputs[0].token_ids)
        if output.metrics is not None:
            statistics.queue_s.append(output.metrics.scheduled_ts - output.metrics.queued_ts)

    @contextmanager
    def _measure_busy_time(self) -> Iterator[None]:
        """Count the seconds in which at least one call runs."""
        if not self._active_calls:
            self._busy_since = time.perf_counter()
        self._active_calls += 1
        try:
            yield
        finally:
            self._active_calls -= 1
            if not self._active_calls:
                self._statistics.busy_s += time.perf_counter() - self._busy_since

    async def clear_cache(self) -> None:
        """As in the protocol, except for rounding errors: vLLM keeps its prefix cache."""
        self.cache.clear()

    def take_statistics(self) -> dict[str, float]:
        """As in the protocol. ``prior/tokens_per_s`` does not count tokens that were read from the prefix cache."""
        statistics, self._statistics = self._statistics, _Statistics()
        return {
            **self.cache.take_statistics(),
            **statistics.scalars(),
            **self._parity.take_metrics(),
            "prior/engine_restarts": float(self.restarts),
        }

    # ---- parameters ----

    async def suspend(self) -> None:
        """Free the GPU. With adapters the base model moves to the host's memory; full parameters are dropped."""
        if self._running and not self._asleep:
            try:
                async with asyncio.timeout(self.cfg.sync_timeout_s):
                    await self._fail_if_dead(self._engine.sleep(level=1 if self._uses_lora else 2))
                self._asleep = True
            except (_EngineDied, TimeoutError):
                self._mark_crashed()  # the next weight sync restarts it

    async def sync_weights(self, version: int) -> None:
        """As in the protocol. If vLLM crashes meanwhile, it is restarted with the new parameters."""
        started = time.perf_counter()
        try:
            previous, self._weights = self._weights, await self._export(version)
        except OSError as error:
            raise EngineError(
                f"the LLM's parameters cannot be written for vLLM ({error}); set TMPDIR to another folder"
            ) from error
        self.cache.clear()
        if self._running:
            await self._load_and_check(self._weights, previous=previous, started=started)
        self._asleep = False
        await self.ready()
        if previous is not None and previous.folder not in (None, self._weights.folder):
            shutil.rmtree(previous.folder)

    async def _load_and_check(
        self, weights: ExportedWeights, *, previous: ExportedWeights | None, started: float
    ) -> None:
        """Load new parameters into the running vLLM and check them; mark vLLM as crashed if it dies or hangs."""
        try:
            async with asyncio.timeout(self.cfg.sync_timeout_s):
                await self._fail_if_dead(self._load(weights))
                await self._check_parity(weights, previous=previous, seconds=time.perf_counter() - started)
        except _EngineDied:
            self._mark_crashed()
        except TimeoutError:
            logger.warning(
                f"vLLM took longer than vllm.sync_timeout_s={self.cfg.sync_timeout_s:g} to load new weights; it "
                "counts as crashed and is killed"
            )
            self._mark_crashed()
        except EngineError:
            raise
        except Exception as error:  # vLLM passes on any error of its workers
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise EngineError(
                f"vLLM could not load version {weights.version} of the LLM ({reason}); its log is {self.log_file}"
            ) from error

    async def _fail_if_dead(self, call: Coroutine[Any, Any, None]) -> None:
        """Await a call to vLLM; raise if vLLM dies. Only requests fail then by themselves; other calls never return."""
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.ensure_future(call)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=0.5)
                if not task.done() and self._engine.errored:
                    raise _EngineDied("vLLM has died")
            await task
        except EngineDeadError as error:
            raise _EngineDied("vLLM has died") from error
        finally:
            task.cancel()

    async def _load(self, weights: ExportedWeights) -> None:
        engine = self._engine
        if self._asleep:
            torch.cuda.empty_cache()  # torch keeps the memory of the update, and vLLM needs it now
            await engine.wake_up(["weights"])
        if self._uses_lora:
            for adapter in await engine.list_loras():
                await engine.remove_lora(adapter)
            await engine.add_lora(self._lora_request())
            await self._check_adapters()
        else:
            await engine.collective_rpc("reload_weights", kwargs={"weights_path": str(weights.folder or self.model)})
            if self.builder.llm.device.type == "cpu":
                await engine.collective_rpc("repack_output_layers")
        if self._asleep:
            await engine.wake_up(["kv_cache"])
        if not await engine.reset_prefix_cache(reset_running_requests=True):
            raise EngineError("vLLM did not reset its prefix cache, which contains values of the previous parameters")

    async def _check_adapters(self) -> None:
        """Raise EngineError if vLLM ignores a part of the adapters that it has loaded."""
        for ignored in await self._engine.collective_rpc("ignored_adapter_layers"):  # of each worker
            if ignored:
                raise EngineError(
                    f"vLLM ignores the adapters of {len(ignored)} layers of this model, such as {ignored[0]}; type "
                    "--engine transformers, or --set llm.use_lora=false"
                )

    def _lora_request(self) -> Any:
        from vllm.lora.request import LoRARequest

        assert self._weights is not None
        version = self._weights.version
        return LoRARequest(f"version-{version}", version + 1, str(self._weights.folder))

    async def _export(self, version: int) -> ExportedWeights:
        # Not `to_thread`: the folder must not be deleted while it is written.
        return await run_in_thread(lambda: export_weights(self.builder.llm, version, scratch=self._scratch))

    async def _check_parity(
        self, weights: ExportedWeights, *, previous: ExportedWeights | None, seconds: float
    ) -> None:
        with self._measure_busy_time():
            served = await self._row_logprobs(parity_row(self.builder.llm))
        self._parity.check(served, weights, previous=previous, seconds=seconds)
        self.version = weights.version
