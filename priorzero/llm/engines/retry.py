"""Retries, a time limit, a counted fallback and a limit of staleness around any prior engine."""

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
from priorzero.types import ActionPrior, EngineError, PriorEngine, PriorRequest


@dataclass
class PriorStatistics:
    """What happened since the last ``take``."""

    requests: int = 0
    retries: int = 0
    timeouts: int = 0
    fallbacks: int = 0
    unparsed: int = 0
    outdated: int = 0
    latencies_s: list[float] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)

    def scalars(self) -> dict[str, float]:
        """Metrics under ``prior/``; rates are shares of the requests."""
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
    """Asks an engine up to ``attempts`` times; when all fail, every valid action is made alike.

    When all were too late, the engine is to find out whether it hangs: then the next question starts it again.

    An answer that comes from parameters more than ``max_staleness`` updates behind the learner's is asked for again.
    While the engine takes over new parameters nobody asks; who asked before is waited for.

    Args:
        engine: what is asked.
        attempts: tries a batch.
        backoff_s: seconds before the second try, doubled for each further one.
        timeout_s: seconds a try may take for the whole batch; starting the engine does not count.
        sync_every: LLM updates between two takeovers of the parameters; an exclusive engine has one after every update.
        max_staleness: at least ``sync_every - 1``.
        learner_version: how many updates the learner has made.
        timeline: takes note of questions and takeovers, without the time that they wait for one another.
    """

    def __init__(
        self,
        engine: PriorEngine,
        *,
        attempts: int,
        backoff_s: float,
        timeout_s: float,
        sync_every: int = 1,
        max_staleness: int = 1,
        learner_version: Callable[[], int] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        assert max_staleness >= sync_every - 1
        self.engine = engine
        self.attempts = attempts
        self.backoff_s = backoff_s
        self.timeout_s = timeout_s
        self.sync_every = sync_every
        self.max_staleness = max_staleness
        self.learner_version = learner_version or (lambda: engine.version)
        self.timeline = timeline or Timeline()
        self.statistics = PriorStatistics()
        self._lock = ReadersWriterLock()
        self._lost: EngineError | None = None  # why a takeover failed; whoever asks is told

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        """One prior per request, in order. An engine's errors are retried and then answered for with a uniform prior.

        Raises:
            EngineError: the engine is lost.
        """
        while True:
            if self._lost is not None:
                raise self._lost
            async with self._lock.shared():
                priors = await self._ask(requests)
            staleness = [self.learner_version() - prior.version for prior in priors]
            if max(staleness, default=0) <= self.max_staleness:
                self.statistics.staleness += staleness
                return priors
            self.statistics.outdated += len(requests)
            await asyncio.sleep(0)  # let the learner acquire the lock

    async def learn(self, update: Callable[[], Awaitable[int]]) -> None:
        """Run an update of the LLM and let the engine take over its result when that is due.

        Args:
            update: one learning step; returns the learner's version afterwards.
        """
        if self.engine.exclusive:
            async with self._lock.exclusive():
                await self.engine.suspend()
                await self._take_over(await update())
            return
        version = await update()
        if version - self.engine.version >= self.sync_every:
            async with self._lock.exclusive():
                await self._take_over(version)

    async def _take_over(self, version: int) -> None:
        with self.timeline.span("sync"):
            try:
                await self.engine.sync_weights(version)
            except EngineError as error:
                self._lost = error
                raise

    async def _ask(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        stats = self.statistics
        stats.requests += len(requests)
        late = 0
        for attempt in range(1, self.attempts + 1):
            await self.engine.ready()
            started = time.perf_counter()
            try:
                with self.timeline.span("LLM prior"):
                    priors = await asyncio.wait_for(self.engine.priors(requests), self.timeout_s)
                self._check(requests, priors)
            except EngineError:
                raise
            except TimeoutError:
                stats.timeouts += 1
                late += 1
                problem = f"took longer than prior.timeout_s={self.timeout_s:g}"
            except Exception as error:  # an engine may fail in any way; the search must go on
                problem = f"failed: {type(error).__name__}: {error}"
            else:
                stats.latencies_s.append(time.perf_counter() - started)
                stats.unparsed += sum(not prior.parsed for prior in priors)
                return priors
            if attempt < self.attempts:
                stats.retries += 1
                logger.warning(f"LLM prior, try {attempt} of {self.attempts}, {problem}; trying again")
                await asyncio.sleep(self.backoff_s * 2 ** (attempt - 1))
        stats.fallbacks += len(requests)
        logger.error(f"LLM prior {problem}; {len(requests)} searches go on with a uniform prior")
        if late == self.attempts:  # it may hang, and would go on to do so
            await self.engine.check()
        return [uniform_prior(len(request.valid_actions), version=self.learner_version()) for request in requests]

    @staticmethod
    def _check(requests: Sequence[PriorRequest], priors: Sequence[ActionPrior]) -> None:
        if len(priors) != len(requests):
            raise ValueError(f"{len(priors)} priors for {len(requests)} requests")
        for request, prior in zip(requests, priors, strict=True):
            if prior.logprobs.shape != (len(request.valid_actions),):
                raise ValueError(f"prior of shape {prior.logprobs.shape} for {len(request.valid_actions)} actions")
            if not np.isfinite(prior.logprobs).all():
                raise ValueError("prior with log-probabilities that are not finite")

    def take_statistics(self) -> dict[str, float]:
        """Metrics of this wrapper and of the engine since the last call."""
        taken, self.statistics = self.statistics, PriorStatistics()
        return {**taken.scalars(), **self.engine.take_statistics()}
