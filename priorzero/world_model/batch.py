"""A batch of sequences from replay, with a name for each array."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from priorzero.types import Plain, StepRecord
from priorzero.world_model.segment import PriorZeroGameSegment


@dataclass(frozen=True)
class SampledSequences:
    """Where the B sequences of a batch begin: at ``segments[b].records[positions[b]]``."""

    segments: list[PriorZeroGameSegment]
    positions: np.ndarray  # [B]

    def records(self) -> list[StepRecord]:
        """The first decision of each sequence."""
        return [segment.records[t] for segment, t in zip(self.segments, self.positions, strict=True)]

    def returns(self) -> np.ndarray:
        """The return of each of these decisions, ``[B]``."""
        return np.array([segment.returns[t] for segment, t in zip(self.segments, self.positions, strict=True)])


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
        make_times: not used, ``[B]``.
        timesteps: index of each step in its episode, ``[B, U]``.
        rewards: ``[B, U + 1]``.
        value_targets: ``[B, U + 1]``.
        policy_targets: visit counts as distributions, ``[B, U + 1, A]``; zeros beyond the end of the episode.
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
