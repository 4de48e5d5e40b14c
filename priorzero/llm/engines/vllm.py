"""The prior engine on vLLM: in processes of its own, asked from the loop, fed with the learner's parameters.

How it computes a ``score``, why so and what else was measured is in docs/ENGINES.md.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import re
import shutil
import sys
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
from priorzero.llm.engines.vllm_worker import OWNER_VARIABLE, WorkerExtension
from priorzero.llm.models import save_parameters
from priorzero.llm.packing import PromptRow
from priorzero.runtime.concurrency import gather_or_cancel, scratch_folders
from priorzero.settings import VLLMSettings
from priorzero.types import ActionPrior, EngineError, PriorRequest, PromptTooLongError

# Mean absolute difference, in nats, that is allowed between the log-probability of a token in vLLM and in the training
# copy. Rounding gives a tenth to a half of it; parameters that are not the learner's give more (docs/ENGINES.md).
PARITY_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.3}

# How long one token may take once a whole batch was not answered in time. Nobody who waits that long for it gets far.
CHECK_TIMEOUT_S = 60.0

PACKAGE = Path(__file__).parent.parent

PARITY_MESSAGES = [
    {"role": "system", "content": "You are an expert player of text adventure games."},
    {"role": "user", "content": "You are in a kitchen. A brown sack lies on the table. What is the next command?"},
]
PARITY_ANSWERS = ["open sack", "take the sack and go west", "look"]


@dataclass
class _Statistics:
    """What vLLM did since the last ``take``."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    rescored: int = 0
    aborted: int = 0
    busy_s: float = 0.0
    queue_s: list[float] = field(default_factory=list)

    def scalars(self) -> dict[str, float]:
        computed = self.prompt_tokens - self.cached_tokens + self.written_tokens
        return {
            "prior/tokens_per_s": computed / (self.busy_s or 1.0),
            "prior/prefix_cache_hit_rate": self.cached_tokens / max(1, self.prompt_tokens),
            "prior/queue_mean_s": float(np.mean(self.queue_s or [0.0])),
            "prior/queue_max_s": float(np.max(self.queue_s or [0.0])),
            "prior/rescored": float(self.rescored),
            "prior/aborted": float(self.aborted),
        }


@dataclass(frozen=True)
class _Published:
    """Parameters that vLLM is to serve: where they lie, and what the training copy computes with them.

    Attributes:
        version: LLM updates they have seen.
        folder: checkpoint or adapter; None for the parameters that training began with.
        reference: token log-probabilities of the parity question's answers.
    """

    version: int
    folder: Path | None
    reference: list[np.ndarray]


class _Died(RuntimeError):
    """vLLM's processes are gone."""


class VLLMEngine:
    """Implements :class:`~priorzero.types.PriorEngine` on vLLM's ``AsyncLLM``.

    All requests of a call are in flight together. A cancelled call aborts what has not come back. Parameters are taken
    over through a folder; with low-rank adapters only the adapter is written. After each takeover, and after each
    start, vLLM's log-probabilities on a fixed question must be those of the training copy.

    Args:
        builder: puts the questions; its ``llm`` is the training copy.
        model: what vLLM loads at first: the folder or hub id that the training copy was loaded from.
        cfg: the ``vllm`` group of the settings.
        max_model_len: tokens of the longest sequence.
        log_file: where vLLM's own log goes.
        trust_remote_code: as for the training copy.
        cache_size: answers kept for questions that come again under the same parameters.
    """

    def __init__(
        self,
        builder: PriorBuilder,
        *,
        model: str,
        cfg: VLLMSettings,
        max_model_len: int,
        log_file: Path,
        trust_remote_code: bool = False,
        cache_size: int = 4096,
    ) -> None:
        self.version = 0
        self.builder = builder
        self.model = model
        self.cfg = cfg
        self.max_model_len = max_model_len
        self.log_file = log_file
        self.trust_remote_code = trust_remote_code
        self.exclusive = cfg.sleep
        self.cache = PriorCache(builder, size=cache_size)
        self.restarts = 0
        self._uses_lora = hasattr(builder.llm.model, "peft_config")
        self._dtype = builder.llm.compute_dtype
        self._tolerance = cfg.parity_tolerance or PARITY_TOLERANCE[self._dtype]
        self._engine: Any = None
        self._alive = False
        self._crashed = False
        self._asleep = False
        self._log_start = 0
        self._starting = asyncio.Lock()
        self._ids = itertools.count()
        self._calls = 0
        self._busy_since = 0.0
        self._statistics = _Statistics()
        self._parity: dict[str, float] = {}
        self._noise = 0.0
        self._served: list[np.ndarray] = []
        self._published: _Published | None = None
        self._scratch_owner = tempfile.TemporaryDirectory(prefix="priorzero-vllm-")  # removed at exit at the latest
        self._scratch = Path(self._scratch_owner.name)
        scratch_folders.add(self._scratch)

    # ---- life ----

    async def ready(self) -> None:
        """As the protocol says; a crashed engine is started again ``vllm.restarts`` times a run."""
        if self._alive:
            return
        async with self._starting:
            if self._alive:
                return
            if self._crashed:
                await self._shut_down()
                if self.restarts >= self.cfg.restarts:
                    raise EngineError(
                        f"vLLM crashed, and has been restarted {self.restarts} times already (vllm.restarts="
                        f"{self.cfg.restarts}); its log is {self.log_file}"
                    )
                self._crashed = False
                self.restarts += 1
                logger.warning(f"vLLM has crashed; starting it again (its log is {self.log_file})")
            if self._published is None:
                self._published = await self._publish(self.version)
            started = time.perf_counter()
            await self._launch()
            try:
                async with asyncio.timeout(self.cfg.sync_timeout_s):
                    await self._check_parity(self._published, before=None, seconds=time.perf_counter() - started)
            except (_Died, TimeoutError) as error:
                raise EngineError(f"vLLM started but does not answer; its log is {self.log_file}") from error
            self._alive = True  # not before: nobody may ask until it is known what answers

    async def check(self) -> None:
        """As the protocol says: it lives if it writes one token within :data:`CHECK_TIMEOUT_S`."""
        asked = self._engine
        if not self._alive:
            return
        limit = min(CHECK_TIMEOUT_S, self.cfg.sync_timeout_s)
        try:
            async with asyncio.timeout(limit):
                await self._generate(
                    [self.builder.llm.tokenizer.eos_token_id], max_tokens=1, temperature=0.0, detokenize=False
                )
        except _Died:
            pass  # taken note of
        except TimeoutError:
            logger.warning(f"vLLM has not written one token in {limit:g} s: it hangs, and is ended")
            self._give_up(asked)

    def _give_up(self, engine: Any) -> None:
        """Count ``engine`` as crashed, unless it is another one that runs by now: it was started again meanwhile."""
        if engine is self._engine:
            self._alive, self._crashed = False, True

    async def _launch(self) -> None:
        assert self._published is not None
        work = asyncio.ensure_future(asyncio.to_thread(self._start_process, self._first_model()))
        try:
            await asyncio.shield(work)
            if self._uses_lora:
                async with asyncio.timeout(self.cfg.sync_timeout_s):
                    await self._while_alive(self._load(self._published))
        except asyncio.CancelledError:  # no process may be left behind: wait for it, then end it
            await asyncio.wait([work])
            work.exception()  # taken note of: the run ends anyway
            await self._shut_down()
            raise
        except Exception as error:
            memory = "cpu_kv_cache_gib" if self.builder.llm.device.type == "cpu" else "gpu_memory_utilization"
            raise EngineError(
                f"vLLM did not start: {self._cause(error)}. Its log is {self.log_file}; what it takes of the memory is "
                f"vllm.{memory}={getattr(self.cfg, memory):g}; --engine transformers does without vLLM"
            ) from error

    def _cause(self, error: Exception) -> str:
        """What went wrong, in a line: the first error in vLLM's log after its start, for it is rarely passed on."""
        text = self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.is_file() else ""
        said = re.findall(r"^(?:[\w.]*Error|Exception): .+", text[self._log_start :], flags=re.MULTILINE)
        return " ".join((said[0] if said else f"{type(error).__name__}: {error}").split())[:400]

    def _first_model(self) -> str:
        assert self._published is not None
        folder = self._published.folder
        return self.model if folder is None or self._uses_lora else str(folder)

    def _start_process(self, model: str) -> None:
        self._log_start = self.log_file.stat().st_size if self.log_file.is_file() else 0
        with self._environment():
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            # Not returned, since the thread would hold on to its latest result.
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._engine_arguments(model)))

    def _engine_arguments(self, model: str) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": model,
            "tokenizer": self.model,
            "dtype": str(self._dtype).removeprefix("torch."),
            "max_model_len": self.max_model_len,
            "tensor_parallel_size": self.cfg.tensor_parallel_size,
            "gpu_memory_utilization": self.cfg.gpu_memory_utilization,
            "enable_prefix_caching": True,
            "enable_sleep_mode": self.cfg.sleep,
            "generation_config": "vllm",  # none of the model's own sampling defaults
            "use_tqdm_on_load": False,
            "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
            "trust_remote_code": self.trust_remote_code,
            "seed": 0,
        }
        if self.builder.llm.device.type == "cpu":
            # Fixed cache and no compiling: a start of 20 instead of 80 seconds. 32 is this build's smallest block.
            arguments |= {
                "kv_cache_memory_bytes": int(self.cfg.cpu_kv_cache_gib * 2**30),
                "enforce_eager": True,
                "block_size": 32,
            }
        if self._uses_lora:
            adapter = next(iter(self.builder.llm.model.peft_config.values()))
            arguments |= {
                "enable_lora": True,
                "max_lora_rank": next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= adapter.r), adapter.r),
                "max_loras": 1,
                # Left to itself vLLM prepares the output layer too, and then cannot give prompt log-probabilities.
                "lora_target_modules": sorted(adapter.target_modules),
            }
        return arguments

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """What vLLM and its processes see while they start: where to log, which cores to take, not to report home."""
        config = {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"}},
            "handlers": {
                "file": {"class": "logging.FileHandler", "filename": str(self.log_file), "formatter": "plain"}
            },
            "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
        }
        config_file = self._scratch / "logging.json"
        config_file.write_text(json.dumps(config), encoding="utf-8")
        variables = {
            "VLLM_LOGGING_CONFIG_PATH": str(config_file),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with threads may hang
            "VLLM_CPU_NUM_OF_RESERVED_CPU": str(cores_for_training()),
            "PYTHONWARNINGS": "ignore",
            OWNER_VARIABLE: f"{os.getpid()} {self._scratch}",
            # Its workers import WorkerExtension, also when this package is not installed.
            "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])),
        }
        if len(str(self._scratch)) < 60:  # the path of a socket may have 107 characters
            variables["VLLM_RPC_BASE_PATH"] = str(self._scratch)
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        # Spawned processes would import the user's script again, and with it LightZero and flask, on whose proxies vLLM
        # stumbles when it looks through all modules. They need nothing of it.
        main = sys.modules["__main__"]
        file, main.__spec__, spec = vars(main).pop("__file__", None), None, main.__spec__
        try:
            yield
        finally:
            main.__spec__ = spec
            if file is not None:
                main.__file__ = file
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    async def _shut_down(self) -> None:
        self._alive = False
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)
            self._engine = None
            gc.collect()  # else its cycles are taken apart at exit, when the modules that __del__ needs are gone

    async def clear_cache(self) -> None:
        """As the protocol says, but for rounding: vLLM itself keeps what it computed for earlier prompts."""
        self.cache.clear()

    async def close(self) -> None:
        self.cache.clear()
        async with self._starting:
            await self._shut_down()
        self._scratch_owner.cleanup()
        scratch_folders.discard(self._scratch)

    # ---- answering ----

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        """As the protocol says.

        Raises:
            ValueError: a request has no valid actions.
            RuntimeError: vLLM died; :meth:`ready` starts it again.
        """
        answers, new = self.cache.look_up(requests)
        with self._busy():
            computed = await gather_or_cancel(*(self._answer(request) for request in new))
        answers.update(zip(new, computed, strict=True))
        return [answers[request] for request in requests]

    async def _answer(self, request: PriorRequest) -> ActionPrior:
        try:
            if self.builder.style.mode == "score":
                row = self.builder.row(request)
                self._check_length(len(row.prompt_ids) + max(map(len, row.completions)) + 1)
                prior = self.builder.from_logprobs(await self._row_logprobs(row), version=self.version)
            else:
                prior = self.builder.from_text(await self._write(request), request, version=self.version)
        except PromptTooLongError as error:
            return self.cache.uniform(request, error, version=self.version)
        self.cache.put(request, prior)  # at once: a try that runs out of time leaves less to do for the next one
        return prior

    def _check_length(self, length: int) -> None:
        if length > self.max_model_len:
            raise PromptTooLongError(f"{length} tokens do not fit into vLLM's {self.max_model_len}")

    async def _write(self, request: PriorRequest) -> str:
        prompt_ids = self.builder.prompt_ids(request)
        self._check_length(len(prompt_ids) + self.builder.generate_max_len)
        tokenizer = self.builder.llm.tokenizer
        output = await self._generate(
            prompt_ids,
            max_tokens=self.builder.generate_max_len,
            temperature=0.0,
            stop_token_ids=[tokenizer.eos_token_id],
            detokenize=False,
        )
        return tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)

    async def _row_logprobs(self, row: PromptRow) -> list[np.ndarray]:
        """Token log-probabilities of each completion of ``row``, as if each were computed alone."""
        return await gather_or_cancel(
            *(self._logprobs(row.prompt_ids, completion, read_cache=True) for completion in row.completions)
        )

    async def _logprobs(self, prompt_ids: Sequence[int], completion: Sequence[int], *, read_cache: bool) -> np.ndarray:
        """One request an action, its tokens as the end of the prompt. The prefix cache shares the prompt.

        vLLM by default does not read its prefix cache for requests with prompt log-probabilities, since what it reads
        there has none. Only the completion's are needed, so it may read what lies before.
        """
        output = await self._generate(
            [*prompt_ids, *completion],
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            skip_reading_prefix_cache=not read_cache,
            flat_logprobs=True,
            detokenize=False,
        )
        # Log-probabilities of tokens whose predecessor was read from the cache were not computed (an earlier question
        # had the same prompt and began with the same command): ask without the cache.
        if read_cache and (output.num_cached_tokens or 0) > len(prompt_ids) - 1:
            self._statistics.rescored += 1
            return await self._logprobs(prompt_ids, completion, read_cache=False)
        positions, n = output.prompt_logprobs, len(completion)
        return np.array([positions[len(positions) - n + i][token].logprob for i, token in enumerate(completion)])

    async def _generate(self, token_ids: list[int], **sampling: Any) -> Any:
        """vLLM's last output for one request.

        Raises:
            RuntimeError: vLLM has died.
        """
        from vllm import SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError

        request_id = f"prior-{next(self._ids)}"
        engine, output = self._engine, None
        lora = self._lora_request() if self._uses_lora else None
        try:
            async for latest in engine.generate(
                {"prompt_token_ids": token_ids}, SamplingParams(**sampling), request_id, lora_request=lora
            ):
                output = latest
        except asyncio.CancelledError:
            self._statistics.aborted += 1
            if self._alive and engine is self._engine:
                await asyncio.shield(engine.abort(request_id))
            raise
        except EngineDeadError as error:
            self._give_up(engine)
            raise _Died("vLLM has died") from error
        assert output is not None
        self._statistics.prompt_tokens += len(token_ids)
        self._statistics.cached_tokens += output.num_cached_tokens or 0
        self._statistics.written_tokens += len(output.outputs[0].token_ids)
        if output.metrics is not None:
            self._statistics.queue_s.append(output.metrics.scheduled_ts - output.metrics.queued_ts)
        return output

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Counts the seconds in which at least one call runs."""
        if not self._calls:
            self._busy_since = time.perf_counter()
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._statistics.busy_s += time.perf_counter() - self._busy_since

    def take_statistics(self) -> dict[str, float]:
        """As the protocol says.

        ``prior/tokens_per_s`` counts tokens that were computed, not those read from the prefix cache.
        """
        taken, self._statistics = self._statistics, _Statistics()
        parity, self._parity = self._parity, {}
        return {
            **self.cache.take_statistics(),
            **taken.scalars(),
            **parity,
            "prior/engine_restarts": float(self.restarts),
        }

    # ---- parameters ----

    async def suspend(self) -> None:
        """Free the GPU: adapters keep the base model in the host's memory, full parameters are dropped."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._alive and not self._asleep:
            try:
                async with asyncio.timeout(self.cfg.sync_timeout_s):
                    await self._while_alive(self._engine.sleep(level=1 if self._uses_lora else 2))
                self._asleep = True
            except (EngineDeadError, _Died, TimeoutError):  # starts again when parameters are taken over
                self._alive, self._crashed = False, True

    async def sync_weights(self, version: int) -> None:
        """As the protocol says. A crash on the way costs a restart, which begins with the new parameters."""
        from vllm.v1.engine.exceptions import EngineDeadError

        started = time.perf_counter()
        try:
            before, self._published = self._published, await self._publish(version)
        except OSError as error:
            raise EngineError(
                f"the LLM's parameters could not be written for vLLM ({error}); TMPDIR names another place"
            ) from error
        self.cache.clear()
        if self._alive:
            try:
                async with asyncio.timeout(self.cfg.sync_timeout_s):
                    await self._while_alive(self._load(self._published))
                    await self._check_parity(self._published, before=before, seconds=time.perf_counter() - started)
            except (EngineDeadError, _Died):
                self._alive, self._crashed = False, True
            except TimeoutError:
                logger.warning(f"vLLM took longer than vllm.sync_timeout_s={self.cfg.sync_timeout_s:g}; it is ended")
                self._alive, self._crashed = False, True
            except EngineError:
                raise
            except Exception as error:  # vLLM passes on whatever went wrong in its worker
                said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise EngineError(
                    f"vLLM could not take over version {version} of the LLM ({said}); its log is {self.log_file}"
                ) from error
        self._asleep = False
        await self.ready()
        if before is not None and before.folder not in (None, self._published.folder):
            shutil.rmtree(before.folder)

    async def _while_alive(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that vLLM would not answer for if it died: it fails requests then, but not its other calls."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=0.5)
                if not task.done() and self._engine.errored:
                    raise _Died("vLLM has died")
            await task
        finally:
            task.cancel()

    async def _load(self, published: _Published) -> None:
        engine = self._engine
        if self._asleep:
            await engine.wake_up(["weights"])
        if self._uses_lora:
            for adapter in await engine.list_loras():
                await engine.remove_lora(adapter)
            await engine.add_lora(self._lora_request())
        else:
            await engine.collective_rpc("reload_weights", kwargs={"weights_path": str(published.folder or self.model)})
            if self.builder.llm.device.type == "cpu":
                await engine.collective_rpc("repack_output_layers")
        if self._asleep:
            await engine.wake_up(["kv_cache"])
        if not await engine.reset_prefix_cache(reset_running_requests=True):
            raise EngineError("vLLM did not let go of its prefix cache, which holds values of earlier parameters")

    def _lora_request(self) -> Any:
        from vllm.lora.request import LoRARequest

        assert self._published is not None
        version = self._published.version
        return LoRARequest(f"version-{version}", version + 1, str(self._published.folder))

    async def _publish(self, version: int) -> _Published:
        work = asyncio.ensure_future(asyncio.to_thread(self._write_parameters, version))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:  # the folder must not be removed while it is written to
            await asyncio.wait([work])
            work.exception()  # taken note of: the run ends anyway
            raise

    @torch.inference_mode()
    def _write_parameters(self, version: int) -> _Published:
        llm = self.builder.llm
        token_logprobs, mask = llm.token_logprobs([self._parity_row()])
        values = token_logprobs.cpu().numpy()
        reference = [values[r, : int(n)] for r, n in enumerate(mask.sum(dim=1))]
        if not version and not self._uses_lora:
            return _Published(version, None, reference)
        folder = self._scratch / f"version-{version}"
        state = None
        if not self._uses_lora and self._dtype != torch.float32:
            casts: dict[int, torch.Tensor] = {}  # by place in memory, so that tied parameters stay tied
            state = {
                name: casts.setdefault(p.data_ptr(), p.to(self._dtype)) for name, p in llm.model.state_dict().items()
            }
        save_parameters(llm.model, folder, **({} if state is None else {"state_dict": state}))
        return _Published(version, folder, reference)

    def _parity_row(self) -> PromptRow:
        llm = self.builder.llm
        context = llm.tokenizer.apply_chat_template(PARITY_MESSAGES, tokenize=False, add_generation_prompt=True)
        return llm.row(context, PARITY_ANSWERS, end_of_turn=True)

    async def _check_parity(self, published: _Published, *, before: _Published | None, seconds: float) -> None:
        """Compare vLLM with the training copy on a fixed question.

        Args:
            published: the parameters it is to serve.
            before: those it served until now.
            seconds: what bringing them there took, for the log.

        Raises:
            EngineError: they differ by more than rounding, or vLLM is nearer to the parameters it had before.
        """
        with self._busy():
            served = await self._row_logprobs(self._parity_row())
        parity = _distance(served, published.reference)
        self._parity = {"prior/parity": parity, "prior/sync_s": seconds}
        told = (
            f"vLLM serves LLM version {published.version} after {seconds:.1f} s: parity {parity:.2g} nats a token "
            f"(at most {self._tolerance:g} allowed)"
        )
        if before is None:
            logger.info(told)
        else:
            moved = _distance(before.reference, published.reference)
            self._parity["prior/parity_moved"] = moved
            logger.info(f"{told}, moved {moved:.2g} since version {before.version}")
            # An update may move less than the tolerance, above all in bfloat16; no update at all can still be told.
            to_old = _distance(served, before.reference)
            nearer_to_old = moved > 4 * self._noise and to_old < parity
            unmoved = moved > 0.5 * self._noise and _distance(served, self._served) == 0
            if nearer_to_old or unmoved:
                raise EngineError(
                    f"vLLM was given version {published.version} of the LLM but still computes with version "
                    f"{before.version}: it is {parity:.2g} nats a token from the new and {to_old:.2g} from the old one"
                )
        if not parity <= self._tolerance:  # also if it is NaN
            raise EngineError(
                f"vLLM and the training copy differ by {parity:.3g} nats a token, more than "
                f"{self._tolerance:g} (vllm.parity_tolerance): it does not compute with version {published.version}"
            )
        self.version = published.version
        self._served = served
        self._noise = max(self._noise, parity)


def _distance(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Mean absolute difference between two lists of token log-probabilities."""
    return float(np.abs(np.concatenate(one) - np.concatenate(other)).mean())


def cores_for_training() -> int:
    """On a machine without a GPU, vLLM gets half of the cores and this process the rest."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores - cores // 2)
