"""Prior servers: processes that run the LLM's prior engine for the collectors."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from priorzero.cluster.actors import set_up_process
from priorzero.cluster.actors.registry import REGISTRY
from priorzero.cluster.calls import result_of
from priorzero.llm.engine_choice import choose_engine
from priorzero.llm.engines import RetryingPrior
from priorzero.llm.engines.make import make_engine
from priorzero.llm.models import LanguageModel, load_language_model
from priorzero.runtime.concurrency import ReadersWriterLock
from priorzero.settings import ClusterSettings, Settings
from priorzero.types import ActionPrior, EngineError, PriorEngine, PriorRequest, ProcessError


class PriorServer:
    """Runs a prior engine. After a restart it loads the parameters that were published last.

    The constructor loads nothing, because nobody would receive its errors.
    """

    def __init__(self, settings: Settings, vllm_log: Path) -> None:
        self._settings = settings
        self._vllm_log = vllm_log
        self._lock = ReadersWriterLock()
        self._starting = asyncio.Lock()
        self._prior: RetryingPrior | None = None
        self._llm: LanguageModel | None = None

    async def ready(self) -> int:
        """Load the model and start the engine, if this has not been done; returns the version of the parameters."""
        return (await self._started()).engine.version

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        """One prior for each request, in order; uniform if all attempts fail."""
        prior = await self._started()
        async with self._lock.shared():
            return await prior.priors(requests)

    async def load_parameters(self, version: int, parameters: list[Any]) -> int:
        """Serve new parameters, a list with Ray's reference to them, from now on; returns the version that is served.

        Requests that were received before are completed first.
        """
        engine = (await self._started()).engine
        if version != engine.version:
            state = await parameters[0]
            async with self._lock.exclusive():
                await engine.suspend()
                await self._load(engine, version, state)
        return engine.version

    async def statistics(self) -> tuple[int, dict[str, float]]:
        """The process id, and the metrics since the last call."""
        prior = await self._started()
        return os.getpid(), prior.take_statistics()

    async def close(self) -> None:
        if self._prior is not None:
            await self._prior.engine.close()

    async def _started(self) -> RetryingPrior:
        async with self._starting:
            if self._prior is None:
                settings = self._settings
                device = set_up_process(settings)
                settings.prior.engine = choose_engine(settings, device=device.type)
                self._llm = load_language_model(settings.llm, device=device)
                engine = make_engine(settings, llm=self._llm, vllm_log=self._vllm_log)
                # By name: after a restart, Ray may have lost handles that were passed to the constructor.
                registry: Any = ray.get_actor(REGISTRY)
                version, parameters = await registry.published.remote()
                if parameters:
                    await self._load(engine, version, await parameters[0])
                await engine.ready()
                self._prior = RetryingPrior(engine, settings.prior)
        return self._prior

    async def _load(self, engine: PriorEngine, version: int, state: dict[str, torch.Tensor]) -> None:
        assert self._llm is not None
        load_trained_parameters(self._llm.model, state)
        await engine.sync_weights(version)


def load_trained_parameters(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Load the parameters that a learner trains; the frozen ones stay as they are."""
    missing, unknown = model.load_state_dict(state, strict=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}  # tied parameters have one name here
    if unknown or trained & set(missing):
        raise ValueError(f"parameters do not fit: missing {sorted(trained & set(missing))}, unknown {unknown}")


class RemoteEngine:
    """A :class:`~priorzero.types.PriorEngine` that calls a :class:`PriorServer`. While Ray restarts it, it waits."""

    exclusive = False

    def __init__(self, server: Any, cluster: ClusterSettings) -> None:
        self.version = 0
        self._server = server
        self._cluster = cluster
        self._is_ready = False

    async def ready(self) -> None:
        started = time.monotonic()
        while not self._is_ready:
            remaining = self._cluster.start_timeout_s - (time.monotonic() - started)
            try:
                ready = self._server.ready.remote()
                version = await result_of(ready, timeout_s=max(1.0, remaining), process="the prior server")
                self.version, self._is_ready = max(self.version, version), True
            except ProcessError as error:
                if remaining < 1.0:
                    raise EngineError(str(error)) from error
                await asyncio.sleep(1.0)  # Ray is restarting it

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        reference, limit = self._server.priors.remote(list(requests)), self._cluster.timeout_s
        try:
            priors: list[ActionPrior] = await result_of(reference, timeout_s=limit, process="the prior server")
        except ProcessError:
            self._is_ready = False
            raise
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        self.version = max(self.version, *(prior.version for prior in priors))
        return priors

    # Nothing is to be done in the other methods, because the training loop monitors and calls the servers itself.

    async def check(self) -> None: ...

    async def suspend(self) -> None: ...

    async def sync_weights(self, version: int) -> None: ...

    async def clear_cache(self) -> None: ...

    def take_statistics(self) -> dict[str, float]:
        return {}

    async def close(self) -> None: ...
