"""A batch of sequences from replay, with a name for each array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from priorzero.types import Plain, StepRecord
from priorzero.world_model.segment import PriorZeroGameSegment


@dataclass(frozen=True)
class SampledDecisions:
    """n decisions of the replay buffer, in runs of consecutive decisions of an episode, and decisions of best episodes.

    Attributes:
        records: the decisions.
        returns: the return of each, ``[n]``; 0 for those of best episodes.
        weights: importance weight of each, ``[n]``; all are 1 if ``run_length`` is 1.
        num_imitated: the last ``num_imitated`` decisions are those of best episodes. SFT imitates the actions that were
            taken in them, and RFT does not use them.
    """

    records: list[StepRecord]
    returns: np.ndarray
    weights: np.ndarray
    num_imitated: int = 0

    def with_imitated(self, records: Sequence[StepRecord]) -> SampledDecisions:
        """These decisions of the replay buffer, and then those of best episodes, each with the weight 1."""
        return SampledDecisions(
            [*self.records, *records],
            np.append(self.returns, np.zeros(len(records))),
            np.append(self.weights, np.ones(len(records))),
            num_imitated=len(records),
        )


@dataclass(frozen=True)
class SampledSequences:
    """Where the B sequences of a batch begin: at ``segments[b].records[positions[b]]``.

    Attributes:
        segments: B of them.
        positions: ``[B]``.
        probs: for each segment, the probability with which each of its n decisions is drawn, ``[n]``.
        offsets: uniform random numbers in [0, 1) that place the runs of :meth:`decisions`, ``[B]``.
    """

    segments: list[PriorZeroGameSegment]
    positions: np.ndarray
    probs: list[np.ndarray]
    offsets: np.ndarray

    def records(self) -> list[StepRecord]:
        """The first decision of each sequence."""
        return [segment.records[t] for segment, t in zip(self.segments, self.positions, strict=True)]

    def returns(self) -> np.ndarray:
        """The return of each of these decisions, ``[B]``."""
        return np.array([segment.returns[t] for segment, t in zip(self.segments, self.positions, strict=True)])

    def decisions(self, count: int, *, run_length: int) -> SampledDecisions:
        """About ``count`` decisions in runs of at most ``run_length`` consecutive ones, for the LLM.

        Each run contains the first decision of one sequence, with equal probability at each place of the run. A run
        that would begin before the segment or end after it is shifted, so that it lies inside. Therefore a decision is
        not drawn in proportion to its priority. The importance weights correct this: the expected sum of the weights of
        each decision is proportional to its priority. In segments with fewer decisions, runs are shorter.
        """
        if count == 0:
            return SampledDecisions([], np.zeros(0), np.zeros(0))
        num_runs = -(-count // run_length)
        records, returns, weights = [], [], []
        for b, own in enumerate(np.array_split(np.arange(count), num_runs)):
            segment = self.segments[b]
            size = len(segment.records)
            length = min(len(own), size)
            shift = int(self.offsets[b] * length)
            start = int(np.clip(self.positions[b] - shift, 0, size - length))
            run = slice(start, start + length)
            records += segment.records[run]
            returns.append(np.asarray(segment.returns[:size])[run])
            weights.append(len(own) * (self.probs[b] / inclusion_probs(self.probs[b], run_length=length))[run])
        return SampledDecisions(records, np.concatenate(returns), np.concatenate(weights))


@dataclass(frozen=True)
class ReplayBatch:
    """B sequences of U steps. The fields are in the order of LightZero's ``current_batch``, then ``target_batch``.

    Attributes:
        features: features of U + 1 observations, ``[B, (U + 1) * F]``.
        actions: indices of the actions taken, ``[B, U]``.
        bootstrap_actions: the actions ``td_steps`` later, where the value targets bootstrap, ``[B, U]``.
        mask: 1 for the steps that are learned from, 0 for padding, ``[B, U + 1]``.
        indices: number of each sequence's first decision, counted over all decisions ever stored, ``[B]``.
        weights: importance weights of the sequences, ``[B]``.
        make_times: LightZero requires it and does not use it, ``[B]``.
        timesteps: index of each step in its episode, ``[B, U]``.
        rewards: ``[B, U + 1]``.
        value_targets: ``[B, U + 1]``.
        policy_targets: visit counts as distributions, ``[B, U + 1, A]``; zeros beyond the end of the episode.
        sequences: where the sequences begin.
    """

    features: np.ndarray
    actions: np.ndarray
    bootstrap_actions: np.ndarray
    mask: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    make_times: np.ndarray
    timesteps: np.ndarray
    rewards: np.ndarray
    value_targets: np.ndarray
    policy_targets: np.ndarray
    sequences: SampledSequences

    def to_lightzero(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """``current_batch`` and ``target_batch``, as LightZero's learning step takes them."""
        current = [
            *(self.features, self.actions, self.bootstrap_actions, self.mask),
            *(self.indices, self.weights, self.make_times, self.timesteps),
        ]
        return current, [self.rewards, self.value_targets, self.policy_targets]

    def arrays(self) -> Plain:
        """All arrays as plain data, for a file: ``{"current": [tensors], "target": [tensors]}``."""
        current, target = self.to_lightzero()
        parts = {"current": current, "target": target}
        return {name: [torch.as_tensor(np.asarray(array)) for array in part] for name, part in parts.items()}


def inclusion_probs(probs: np.ndarray, *, run_length: int) -> np.ndarray:
    """The probability that a run contains each decision of a segment, ``[n]``; see :meth:`SampledSequences.decisions`.

    Args:
        probs: the probability that each decision is drawn, ``[n]``.
        run_length: length of the run, at most n.
    """
    last_start = len(probs) - run_length
    starts = np.zeros(last_start + 1)
    for shift in range(run_length):
        np.add.at(starts, np.clip(np.arange(len(probs)) - shift, 0, last_start), probs / run_length)
    return np.convolve(starts, np.ones(run_length))
