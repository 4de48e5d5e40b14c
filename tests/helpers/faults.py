"""Fault injection: kills games, corrupts and delays replies of the LLM, fills the disk and puts NaN into batches, as
planned by a seed, while a run continues in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

import priorzero.runs.saver
from priorzero.envs import GameWorker
from priorzero.llm.engines import TransformersEngine
from priorzero.llm.fine_tuning import LLMLearner
from priorzero.policy import PriorZeroPolicy

ENGINE_FAULTS = ("engine raises", "engine is late", "engine gives NaN", "engine gives too few priors")

RATES = {
    "game killed": 0.02,
    **dict.fromkeys(ENGINE_FAULTS, 0.03),
    "batch poisoned": 0.03,
    "LLM sample poisoned": 0.05,
    "disk full": 0.3,
}


class FaultPlan:
    """Decides which faults occur.

    Args:
        seed: the same seed and the same calls give the same faults.
        rates: probability of each fault at each opportunity.
        delay_s: delay of a late reply of the engine, in seconds.

    Attributes:
        counts: how often each fault has occurred.
    """

    def __init__(self, seed: int, rates: dict[str, float], *, delay_s: float) -> None:
        self._rngs = {name: np.random.default_rng([seed, n]) for n, name in enumerate(sorted(rates))}
        self._rates = rates
        self._delay_s = delay_s
        self.counts: Counter[str] = Counter()

    def occurs(self, name: str) -> bool:
        """Decide whether the fault ``name`` occurs now, and count it."""
        occurs = bool(self._rngs[name].random() < self._rates[name])
        self.counts[name] += occurs
        return occurs

    @contextmanager
    def inject(self, monkeypatch) -> Iterator[FaultPlan]:
        """Within the block, patch the classes of the package so that they fail as planned."""
        with monkeypatch.context() as patch:
            self._patch_games(patch)
            self._patch_engine(patch)
            self._patch_learners(patch)
            self._patch_disk(patch)
            yield self

    def _patch_games(self, patch) -> None:
        step = GameWorker.step

        async def faulty_step(worker, action):
            if self.occurs("game killed"):
                os.kill(worker.pid, signal.SIGKILL)
            return await step(worker, action)

        patch.setattr(GameWorker, "step", faulty_step)

    def _patch_engine(self, patch) -> None:
        compute_priors = TransformersEngine.priors

        async def faulty_priors(engine, requests):
            fault = next(iter([name for name in ENGINE_FAULTS if self.occurs(name)]), None)
            if fault == "engine raises":
                raise RuntimeError("injected fault")
            if fault == "engine is late":
                await asyncio.sleep(self._delay_s)
            priors = await compute_priors(engine, requests)
            if fault == "engine gives NaN":
                return [dataclasses.replace(p, logprobs=np.full_like(p.logprobs, np.nan)) for p in priors]
            return priors[1:] if fault == "engine gives too few priors" else priors

        patch.setattr(TransformersEngine, "priors", faulty_priors)

    def _patch_learners(self, patch) -> None:
        learn_world_model, llm_gradient = PriorZeroPolicy.learn_world_model, LLMLearner._gradient

        def faulty_learn_world_model(policy, batch, *, train_iter):
            if self.occurs("batch poisoned"):
                batch.rewards.flat[0] = np.nan  # in place, so that the batch that is saved contains it
            return learn_world_model(policy, batch, train_iter=train_iter)

        def faulty_llm_gradient(learner, samples):
            if self.occurs("LLM sample poisoned"):
                samples = [dataclasses.replace(samples[0], advantage=float("inf")), *samples[1:]]
            return llm_gradient(learner, samples)

        patch.setattr(PriorZeroPolicy, "learn_world_model", faulty_learn_world_model)
        patch.setattr(LLMLearner, "_gradient", faulty_llm_gradient)

    def _patch_disk(self, patch) -> None:
        save_checkpoint = priorzero.runs.saver.save_checkpoint

        def faulty_save(folder, *, write, **arguments):
            def write_and_fail(temporary):
                write(temporary)
                raise OSError(errno.ENOSPC, "No space left on device")

            return save_checkpoint(folder, write=write_and_fail if self.occurs("disk full") else write, **arguments)

        patch.setattr(priorzero.runs.saver, "save_checkpoint", faulty_save)
