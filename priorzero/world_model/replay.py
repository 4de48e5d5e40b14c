"""Replay of game segments: one sampling pass for both models, priorities that come back, eviction that counts right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from priorzero.runtime.quiet import quiet
from priorzero.types import Plain, StepRecord, UserError
from priorzero.world_model.records import RecordTable
from priorzero.world_model.segment import PriorZeroGameSegment

with quiet():
    from lzero.mcts.buffer.game_buffer_unizero import UniZeroGameBuffer


@dataclass(frozen=True)
class SampledSegments:
    """Where the sequences of a batch begin.

    Attributes:
        segments: the segment of each sequence, ``B`` of them.
        positions: index in the segment's records at which each sequence begins, ``[B]``.
    """

    segments: list[PriorZeroGameSegment]
    positions: np.ndarray

    def records(self) -> list[StepRecord]:
        """The first decision of each sequence."""
        return [segment.records[t] for segment, t in zip(self.segments, self.positions, strict=True)]

    def returns(self) -> np.ndarray:
        """The return of each of these decisions, ``[B]``."""
        return np.array([segment.returns[t] for segment, t in zip(self.segments, self.positions, strict=True)])


class PriorZeroGameBuffer(UniZeroGameBuffer):
    """LightZero's UniZero buffer with step records beside the arrays.

    ``sample`` returns ``[current_batch, target_batch, game_segments]``: LightZero's two lists and a
    :class:`SampledSegments` from the very same draw. Mended here, each with a test: sampling never lands in padding;
    all that is known of a sequence is learned from;
    priorities are proportional and come back through :meth:`update_priority`; evicting a segment drops as many
    look-ups as it brought; visit targets are read by position.

    Args:
        config: LightZero's policy configuration.
        rng: draws the samples.
    """

    def __init__(self, config: Any, *, rng: np.random.Generator) -> None:
        super().__init__(config)
        self._rng = rng
        self._sampled: SampledSegments | None = None
        self.game_pos_priorities = np.zeros(0, dtype=np.float64)
        self.num_evicted = 0

    def push(self, segments: Sequence[PriorZeroGameSegment]) -> None:
        """Store segments, give their decisions the highest priority so far, and evict the oldest beyond the limit."""
        for segment in segments:
            top = self.game_pos_priorities.max() if len(self.game_pos_priorities) else 1.0
            number = self.base_idx + len(self.game_segment_buffer)
            self.game_segment_buffer.append(segment)
            self.game_segment_game_pos_look_up += [(number, t) for t in range(len(segment.records))]
            self.game_pos_priorities = np.append(self.game_pos_priorities, np.full(len(segment.records), top))
        excess, size = 0, self.get_num_of_transitions()
        while size > self.replay_buffer_size:
            size -= len(self.game_segment_buffer[excess].records)
            excess += 1
        if excess:
            self._remove(excess)

    def state_dict(self, table: RecordTable) -> Plain:
        """Everything that the next samples depend on; the step records go into ``table``."""
        return {
            "segments": [segment.recipe(table) for segment in self.game_segment_buffer],
            "priorities": torch.from_numpy(self.game_pos_priorities),
            "base_idx": self.base_idx,
            "num_evicted": self.num_evicted,
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Plain, records: Sequence[StepRecord]) -> None:
        """The inverse of :meth:`state_dict`, into an empty buffer; ``records`` are those of the table, by number."""
        self.base_idx, self.num_evicted = state["base_idx"], state["num_evicted"]
        self.push([PriorZeroGameSegment.from_recipe(r, records, config=self._cfg) for r in state["segments"]])
        self.game_pos_priorities = state["priorities"].numpy().copy()
        self._rng.bit_generator.state = state["rng"]

    def _remove(self, excess_game_segment_index: int) -> None:
        gone = sum(len(segment.records) for segment in self.game_segment_buffer[:excess_game_segment_index])
        del self.game_segment_buffer[:excess_game_segment_index]
        del self.game_segment_game_pos_look_up[:gone]
        self.game_pos_priorities = self.game_pos_priorities[gone:]
        self.base_idx += excess_game_segment_index
        self.num_evicted += gone

    def sample(self, batch_size: int, policy: Any) -> list[Any]:
        """Draw sequences without replacement.

        Args:
            batch_size: ``B``.
            policy: gives the target model for the value targets.

        Raises:
            ValueError: fewer decisions are stored than asked for.
            UserError: no stored decision is followed by another one or by the game's end.
        """
        if batch_size > self.get_num_of_transitions():
            raise ValueError(f"{batch_size} sequences asked for, {self.get_num_of_transitions()} decisions stored")
        current_batch, target_batch = super().sample(batch_size, policy)
        assert self._sampled is not None
        # LightZero's mask stops where the segment does; the targets in the padding behind it are as good.
        steps = np.arange(current_batch[3].shape[1])
        known = [len(s) - t for s, t in zip(self._sampled.segments, self._sampled.positions, strict=True)]
        current_batch[3] = (steps < np.minimum(known, self._cfg.num_unroll_steps)[:, None]).astype(np.float64)
        return [current_batch, target_batch, self._sampled]

    def features(self) -> np.ndarray:
        """The features of all stored decisions, ``[n, F]``."""
        return np.stack([record.features for segment in self.game_segment_buffer for record in segment.records])

    def scalars(self) -> dict[str, float]:
        """Metrics under ``buffer/``."""
        return {
            "buffer/decisions": float(self.get_num_of_transitions()),
            "buffer/segments": float(self.get_num_of_game_segments()),
            "buffer/evicted": float(self.num_evicted),
        }

    def _sample_orig_data(self, batch_size: int) -> tuple[Any, ...]:
        priorities = self.game_pos_priorities
        if not self._cfg.use_priority:
            priorities = np.ones_like(priorities)
        probs = priorities**self._alpha
        probs /= probs.sum()
        for _ in range(100):
            index = self._rng.choice(len(probs), batch_size, p=probs, replace=False)
            if self._has_a_successor(index):
                break
        else:
            raise UserError(
                "no stored decision is followed by another one or by the game's end, and the world model learns from "
                "pairs; raise env.max_episode_steps"
            )
        # Schaul et al. 2016, eq. 1 and section 3.4: P(i) = p_i^alpha / sum, w_i = (N P(i))^-beta / max w.
        is_weights = (len(probs) * probs[index]) ** -self._beta
        is_weights /= is_weights.max()
        where = [self.game_segment_game_pos_look_up[i] for i in index]
        segments = [self.game_segment_buffer[number - self.base_idx] for number, _ in where]
        positions = np.array([t for _, t in where])
        self._sampled = SampledSegments(segments, positions)
        # Absolute numbers, so that priorities find their decisions after an eviction.
        return segments, positions, index + self.num_evicted, is_weights, np.zeros(batch_size)

    def _prepare_reward_value_context(self, *args: Any) -> list[Any]:
        """Where value targets bootstrap, as LightZero has it, but for the end of a game: it is worth nothing."""
        context = super()._prepare_reward_value_context(*args)
        value_mask, positions, td_steps = context[1], context[2], context[6]
        steps = self._cfg.num_unroll_steps + 1
        segments = args[1]
        for b, (segment, t) in enumerate(zip(segments, positions, strict=True)):
            for n in range(b * steps, (b + 1) * steps):
                if segment.is_over and t + n - b * steps + td_steps[n] >= segment.num_steps:
                    value_mask[n] = 0
        return context

    def _has_a_successor(self, index: np.ndarray) -> bool:
        """Whether a step is known after any of these decisions: LightZero divides by the number of pairs."""
        where = [self.game_segment_game_pos_look_up[i] for i in index]
        return any(t + 1 < len(self.game_segment_buffer[number - self.base_idx]) for number, t in where)

    def update_priority(self, train_data: list[Any], batch_priorities: np.ndarray) -> None:
        """Give the sampled decisions new priorities.

        Args:
            train_data: what :meth:`sample` returned.
            batch_priorities: ``[B]``, positive. Decisions evicted since are passed over.
        """
        index = np.asarray(train_data[0][4]) - self.num_evicted
        present = index >= 0
        self.game_pos_priorities[index[present]] = np.asarray(batch_priorities)[present]

    def _compute_target_policy_non_reanalyzed(self, policy_non_re_context: Any, policy_shape: int | None) -> np.ndarray:
        """Visit shares ``[B, U+1, A]``; zeros (no loss) beyond the end of the episode."""
        positions, child_visits = policy_non_re_context[0], policy_non_re_context[1]
        steps = self._cfg.num_unroll_steps + 1
        targets = np.zeros((len(positions), steps, policy_shape or 0), dtype=np.float32)
        for row, (t, visits) in enumerate(zip(positions, child_visits, strict=True)):
            known = visits[t : t + steps]
            targets[row, : len(known)] = known
        return targets
