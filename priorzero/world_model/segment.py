"""Game segments: step records beside the arrays that LightZero's buffer reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from priorzero.runtime.quiet import quiet
from priorzero.types import Plain, StepRecord
from priorzero.world_model.records import RecordTable
from priorzero.world_model.returns import returns_to_go

with quiet():
    from lzero.mcts.buffer.game_segment import GameSegment


class PriorZeroGameSegment(GameSegment):
    """Up to ``game_segment_length`` decisions of one episode, and the padding that their targets reach into.

    All arrays are made at once from the step records, so they have one length: ``n`` decisions of the segment and ``p``
    of padding, the decisions that follow it (``p = num_unroll_steps + td_steps``, fewer where the episode ends).
    LightZero's own ``pad_over`` lengthens some arrays and not others, which breaks sampling.

    Attributes (beside LightZero's):
        records: the ``n`` step records that can be sampled.
        padding: the ``p`` step records behind them.
        returns: discounted sum of scaled rewards from each of them on, ``[n]``, to the end of the padding and
            bootstrapped with the searched value there if the episode goes on.

    Where the game itself ended the episode, one more step follows in the arrays: from the last state to itself, without
    reward and without a policy target. It teaches the world model that nothing is to be had there; else a search takes
    a lost game to be worth as much as the state before. An episode that is cut (by the move limit, or because its game
    failed) has no such step, but LightZero takes what lies beyond its last decision as worth nothing.
    """

    def __init__(
        self,
        records: Sequence[StepRecord],
        padding: Sequence[StepRecord],
        *,
        final_features: np.ndarray | None,
        is_over: bool,
        config: Any,
    ) -> None:
        """
        Args:
            records: the decisions of the segment, at least one.
            padding: the decisions right after them in the same episode.
            final_features: features of the last state of the episode if it ended with the last of these decisions,
                else None.
            is_over: that state is the game's own end.
            config: LightZero's policy configuration.
        """
        super().__init__(action_space=None, game_segment_length=config.game_segment_length, config=config)
        self.records, self.padding = list(records), list(padding)
        steps = [*records, *padding]
        size = config.model.action_space_size
        features = [step.features for step in steps]
        if final_features is not None:
            features.append(final_features)
        self.num_steps = len(steps)
        self.is_over = is_over
        self.obs_segment = np.stack(features)
        self.action_segment = np.array([step.action_index for step in steps], dtype=np.int64)
        points = np.array([step.reward + step.shaping for step in steps], dtype=np.float32)
        self.reward_segment = points * np.float32(config.reward_scale)
        self.root_value_segment = np.array([step.root_value for step in steps], dtype=np.float32)
        self.child_visit_segment = np.zeros((len(steps), size), dtype=np.float32)
        self.action_mask_segment = np.zeros((len(steps), size), dtype=np.int8)
        for t, step in enumerate(steps):
            self.child_visit_segment[t, step.action_indices] = step.visit_probs()
            self.action_mask_segment[t, step.action_indices] = 1
        self.to_play_segment = np.full(len(steps), -1)
        self.timestep_segment = np.array([step.step for step in steps], dtype=np.int64)
        if steps[-1].done:
            returns = returns_to_go(self.reward_segment, discount=config.discount_factor)
        else:  # the last decision's own value stands for everything from there on
            last, rewards = steps[-1].root_value, self.reward_segment[:-1]
            returns = np.append(returns_to_go(rewards, discount=config.discount_factor, bootstrap_value=last), last)
        self.returns = returns[: len(records)]
        if is_over:
            self._stay()

    def recipe(self, table: RecordTable) -> Plain:
        """What :meth:`from_recipe` makes an equal segment from; the records go into ``table``."""
        final = self.obs_segment[self.num_steps] if len(self.obs_segment) > self.num_steps else None
        return {
            "records": [table.number(record) for record in self.records],
            "padding": [table.number(record) for record in self.padding],
            "final_features": None if final is None else torch.from_numpy(final.copy()),
            "is_over": self.is_over,
        }

    @classmethod
    def from_recipe(cls, recipe: Plain, records: Sequence[StepRecord], *, config: Any) -> PriorZeroGameSegment:
        """The inverse of :meth:`recipe`; ``records`` are those of the table, by number."""
        final = recipe["final_features"]
        return cls(
            [records[n] for n in recipe["records"]],
            [records[n] for n in recipe["padding"]],
            final_features=None if final is None else final.numpy(),
            is_over=recipe["is_over"],
            config=config,
        )

    def _stay(self) -> None:
        """One more step, from the last state to itself."""
        last = {"action": self.action_segment[-1], "to_play": -1, "timestep": self.timestep_segment[-1] + 1}
        for name in ("action", "reward", "root_value", "child_visit", "action_mask", "to_play", "timestep"):
            array = getattr(self, f"{name}_segment")
            setattr(self, f"{name}_segment", np.append(array, np.full_like(array[-1:], last.get(name, 0)), axis=0))


class SegmentWriter:
    """Cuts the decisions of one environment into segments, in order, each decision in exactly one.

    Args:
        config: LightZero's policy configuration.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._length = config.game_segment_length
        self._padding = config.num_unroll_steps + config.td_steps
        self._pending: list[StepRecord] = []

    @property
    def pending(self) -> int:
        """Decisions that are not in a segment yet."""
        return len(self._pending)

    def state_dict(self, table: RecordTable) -> list[int]:
        """The numbers of the pending decisions, which go into ``table``."""
        return [table.number(record) for record in self._pending]

    def load_state_dict(self, state: Sequence[int], records: Sequence[StepRecord]) -> None:
        self._pending = [records[n] for n in state]

    def add(
        self, record: StepRecord, *, next_features: np.ndarray, truncated: bool = False
    ) -> list[PriorZeroGameSegment]:
        """Take the next decision; return the segments that are complete now.

        Args:
            record: the decision.
            next_features: features of the state after it, ``[F]``; used if the episode ends here.
            truncated: the move limit ends the episode, not the game.
        """
        self._pending.append(record)
        if not record.done:
            if len(self._pending) < self._length + self._padding:
                return []
            return [self._cut(final_features=None, is_over=False)]
        return self.flush(final_features=next_features, is_over=not truncated)

    def flush(self, *, final_features: np.ndarray, is_over: bool = False) -> list[PriorZeroGameSegment]:
        """Cut all that is pending.

        Args:
            final_features: those of the last state that was seen, ``[F]``.
            is_over: that state is the game's own end.
        """
        segments = []
        while self._pending:
            segments.append(self._cut(final_features=final_features, is_over=is_over))
        return segments

    def _cut(self, *, final_features: np.ndarray | None, is_over: bool) -> PriorZeroGameSegment:
        records = self._pending[: self._length]
        padding = self._pending[self._length : self._length + self._padding]
        reaches_the_end = len(records) + len(padding) == len(self._pending)
        self._pending = self._pending[self._length :]
        return PriorZeroGameSegment(
            records,
            padding,
            final_features=final_features if reaches_the_end else None,
            is_over=is_over and reaches_the_end,
            config=self._config,
        )
