"""What PPO learns from: consecutive decisions of an episode, made from the step records that all learners share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from priorzero.settings import PPOSettings
from priorzero.types import StepRecord
from priorzero.world_model.segment import PriorZeroGameSegment


@dataclass(frozen=True)
class Trajectory:
    """Consecutive decisions of one episode.

    Attributes:
        records: the decisions, at least one; their features are left out, since the language model reads prompts.
        bootstrap_prompt: of the state after the last of them, whose value stands for what came then; None where the
            game had ended.
    """

    records: tuple[StepRecord, ...]
    bootstrap_prompt: str | None


def trajectories_from(segments: Sequence[PriorZeroGameSegment]) -> list[Trajectory]:
    """A trajectory a segment; whole episodes where ``replay.segment_length`` is at least ``env.max_episode_steps``.

    Where an episode was cut, by the move limit or because its game failed, the state after its last decision has no
    prompt: that decision's own state takes its place and is not learned from.
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
    """The last trajectories, with ``limit`` decisions at most (0: all); of the first of them the beginning is kept."""
    kept: list[Trajectory] = []
    for trajectory in reversed(trajectories):
        room = limit - sum(len(t.records) for t in kept)
        if limit and len(trajectory.records) > room:
            if room:
                kept.append(Trajectory(trajectory.records[:room], trajectory.records[room].prompt))
            break
        kept.append(trajectory)
    return kept[::-1]


def turn_rewards(records: Sequence[StepRecord], *, cfg: PPOSettings) -> np.ndarray:
    """The reward of each decision, ``[n]``: the change of the game's score and what the settings add to it.

    Args:
        records: the decisions.
        cfg: the ``ppo`` group of the settings: ``reward_scale``, ``shaping_weight``, ``step_penalty``.
    """
    points = np.array([record.reward for record in records], dtype=np.float64)
    return cfg.reward_scale * points


def credit_weights(records: Sequence[StepRecord], *, cfg: PPOSettings) -> np.ndarray:
    r"""How much of a decision's advantage is the LLM's, ``[n]``.

    The search chose the command, from :math:`\mu` (its visits at a temperature); the LLM had proposed it with
    :math:`\pi`. ``ppo.credit=importance`` weighs the advantage with :math:`\min(c, \pi(a)/\mu(a))`, the truncated
    importance weight of V-trace (Espeholt et al. 2018, section 4.1), which makes what the search has played an estimate
    for what the LLM would have played: a command that the LLM held to be hopeless is no merit of its, nor its fault.
    ``none`` gives it all of it. Decisions without a ``score`` prior get 0.

    Args:
        records: the decisions.
        cfg: the ``ppo`` group of the settings: ``credit``, ``importance_cap``.
    """
    weights = np.zeros(len(records))
    for n, record in enumerate(records):
        if record.prior is None or record.prior.source != "score":
            continue
        if cfg.credit == "none":
            weights[n] = 1.0
        else:
            proposed = float(np.exp(np.float64(record.prior.logprobs[record.chosen])))
            weights[n] = min(1.0, proposed / record.behaviour_prob)
    return weights
