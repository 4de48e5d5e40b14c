"""Game segments: arrays that agree with the step records, returns, and step records as plain data."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from priorzero.types import ActionPrior
from priorzero.world_model.records import RecordTable, pack_arrays, read_records, unpack_arrays
from priorzero.world_model.segment import PriorZeroGameSegment, SegmentWriter
from tests.helpers.segments import COMMANDS, demo_config, demo_episode, demo_record, demo_segments


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 30), segment_length=st.integers(2, 12), ends=st.booleans())
def test_segment_writer_puts_each_decision_into_one_segment_with_consistent_arrays(length, segment_length, ends):
    config = demo_config(segment_length=segment_length)
    writer = SegmentWriter(config)
    segments, records = [], []
    for record, next_features in demo_episode(length=length, ends=ends):
        records.append(record)
        segments += writer.add(record, next_features=next_features)
    if not ends:
        assert writer.pending < segment_length + config.num_unroll_steps + config.td_steps
        num_before_end = len(segments)
        segments += writer.flush(final_features=next_features)
    else:
        num_before_end = 0
    assert writer.pending == 0
    assert [r for segment in segments for r in segment.records] == records
    for number, segment in enumerate(segments):
        first = segment.records[0].step
        assert len(segment.returns) == len(segment.records) and np.isfinite(segment.returns).all()
        arrays = (
            segment.action_segment,
            segment.reward_segment,
            segment.root_value_segment,
            segment.child_visit_segment,
            segment.action_mask_segment,
            segment.to_play_segment,
            segment.timestep_segment,
        )
        assert {len(a) for a in arrays} == {len(segment)}
        steps = min(segment_length + config.num_unroll_steps + config.td_steps, length - first)
        has_final_state = first + steps == length and number >= num_before_end
        assert segment.num_steps == steps and segment.terminated == (has_final_state and ends)
        assert len(segment) == steps + segment.terminated  # plus the absorbing step of the terminal state
        assert len(segment.obs_segment) == steps + has_final_state
        for t in range(steps):
            record = records[first + t]
            assert segment.obs_segment[t] == pytest.approx(record.features)
            assert segment.action_segment[t] == record.action_index
            assert segment.reward_segment[t] == record.reward
            assert segment.timestep_segment[t] == record.step
            assert segment.child_visit_segment[t].sum() == pytest.approx(1)
            assert segment.child_visit_segment[t, record.action_indices] == pytest.approx(record.visit_probs())
            assert np.flatnonzero(segment.action_mask_segment[t]).tolist() == sorted(record.action_indices)


def test_segment_rewards_and_returns_are_scaled_points_with_shaping():
    config = demo_config()
    config.reward_scale = 2.0
    records = [dataclasses.replace(demo_record(t, done=t == 2), shaping=0.25) for t in range(3)]
    segment = PriorZeroGameSegment(records, [], final_features=np.ones(6), terminated=True, config=config)
    assert segment.reward_segment == pytest.approx([0.5, 2.5, 4.5, 0.0])
    assert segment.returns == pytest.approx(
        [0.5 + config.discount_factor * (2.5 + config.discount_factor * 4.5), 2.5 + config.discount_factor * 4.5, 4.5]
    )


def test_segment_returns_include_the_padding_and_bootstrap_where_the_episode_continues():
    config = demo_config(segment_length=2)  # padding: 4 unroll steps + 2 td steps
    g = config.discount_factor
    made = demo_segments(config, lengths=[8], ends=False)
    # Decisions 0 and 1, and six of padding. The last one, decision 7, contributes its root value, 0.5.
    assert made[0].returns[0] == pytest.approx(sum(g**t * t for t in range(7)) + g**7 * 0.5)
    ended = demo_segments(config, lengths=[3])
    assert ended[0].returns == pytest.approx([0 + g * 1 + g**2 * 2, 1 + g * 2])
    assert ended[1].returns == pytest.approx([2.0])


def test_segment_returns_of_an_interrupted_episode_bootstrap_with_the_last_root_value():
    config = demo_config(segment_length=4)
    g = config.discount_factor
    (segment,) = demo_segments(config, lengths=[3], ends=False)
    # Rewards 0, 1, 2. The last decision contributes its root value, 0.5, in place of its reward.
    assert segment.returns == pytest.approx([0 + g * 1 + g**2 * 0.5, 1 + g * 0.5, 0.5])


def test_segment_of_a_truncated_episode_has_no_absorbing_step():
    segment = PriorZeroGameSegment(
        [demo_record(0, done=True)], [], final_features=np.ones(6), terminated=False, config=demo_config()
    )
    assert len(segment) == 1 and len(segment.obs_segment) == 2
    assert segment.records[0].action_text == COMMANDS[0]


@given(st.lists(st.one_of(st.none(), st.lists(st.integers(-(2**40), 2**40), max_size=5)), max_size=6))
def test_pack_arrays_is_inverted_by_unpack_arrays(rows):
    arrays = [None if row is None else np.array(row, dtype=np.int64) for row in rows]
    again = unpack_arrays(pack_arrays(arrays))
    assert [None if a is None else a.tolist() for a in again] == rows
    assert all(a is None or len(a) == 0 or a.dtype == np.int64 for a in again)


def test_record_table_stores_each_record_once_and_restores_it(tmp_path):
    prior = ActionPrior(np.log([0.25, 0.75]).astype(np.float32), "score", 2, "text", rollout_logprobs=np.arange(2.0))
    records = [demo_record(t, episode=3, done=t == 6) for t in range(7)]
    records[3] = dataclasses.replace(records[3], prior=prior, shaping=0.5, behaviour_prob=0.25)
    records[4] = dataclasses.replace(records[4], prompt="żółw 北 🐢\0\x1b \u202e <|im_end|>")  # games print anything
    table = RecordTable()
    numbers = [table.number(record) for record in [*records, *records[2:5]]]
    assert numbers == [0, 1, 2, 3, 4, 5, 6, 2, 3, 4]
    torch.save(table.state_dict(), tmp_path / "records.pt")
    again = read_records(torch.load(tmp_path / "records.pt", weights_only=True))
    for old, new in zip(records, again, strict=True):
        np.testing.assert_equal(dataclasses.asdict(new), dataclasses.asdict(old))
        assert new.features.dtype == np.float32 and new.visit_counts.dtype == old.visit_counts.dtype
