"""Game segments: step records and the arrays that LightZero's buffer reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from easydict import EasyDict

from priorzero.types import Plain, StepRecord
from priorzero.world_model.imports import lightzero_imports
from priorzero.world_model.records import RecordTable
from priorzero.world_model.returns import returns_to_go

with lightzero_imports():
    from lzero.mcts.buffer.game_segment import GameSegment


class PriorZeroGameSegment(GameSegment):
    """Up to ``game_segment_length`` decisions of one episode, and the padding that their targets need.

    The segment has n decisions, at which sequences may begin. The padding is the p decisions that follow them:
    ``num_unroll_steps + td_steps``, or fewer where the episode ends. All arrays are computed from the step records and
    have the same length. LightZero's own ``pad_over`` extends only some of the arrays, which breaks sampling.

    If the game ended the episode, the arrays have one more step: from the terminal state to itself, with zero reward
    and without a policy target. It teaches the world model that terminal states are absorbing and have zero value.
    Otherwise a search would give a lost game the value of the state before. A truncated episode has no such step, and
    its value targets do not bootstrap beyond its last decision.

    Args:
        records: the n decisions of the segment, at least one.
        padding: the p decisions of the padding.
        final_features: features of the episode's last state, ``[F]``, if the last of these decisions led there.
        terminated: this state is terminal: the game ended the episode.
        config: LightZero's policy configuration.

    Attributes (besides LightZero's):
        num_steps: n + p.
        returns: discounted return of each of the n decisions in scaled rewards, ``[n]``, up to the end of the padding.
            If the episode continues there, the return bootstraps with the last decision's searched value.
    """

    def __init__(
        self,
        records: Sequence[StepRecord],
        padding: Sequence[StepRecord],
        *,
        final_features: np.ndarray | None,
        terminated: bool,
        config: EasyDict,
    ) -> None:
        super().__init__(action_space=None, game_segment_length=config.game_segment_length, config=config)
        self.records, self.padding = list(records), list(padding)
        steps = [*records, *padding]
        features = [step.features for step in steps]
        if final_features is not None:
            features.append(final_features)
        self.num_steps = len(steps)
        self.terminated = terminated
        self.obs_segment = np.stack(features)
        self.action_segment = np.array([step.action_index for step in steps], dtype=np.int64)
        points = np.array([step.reward + step.shaping for step in steps], dtype=np.float32)
        self.reward_segment = points * np.float32(config.reward_scale)
        self.root_value_segment = np.array([step.root_value for step in steps], dtype=np.float32)
        self.child_visit_segment = np.zeros((len(steps), config.model.action_space_size), dtype=np.float32)
        self.action_mask_segment = np.zeros((len(steps), config.model.action_space_size), dtype=np.int8)
        for t, step in enumerate(steps):
            self.child_visit_segment[t, step.action_indices] = step.visit_probs()
            self.action_mask_segment[t, step.action_indices] = 1
        self.to_play_segment = np.full(len(steps), -1)
        self.timestep_segment = np.array([step.step for step in steps], dtype=np.int64)
        self.returns = self._returns(steps[-1], discount=config.discount_factor)
        if terminated:
            self._append_absorbing_step()

    def _returns(self, last: StepRecord, *, discount: float) -> np.ndarray:
        """Returns of the segment's decisions, ``[n]``, given the last decision of the padding."""
        if last.done:
            returns = returns_to_go(self.reward_segment, discount=discount)
        else:  # the searched value of the last decision includes its own reward
            value, rewards = last.root_value, self.reward_segment[:-1]
            returns = np.append(returns_to_go(rewards, discount=discount, bootstrap_value=value), value)
        return returns[: len(self.records)]

    def _append_absorbing_step(self) -> None:
        """Append a step from the terminal state to itself to all arrays except the observations."""
        last = {"action": self.action_segment[-1], "to_play": -1, "timestep": self.timestep_segment[-1] + 1}
        for name in ("action", "reward", "root_value", "child_visit", "action_mask", "to_play", "timestep"):
            array = getattr(self, f"{name}_segment")
            setattr(self, f"{name}_segment", np.append(array, np.full_like(array[-1:], last.get(name, 0)), axis=0))

    def state_dict(self, table: RecordTable) -> Plain:
        """The segment as plain data. Its step records are added to ``table``."""
        final = self.obs_segment[self.num_steps] if len(self.obs_segment) > self.num_steps else None
        return {
            "records": [table.number(record) for record in self.records],
            "padding": [table.number(record) for record in self.padding],
            "final_features": None if final is None else torch.from_numpy(final.copy()),
            "terminated": self.terminated,
        }

    @classmethod
    def from_state_dict(cls, state: Plain, records: Sequence[StepRecord], *, config: EasyDict) -> PriorZeroGameSegment:
        """The segment of a :meth:`state_dict`; ``records`` are those of the table, by number."""
        final = state["final_features"]
        return cls(
            [records[n] for n in state["records"]],
            [records[n] for n in state["padding"]],
            final_features=None if final is None else final.numpy(),
            terminated=state["terminated"],
            config=config,
        )


class SegmentWriter:
    """Cuts the decisions of one environment into segments, in order. Each decision is in exactly one segment."""

    def __init__(self, config: EasyDict) -> None:
        self._config = config
        self._length = config.game_segment_length
        self._padding = config.num_unroll_steps + config.td_steps
        self._pending: list[StepRecord] = []

    @property
    def pending(self) -> int:
        """Number of decisions that are not in a segment yet."""
        return len(self._pending)

    def state_dict(self, table: RecordTable) -> list[int]:
        """The table's numbers of the pending decisions, which are added to it."""
        return [table.number(record) for record in self._pending]

    def load_state_dict(self, state: Sequence[int], records: Sequence[StepRecord]) -> None:
        """Load the result of :meth:`state_dict`; ``records`` are those of the table, by number."""
        self._pending = [records[n] for n in state]

    def add(
        self, record: StepRecord, *, next_features: np.ndarray, truncated: bool = False
    ) -> list[PriorZeroGameSegment]:
        """Add the next decision; returns the segments that are complete now.

        Args:
            next_features: features of the state after it, ``[F]``; used if the episode ends there.
            truncated: the limit of moves ended the episode, not the game.
        """
        self._pending.append(record)
        if not record.done:
            if len(self._pending) < self._length + self._padding:
                return []
            return [self._cut(final_features=None, terminated=False)]
        return self.flush(final_features=next_features, terminated=not truncated)

    def flush(self, *, final_features: np.ndarray, terminated: bool = False) -> list[PriorZeroGameSegment]:
        """Cut all pending decisions into segments; the arguments are those of a segment."""
        segments = []
        while self._pending:
            segments.append(self._cut(final_features=final_features, terminated=terminated))
        return segments

    def _cut(self, *, final_features: np.ndarray | None, terminated: bool) -> PriorZeroGameSegment:
        records = self._pending[: self._length]
        padding = self._pending[self._length : self._length + self._padding]
        reaches_end = len(records) + len(padding) == len(self._pending)
        self._pending = self._pending[self._length :]
        return PriorZeroGameSegment(
            records,
            padding,
            final_features=final_features if reaches_end else None,
            terminated=terminated and reaches_end,
            config=self._config,
        )
