"""Prioritised replay of game segments. One sample serves both models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from easydict import EasyDict

from priorzero.types import Plain, StepRecord, UserError
from priorzero.world_model.batch import ReplayBatch, SampledSequences
from priorzero.world_model.imports import lightzero_imports
from priorzero.world_model.records import RecordTable
from priorzero.world_model.segment import PriorZeroGameSegment
from priorzero.world_model.unizero import UniZeroLearner

with lightzero_imports():
    from lzero.mcts.buffer.game_buffer_unizero import UniZeroGameBuffer


class PriorZeroGameBuffer(UniZeroGameBuffer):
    """LightZero's UniZero buffer for segments that also have step records.

    It differs from LightZero's in these points, each of which has a test:

    * Sequences never begin in padding. Their mask includes the known steps in the padding.
    * Priorities are proportional (Schaul et al. 2016), and :meth:`update_priority` sets them.
    * Evicting a segment removes as many index entries as it has decisions. LightZero counts the padding as well.
    * Policy targets are read by position.
    * Terminal states have zero value.

    ``config`` is LightZero's policy configuration, and ``rng`` draws the samples.
    """

    def __init__(self, config: EasyDict, *, rng: np.random.Generator) -> None:
        super().__init__(config)
        self._rng = rng
        self._sampled: SampledSequences | None = None
        self.game_pos_priorities = np.zeros(0, dtype=np.float64)
        self.num_evicted = 0  # decisions evicted so far

    def push(self, segments: Sequence[PriorZeroGameSegment]) -> None:
        """Store segments with the largest priority so far. Evict the oldest segments beyond ``replay.buffer_size``."""
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

    def features(self) -> np.ndarray:
        """Features of all stored decisions, ``[n, F]``."""
        return np.stack([record.features for segment in self.game_segment_buffer for record in segment.records])

    def sample(self, batch_size: int, policy: UniZeroLearner) -> ReplayBatch:
        """Draw ``B = batch_size`` sequences without replacement.

        Args:
            policy: its target network computes the values at which the value targets bootstrap.

        Raises:
            ValueError: fewer than B decisions are stored.
            UserError: no stored decision is followed by another one or by a terminal state.
        """
        if batch_size > self.get_num_of_transitions():
            raise ValueError(
                f"cannot sample {batch_size} sequences: only {self.get_num_of_transitions()} decisions are stored"
            )
        current_batch, target_batch = super().sample(batch_size, policy)
        assert self._sampled is not None
        fields: list[Any] = [*current_batch, *target_batch, self._sampled]
        batch = ReplayBatch(*fields)
        # LightZero's mask ends with the segment, although the targets of the padding are valid as well.
        steps = np.arange(batch.mask.shape[1])
        known = [len(s) - t for s, t in zip(self._sampled.segments, self._sampled.positions, strict=True)]
        mask = (steps < np.minimum(known, self._cfg.num_unroll_steps)[:, None]).astype(np.float64)
        return dataclasses.replace(batch, mask=mask)

    def update_priority(self, batch: ReplayBatch, priorities: np.ndarray) -> None:
        """Set the priorities ``[B]``, positive, of the decisions at which a batch's sequences begin.

        Those of decisions that were evicted since are ignored.
        """
        index = np.asarray(batch.indices) - self.num_evicted
        present = index >= 0
        self.game_pos_priorities[index[present]] = np.asarray(priorities)[present]

    def state_dict(self, table: RecordTable) -> Plain:
        """Everything that later samples depend on. The step records are added to ``table``."""
        return {
            "segments": [segment.state_dict(table) for segment in self.game_segment_buffer],
            "priorities": torch.from_numpy(self.game_pos_priorities),
            "base_idx": self.base_idx,
            "num_evicted": self.num_evicted,
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Plain, records: Sequence[StepRecord]) -> None:
        """Load the result of :meth:`state_dict` into an empty buffer; ``records`` are those of the table, by number."""
        self.base_idx, self.num_evicted = state["base_idx"], state["num_evicted"]
        self.push([PriorZeroGameSegment.from_state_dict(s, records, config=self._cfg) for s in state["segments"]])
        self.game_pos_priorities = state["priorities"].numpy().copy()
        self._rng.bit_generator.state = state["rng"]

    # ---- methods that LightZero's buffer calls ----

    def _remove(self, excess_game_segment_index: int) -> None:
        num_removed = sum(len(segment.records) for segment in self.game_segment_buffer[:excess_game_segment_index])
        del self.game_segment_buffer[:excess_game_segment_index]
        del self.game_segment_game_pos_look_up[:num_removed]
        self.game_pos_priorities = self.game_pos_priorities[num_removed:]
        self.base_idx += excess_game_segment_index
        self.num_evicted += num_removed

    def scalars(self) -> dict[str, float]:
        """Metrics under ``buffer/``."""
        return {
            "buffer/decisions": float(self.get_num_of_transitions()),
            "buffer/segments": float(self.get_num_of_game_segments()),
            "buffer/evicted": float(self.num_evicted),
        }

    def _sample_orig_data(self, batch_size: int) -> tuple[Any, ...]:
        """Draw sequences; returns their segments, positions, numbers, importance weights and creation times."""
        priorities = self.game_pos_priorities
        if not self._cfg.use_priority:
            priorities = np.ones_like(priorities)
        probs = priorities**self._alpha
        probs /= probs.sum()
        index = self._draw(batch_size, probs)
        # Schaul et al. 2016, eq. 1 and section 3.4: P(i) = p_i^alpha / sum, w_i = (N P(i))^-beta / max w.
        is_weights = (len(probs) * probs[index]) ** -self._beta
        is_weights /= is_weights.max()
        places = [self.game_segment_game_pos_look_up[i] for i in index]
        segments = [self.game_segment_buffer[number - self.base_idx] for number, _ in places]
        positions = np.array([t for _, t in places])
        firsts = index - positions  # index of the first decision of each segment
        of_segments = [probs[i : i + len(s.records)] for i, s in zip(firsts, segments, strict=True)]
        # LightZero's sample does not return them.
        self._sampled = SampledSequences(segments, positions, of_segments, self._rng.random(batch_size))
        # Evictions do not change these numbers, so update_priority finds the decisions afterwards.
        return segments, positions, index + self.num_evicted, is_weights, np.zeros(batch_size)

    def _draw(self, batch_size: int, probs: np.ndarray) -> np.ndarray:
        """Indices of sampled decisions, ``[B]``; at least one has a successor."""
        for _ in range(100):
            index = self._rng.choice(len(probs), batch_size, p=probs, replace=False)
            if self._has_successor(index):
                return index
        raise UserError(
            "the world model needs two consecutive states of an episode, but the replay buffer has none; raise "
            "env.max_episode_steps"
        )

    def _has_successor(self, index: np.ndarray) -> bool:
        """Whether any of these decisions is followed by a known step. LightZero divides by the number of such pairs."""
        places = [self.game_segment_game_pos_look_up[i] for i in index]
        return any(t + 1 < len(self.game_segment_buffer[number - self.base_idx]) for number, t in places)

    def _prepare_reward_value_context(
        self, batch_index_list: Any, game_segment_list: Any, pos_in_game_segment_list: Any, total_transitions: int
    ) -> list[Any]:
        """Where the value targets bootstrap. Unlike in LightZero, none bootstraps at a terminal state."""
        context: list[Any] = super()._prepare_reward_value_context(
            batch_index_list, game_segment_list, pos_in_game_segment_list, total_transitions
        )
        _, value_mask, positions, _, _, _, td_steps, _, _ = context
        steps = self._cfg.num_unroll_steps + 1
        for b, (segment, t) in enumerate(zip(game_segment_list, positions, strict=True)):
            for n in range(b * steps, (b + 1) * steps):
                if segment.terminated and t + n - b * steps + td_steps[n] >= segment.num_steps:
                    value_mask[n] = 0
        return context

    def _compute_target_policy_non_reanalyzed(self, policy_non_re_context: Any, policy_shape: int | None) -> np.ndarray:
        """Visit counts as distributions, ``[B, U + 1, A]``; zeros, so no loss, beyond the end of the episode."""
        positions, child_visits, *_ = policy_non_re_context
        steps = self._cfg.num_unroll_steps + 1
        targets = np.zeros((len(positions), steps, policy_shape or 0), dtype=np.float32)
        for row, (t, visits) in enumerate(zip(positions, child_visits, strict=True)):
            known = visits[t : t + steps]
            targets[row, : len(known)] = known
        return targets
