"""PPO learners for tests: made-up trajectories, and learners that are connected without Ray."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from priorzero.cluster.ppo.torch_engine import LearnerProcess
from priorzero.cluster.ppo.trajectories import Trajectory
from priorzero.settings import Settings
from priorzero.types import ActionPrior
from tests.helpers.records import record


def make_trajectories(n: int, *, version: int = 0) -> list[Trajectory]:
    """Episodes of two random decisions."""
    rng = np.random.default_rng(n)
    trajectories = []
    for e in range(n):
        records = []
        for t in range(2):
            logits = rng.normal(size=4)
            prior = ActionPrior((logits - np.log(np.exp(logits).sum())).astype(np.float32), "score", version)
            made = dataclasses.replace(record(7 * e + t, chosen=int(rng.integers(4))), prior=prior)
            records.append(dataclasses.replace(made, reward=float(rng.normal()), done=t == 1, behaviour_prob=0.5))
        trajectories.append(Trajectory(tuple(records), None))
    return trajectories


def train_in_group(settings: Settings, rank: int, folder: Path, *, restore: bool):
    """Two PPO steps of one of ``cluster.num_learners`` learners; all of them must call this at the same time.

    Args:
        settings: all settings.
        rank: index of the learner.
        folder: a new folder, in which the learners meet.
        restore: save the state after the first step, and continue with a new learner that loads it.

    Returns:
        The results of the steps, and the parameters of the actor as arrays (none except for rank 0).
    """

    def connect(name):
        process = LearnerProcess(settings, rank, settings.cluster.num_learners)
        process.join(f"file://{folder / name}")
        return process

    folder.mkdir(exist_ok=True)
    process = connect("first")
    results = [process.step(make_trajectories(5), 1)]
    if restore:
        process.save(folder / "state")
        process.learner.group.close()
        process = connect("second")
        process.load(folder / "state")
        results.append(process.step(make_trajectories(5), 1))  # the same step again
    results.append(process.step(make_trajectories(5, version=1), 2))
    state, version = process.actor()
    process.export(folder / "exported")
    process.learner.group.close()
    assert version == 2
    return results, {name: tensor.numpy() for name, tensor in (state or {}).items()}
