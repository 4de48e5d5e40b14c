"""Wraps any prior engine with a timeout, retries, a counted fallback and a limit on staleness."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from loguru import logger

from priorzero.llm.priors import uniform_prior
from priorzero.runtime.concurrency import ReadersWriterLock
from priorzero.runtime.timeline import Timeline
from priorzero.settings import PriorSettings
from priorzero.types import ActionPrior, EngineError, PriorEngine, PriorRequest


@dataclass
class PriorStatistics:
    """Counters since the last :meth:`RetryingPrior.take_statistics`."""

    requests: int = 0
    retries: int = 0
    timeouts: int = 0
    fallbacks: int = 0
    unparsed: int = 0
    outdated: int = 0
    latencies_s: list[float] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)

    def scalars(self) -> dict[str, float]:
        """Metrics under ``prior/``; rates are relative to the requests."""
        n = max(1, self.requests)
        latencies = self.latencies_s or [0.0]
        staleness = self.staleness or [0]
        return {
            "prior/requests": self.requests,
            "prior/latency_mean_s": float(np.mean(latencies)),
            "prior/latency_p50_s": float(np.percentile(latencies, 50)),
            "prior/latency_p95_s": float(np.percentile(latencies, 95)),
            "prior/latency_max_s": float(np.max(latencies)),
            "prior/retries": self.retries,
            "prior/timeouts": self.timeouts,
            "prior/fallbacks": self.fallbacks,
            "prior/parse_rate": 1.0 - self.unparsed / n,
            "prior/staleness_mean": float(np.mean(staleness)),
            "prior/staleness_max": float(np.max(staleness)),
            "prior/outdated": self.outdated,
        }


class RetryingPrior:
    """Requests priors from an engine with up to ``attempts`` attempts; if all fail, the priors are uniform.

    If all attempts time out, the engine's ``check`` tests whether it hangs. If it does, the next request restarts it.

    Priors from parameters that are more than ``max_staleness`` updates older than the learner's are requested again.
    No request runs during a weight sync: requests that have started are finished first, and later ones wait.

    Args:
        engine: the engine.
        cfg: ``attempts``, ``backoff_s`` and ``timeout_s``, which does not include the start of the engine.
        sync_every: LLM updates between two weight syncs; an exclusive engine is synchronised after every update.
        max_staleness: at least ``sync_every - 1``.
        learner_version: returns the number of updates of the learner; None for the engine's own version.
        timeline: records the spans of requests and weight syncs, without the time that they wait for each other.
    """

    def __init__(
        self,
        engine: PriorEngine,
        cfg: PriorSettings,
        *,
        sync_every: int = 1,
        max_staleness: int = 1,
        learner_version: Callable[[], int] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        assert max_staleness >= sync_every - 1
        self.engine = engine
        self.cfg = cfg
        self.sync_every = sync_every
        self.max_staleness = max_staleness
        self.learner_version = learner_version or (lambda: engine.version)
        self.timeline = timeline or Timeline()
        self.statistics = PriorStatistics()
        self._lock = ReadersWriterLock()
        self._sync_error: EngineError | None = None  # raised by every request after a failed weight sync

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        """One prior for each request, in order. Raises EngineError if the engine cannot be used any more."""
        while True:
            if self._sync_error is not None:
                raise self._sync_error
            async with self._lock.shared():
                priors = await self._request(requests)
            staleness = [self.learner_version() - prior.version for prior in priors]
            if max(staleness, default=0) <= self.max_staleness:
                self.statistics.staleness += staleness
                return priors
            self.statistics.outdated += len(requests)
            await asyncio.sleep(0)  # let the weight sync acquire the lock

    async def learn(self, update: Callable[[], Awaitable[int]]) -> None:
        """Run ``update``, which returns the learner's new version, and a weight sync of the engine if one is due."""
        if self.engine.exclusive:
            async with self._lock.exclusive():
                await self.engine.suspend()
                await self._sync(await update())
            return
        version = await update()
        if version - self.engine.version >= self.sync_every:
            async with self._lock.exclusive():
                await self._sync(version)

    async def _sync(self, version: int) -> None:
        with self.timeline.span("sync"):
            try:
                await self.engine.sync_weights(version)
            except EngineError as error:
                self._sync_error = error
                raise

    async def _request(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        stats, attempts, timeout_s = self.statistics, self.cfg.attempts, self.cfg.timeout_s
        stats.requests += len(requests)
        timeouts = 0
        for attempt in range(1, attempts + 1):
            await self.engine.ready()
            started = time.perf_counter()
            try:
                with self.timeline.span("LLM prior"):
                    priors = await asyncio.wait_for(self.engine.priors(requests), timeout_s)
                self._check(requests, priors)
            except EngineError:
                raise
            except TimeoutError:
                stats.timeouts += 1
                timeouts += 1
                problem = f"took longer than prior.timeout_s={timeout_s:g}"
            except Exception as error:  # whatever the failure is, the search needs a prior
                problem = f"failed: {type(error).__name__}: {error}"
            else:
                stats.latencies_s.append(time.perf_counter() - started)
                stats.unparsed += sum(not prior.parsed for prior in priors)
                return priors
            if attempt < attempts:
                stats.retries += 1
                logger.warning(f"attempt {attempt} of {attempts} to compute priors {problem}; retrying")
                await asyncio.sleep(self.cfg.backoff_s * 2 ** (attempt - 1))
        stats.fallbacks += len(requests)
        logger.error(f"the last attempt to compute priors {problem}; {len(requests)} searches use a uniform prior")
        if timeouts == attempts:  # the engine may hang
            await self.engine.check()
        return [uniform_prior(len(request.valid_actions), version=self.learner_version()) for request in requests]

    @staticmethod
    def _check(requests: Sequence[PriorRequest], priors: Sequence[ActionPrior]) -> None:
        if len(priors) != len(requests):
            raise ValueError(f"{len(priors)} priors for {len(requests)} requests")
        for request, prior in zip(requests, priors, strict=True):
            if prior.logprobs.shape != (len(request.valid_actions),):
                raise ValueError(f"a prior of shape {prior.logprobs.shape} for {len(request.valid_actions)} actions")
            if not np.isfinite(prior.logprobs).all():
                raise ValueError("a prior with non-finite log-probabilities")

    def take_statistics(self) -> dict[str, float]:
        """Metrics of this wrapper and of the engine since the last call."""
        statistics, self.statistics = self.statistics, PriorStatistics()
        return {**statistics.scalars(), **self.engine.take_statistics()}
