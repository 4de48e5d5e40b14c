"""Faults on purpose: a seeded plan that kills games, garbles and delays the LLM's answers, fills the disk and poisons
what is learned from, while a run goes on in this process."""

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

ENGINE_FAULTS = ("engine raises", "engine is late", "engine answers garbage", "engine answers too little")

RATES = {
    "game killed": 0.02,
    **dict.fromkeys(ENGINE_FAULTS, 0.03),
    "batch poisoned": 0.03,
    "LLM sample poisoned": 0.05,
    "disk full": 0.3,
}


class FaultPlan:
    """Which faults happen, drawn from one seed.

    Args:
        seed: the same seed and the same calls give the same faults.
        rates: probability of each fault at each occasion.
        delay_s: how late a late answer is.

    Attributes:
        done: how often each fault has happened.
    """

    def __init__(self, seed: int, rates: dict[str, float], *, delay_s: float) -> None:
        self._rngs = {name: np.random.default_rng([seed, n]) for n, name in enumerate(sorted(rates))}
        self._rates = rates
        self._delay_s = delay_s
        self.done: Counter[str] = Counter()

    def strikes(self, name: str) -> bool:
        struck = bool(self._rngs[name].random() < self._rates[name])
        self.done[name] += struck
        return struck

    @contextmanager
    def at_work(self, monkeypatch) -> Iterator[FaultPlan]:
        """Until the end of the block, the package's own classes fail as planned."""
        step, priors = GameWorker.step, TransformersEngine.priors
        learn_world_model, llm_step = PriorZeroPolicy.learn_world_model, LLMLearner._gradient
        save = priorzero.runs.saver.save_checkpoint

        async def step_or_die(worker, action):
            if self.strikes("game killed"):
                os.kill(worker.pid, signal.SIGKILL)
            return await step(worker, action)

        async def priors_or_not(engine, requests):
            struck = [name for name in ENGINE_FAULTS if self.strikes(name)][:1]
            if struck == ["engine raises"]:
                raise RuntimeError("made to fail")
            if struck == ["engine is late"]:
                await asyncio.sleep(self._delay_s)
            answers = await priors(engine, requests)
            if struck == ["engine answers garbage"]:
                return [dataclasses.replace(a, logprobs=np.full_like(a.logprobs, np.nan)) for a in answers]
            return answers[1:] if struck == ["engine answers too little"] else answers

        def learn_or_not(policy, batch, *, train_iter):
            if self.strikes("batch poisoned"):
                rewards = np.array(batch.rewards, dtype=np.float32)
                rewards.flat[0] = np.nan
                batch = dataclasses.replace(batch, rewards=rewards)
            return learn_world_model(policy, batch, train_iter=train_iter)

        def llm_step_or_not(learner, samples):
            if self.strikes("LLM sample poisoned"):
                samples = [dataclasses.replace(samples[0], advantage=float("inf")), *samples[1:]]
            return llm_step(learner, samples)

        def save_or_not(folder, *, write, about):
            def write_half(aside):
                write(aside)
                raise OSError(errno.ENOSPC, "No space left on device")

            return save(folder, write=write_half if self.strikes("disk full") else write, about=about)

        with monkeypatch.context() as patch:
            patch.setattr(GameWorker, "step", step_or_die)
            patch.setattr(TransformersEngine, "priors", priors_or_not)
            patch.setattr(PriorZeroPolicy, "learn_world_model", learn_or_not)
            patch.setattr(LLMLearner, "_gradient", llm_step_or_not)
            patch.setattr(priorzero.runs.saver, "save_checkpoint", save_or_not)
            yield self
