"""Retries, a time limit and a counted fallback around any prior engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from loguru import logger

from priorzero.priors import uniform_prior
from priorzero.types import ActionPrior, PriorEngine, PriorRequest


@dataclass
class PriorStatistics:
    """What happened since the last ``take``."""

    requests: int = 0
    retries: int = 0
    timeouts: int = 0
    fallbacks: int = 0
    unparsed: int = 0
    latencies_s: list[float] = field(default_factory=list)

    def scalars(self) -> dict[str, float]:
        """Metrics under ``prior/``; rates are shares of the requests."""
        n = max(1, self.requests)
        latencies = self.latencies_s or [0.0]
        return {
            "prior/requests": self.requests,
            "prior/latency_mean_s": float(np.mean(latencies)),
            "prior/latency_max_s": float(np.max(latencies)),
            "prior/retries": self.retries,
            "prior/timeouts": self.timeouts,
            "prior/fallbacks": self.fallbacks,
            "prior/parse_rate": 1.0 - self.unparsed / n,
        }


class RobustPrior:
    """Asks an engine up to ``attempts`` times; when all fail, every valid action is made alike.

    Args:
        engine: what is asked.
        attempts: tries a batch.
        backoff_s: seconds before the second try, doubled for each further one.
        timeout_s: seconds a try may take for the whole batch.
    """

    def __init__(self, engine: PriorEngine, *, attempts: int, backoff_s: float, timeout_s: float) -> None:
        self.engine = engine
        self.attempts = attempts
        self.backoff_s = backoff_s
        self.timeout_s = timeout_s
        self.statistics = PriorStatistics()

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        """One prior per request, in order. Never raises for what an engine does wrong."""
        stats = self.statistics
        stats.requests += len(requests)
        for attempt in range(1, self.attempts + 1):
            started = time.perf_counter()
            try:
                priors = await asyncio.wait_for(self.engine.priors(requests), self.timeout_s)
                self._check(requests, priors)
            except TimeoutError:
                stats.timeouts += 1
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
        return [uniform_prior(len(request.valid_actions), version=self.engine.version) for request in requests]

    @staticmethod
    def _check(requests: Sequence[PriorRequest], priors: Sequence[ActionPrior]) -> None:
        if len(priors) != len(requests):
            raise ValueError(f"{len(priors)} priors for {len(requests)} requests")
        for request, prior in zip(requests, priors, strict=True):
            if prior.logprobs.shape != (len(request.valid_actions),):
                raise ValueError(f"prior of shape {prior.logprobs.shape} for {len(request.valid_actions)} actions")
            if not np.isfinite(prior.logprobs).all():
                raise ValueError("prior with log-probabilities that are not finite")

    def take_statistics(self) -> PriorStatistics:
        """The statistics since the last call."""
        taken, self.statistics = self.statistics, PriorStatistics()
        return taken
