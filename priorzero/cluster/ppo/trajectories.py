"""The training data of PPO: consecutive decisions of an episode, made from step records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from priorzero.settings import PPOSettings
from priorzero.types import StepRecord
from priorzero.world_model.returns import returns_to_go

if TYPE_CHECKING:  # a PPO learner imports this module and does not need LightZero
    from priorzero.world_model.segment import PriorZeroGameSegment


@dataclass(frozen=True)
class Trajectory:
    """Consecutive decisions of one episode, at least one. Their features are empty: the language model reads prompts.

    ``bootstrap_prompt`` is the prompt of the state after the last decision, whose value bootstraps the returns; None if
    the game ended.
    """

    records: tuple[StepRecord, ...]
    bootstrap_prompt: str | None


def trajectories_from(segments: Sequence[PriorZeroGameSegment]) -> list[Trajectory]:
    """One trajectory for each segment.

    A trajectory is a whole episode if ``replay.segment_length`` is at least ``env.max_episode_steps``. The state after
    the last decision of a truncated episode has no prompt. In this case the last decision is left out, and its own
    state bootstraps the returns.
    """
    trajectories = []
    for segment in segments:
        records = [dataclasses.replace(record, features=np.zeros(0, dtype=np.float32)) for record in segment.records]
        prompt = None
        if segment.padding:
            prompt = segment.padding[0].prompt
        elif not segment.terminated:
            prompt = records.pop().prompt
        if records:
            trajectories.append(Trajectory(tuple(records), prompt))
    return trajectories


def newest(trajectories: Sequence[Trajectory], *, limit: int) -> list[Trajectory]:
    """The last trajectories, with at most ``limit`` decisions (0: all). The oldest of them is shortened to fit."""
    kept: list[Trajectory] = []
    for trajectory in reversed(trajectories):
        room = limit - sum(len(t.records) for t in kept)
        if limit and len(trajectory.records) > room:
            if room:
                kept.append(Trajectory(trajectory.records[:room], trajectory.records[room].prompt))
            break
        kept.append(trajectory)
    return kept[::-1]


def scaled_rewards(records: Sequence[StepRecord], *, cfg: PPOSettings) -> np.ndarray:
    """The points that each decision gained, times ``ppo.reward_scale``, ``[n]``."""
    return cfg.reward_scale * np.array([record.reward for record in records], dtype=np.float64)


def credit_weights(records: Sequence[StepRecord], *, cfg: PPOSettings) -> np.ndarray:
    r"""Weight of each decision's advantage, ``[n]``.

    The actions were sampled from the search's policy :math:`\mu` (visit counts with a temperature; with ``go_explore``
    only among the actions that the strategy chose), but PPO learns the prior :math:`\pi`. ``ppo.credit=importance``
    gives the weight :math:`\min(1, \pi(a)/\mu(a))`, the truncated importance weight of V-trace (Espeholt et al. 2018,
    section 4.1): an action that is improbable under the prior has little weight. ``ppo.credit=none`` gives the weight
    1. Decisions without a prior of the source ``score`` have the weight 0.
    """
    weights = np.zeros(len(records))
    for n, record in enumerate(records):
        if record.prior is None or record.prior.source != "score":
            continue
        prior_prob = float(np.exp(np.float64(record.prior.logprobs[record.chosen])))
        weights[n] = 1.0 if cfg.credit == "none" else min(1.0, prior_prob / record.behaviour_prob)
    return weights


def generalised_advantages(rewards: np.ndarray, values: np.ndarray, *, discount: float, lam: float) -> np.ndarray:
    r"""Generalised advantage estimation (Schulman et al. 2016, eq. 16): advantages, ``[n]``.

    :math:`\hat A_t = \sum_l (\gamma\lambda)^l \delta_{t+l}` with
    :math:`\delta_t = r_t + \gamma V(s_{t+1}) - V(s_t)`. :math:`\hat A_t + V(s_t)` is the :math:`\lambda`-return.

    Args:
        rewards: rewards of n consecutive steps, ``[n]``.
        values: values of the states before each step and of the state after the last one, ``[n + 1]``. The last value
            is 0 if the episode ended.
        discount: :math:`\gamma`.
        lam: :math:`\lambda`; 1 gives returns minus values, 0 one-step errors.
    """
    deltas = rewards + discount * values[1:] - values[:-1]
    return returns_to_go(deltas, discount=discount * lam)
