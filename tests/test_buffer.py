"""Segments and replay: nothing comes apart, nothing is lost, nothing is sampled that is not there."""

from __future__ import annotations

import dataclasses
import gc
import pickle
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from priorzero.config import default_settings
from priorzero.runtime.quiet import quiet
from priorzero.types import ActionPrior, GameState, StepRecord, UserError
from priorzero.world_model.lightzero import unizero_config
from priorzero.world_model.replay import PriorZeroGameBuffer
from priorzero.world_model.segment import PriorZeroGameSegment, SegmentWriter
from tests.helpers.segments import COMMANDS, FEATURE_SIZE, demo_config, demo_episode, demo_record, demo_segments

with quiet():
    from lzero.mcts.buffer.game_buffer_unizero import UniZeroGameBuffer
    from lzero.mcts.buffer.game_segment import GameSegment


class ConstantTarget:
    """A target model whose values are all ``value``; LightZero asks it for the bootstrap of the value targets."""

    def __init__(self, config, value=0.0):
        self.config, self.value, self.training = config, value, False

    def to(self, device):
        return self

    def eval(self):
        return self

    def initial_inference(self, obs, action, start_pos):
        with quiet():
            from lzero.policy import DiscreteSupport, phi_transform, scalar_transform
        scale = self.config.model.support_scale
        support = DiscreteSupport(-scale, scale, delta=1)
        values = phi_transform(support, scalar_transform(torch.full((len(obs), 1), self.value)))[:, 0]
        logits = torch.log(values + 1e-12)
        return SimpleNamespace(latent_state=torch.zeros(1), value=logits, policy_logits=torch.zeros(1), reward=[0.0])


def filled(config, lengths):
    buffer = PriorZeroGameBuffer(config, rng=np.random.default_rng(0))
    buffer.push(demo_segments(config, lengths=lengths))
    return buffer


def sample(buffer, config, *, size=None, value=0.0):
    return buffer.sample(size or config.batch_size, SimpleNamespace(_target_model=ConstantTarget(config, value)))


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 30), segment_length=st.integers(2, 12), ends=st.booleans())
def test_each_decision_is_in_one_segment_and_all_arrays_agree_with_it(length, segment_length, ends):
    config = demo_config(segment_length=segment_length)
    writer = SegmentWriter(config)
    segments, records = [], []
    for record, next_features in demo_episode(length=length, ends=ends):
        records.append(record)
        segments += writer.add(record, next_features=next_features)
    if not ends:
        assert writer.pending < segment_length + config.num_unroll_steps + config.td_steps
        num_cut_before_the_end = len(segments)
        segments += writer.flush(final_features=next_features)
    else:
        num_cut_before_the_end = 0
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
        sees_the_end = first + steps == length and number >= num_cut_before_the_end
        assert segment.num_steps == steps and segment.is_over == (sees_the_end and ends)
        assert len(segment) == steps + segment.is_over  # where the game is over, one more step stays there
        assert len(segment.obs_segment) == steps + sees_the_end
        for t in range(steps):
            record = records[first + t]
            assert segment.obs_segment[t] == pytest.approx(record.features)
            assert segment.action_segment[t] == record.action_index
            assert segment.reward_segment[t] == record.reward
            assert segment.timestep_segment[t] == record.step
            assert segment.child_visit_segment[t].sum() == pytest.approx(1)
            assert segment.child_visit_segment[t, record.action_indices] == pytest.approx(record.visit_probs())
            assert np.flatnonzero(segment.action_mask_segment[t]).tolist() == sorted(record.action_indices)


def test_an_end_by_the_game_is_worth_nothing_and_an_end_by_the_move_limit_teaches_no_such_thing():
    """With a target model that takes every state to be worth 10."""
    config = demo_config()
    g, targets = config.discount_factor, {}
    for truncated in (False, True):
        buffer = PriorZeroGameBuffer(config, rng=np.random.default_rng(0))
        writer = SegmentWriter(config)
        for record, next_features in demo_episode(length=4):  # rewards 0, 1, 2, 3
            buffer.push(writer.add(record, next_features=next_features, truncated=truncated))
        current, (rewards, values, policies), sampled = sample(buffer, config, size=4, value=10.0)
        row = sampled.positions.tolist().index(1)
        targets[truncated] = rewards[row].ravel(), values[row].ravel(), current[3][row], policies[row].sum(axis=-1)
        observations = current[0].reshape(4, -1, FEATURE_SIZE)
        assert observations[row, :5, 0].tolist() == [1, 2, 3, 4, 4]
    rewards, values, mask, policies = targets[False]
    assert rewards == pytest.approx([1, 2, 3, 0, 0])
    # Two steps of reward, then the target model's value, but for the end.
    assert values == pytest.approx([1 + 2 * g + 10 * g**2, 2 + 3 * g, 3, 0, 0], abs=1e-3)
    assert mask.tolist() == [1, 1, 1, 1, 0]  # the last state is learned from, without a policy
    assert policies == pytest.approx([1, 1, 1, 0, 0])
    rewards, values, mask, policies = targets[True]
    assert rewards == pytest.approx([1, 2, 3, 0, 0])
    assert values == pytest.approx([1 + 2 * g + 10 * g**2, 2 + 3 * g, 3, 0, 0], abs=1e-3)
    assert mask.tolist() == [1, 1, 1, 0, 0]


def test_the_world_model_learns_from_scaled_points_and_the_bonus():
    config = demo_config()
    config.reward_scale = 2.0
    records = [dataclasses.replace(demo_record(t, done=t == 2), shaping=0.25) for t in range(3)]
    segment = PriorZeroGameSegment(records, [], final_features=np.ones(6), is_over=True, config=config)
    assert segment.reward_segment == pytest.approx([0.5, 2.5, 4.5, 0.0])
    assert segment.returns == pytest.approx(
        [0.5 + config.discount_factor * (2.5 + config.discount_factor * 4.5), 2.5 + config.discount_factor * 4.5, 4.5]
    )


def test_returns_reach_through_the_padding_and_bootstrap_where_the_episode_goes_on():
    config = demo_config(segment_length=2)  # padding: 4 unroll steps + 2 td steps
    g = config.discount_factor
    writer = SegmentWriter(config)
    made = [s for r, f in demo_episode(length=8, ends=False) for s in writer.add(r, next_features=f)]
    # Decisions 0 and 1 and six of padding; the root value (0.5) of decision 7 stands for what comes from there on.
    want = sum(g**t * t for t in range(7)) + g**7 * 0.5
    assert made[0].returns[0] == pytest.approx(want)
    ended = demo_segments(config, lengths=[3])
    assert ended[0].returns == pytest.approx([0 + g * 1 + g**2 * 2, 1 + g * 2])
    assert ended[1].returns == pytest.approx([2.0])


def test_one_draw_gives_both_models_the_same_decisions():
    config = demo_config(segment_length=5, batch_size=16)
    buffer = filled(config, [3, 12, 1, 20])
    for _ in range(20):
        current, target, drawn = sample(buffer, config)
        observations, actions = current[0], current[1]
        for row, record in enumerate(drawn.records()):
            assert observations[row][:FEATURE_SIZE] == pytest.approx(record.features)
            assert actions[row, 0] == record.action_index
            assert target[0][row, 0] == record.reward
            assert target[2][row, 0, record.action_indices] == pytest.approx(record.visit_probs())
            assert (target[2][row].sum(axis=-1) <= 1 + 1e-5).all()


def test_long_episodes_in_short_segments_can_be_sampled_everywhere():
    """LightZero's own padding raises IndexError here (next test); 200 samples of ours come out whole."""
    config = demo_config(segment_length=4, batch_size=8)
    buffer = filled(config, [40, 40])
    seen = set()
    for _ in range(200):
        _, _, drawn = sample(buffer, config)
        assert all(t < len(s.records) for s, t in zip(drawn.segments, drawn.positions, strict=True))
        seen |= {(r.episode, r.step) for r in drawn.records()}
    assert seen == {(e, t) for e in range(2) for t in range(40)}


def test_lightzeros_own_padding_still_breaks_sampling():
    """If this one day passes without an error, our segment no longer has to build its arrays by itself."""
    config = demo_config(segment_length=4, batch_size=4)
    config.action_type = "varied_action_space"
    config.use_priority = False
    stock = GameSegment(action_space=None, game_segment_length=4, config=config)
    records = [demo_record(t) for t in range(9)]
    stock.reset([records[0].features])
    for r in records[:4]:
        mask = np.zeros(8)
        mask[r.action_indices] = 1
        stock.append(r.action_index, r.features, r.reward, mask, -1, r.step)
        stock.store_search_stats(r.visit_counts.tolist(), r.root_value)
    later = records[4:]
    stock.pad_over(
        [r.features for r in later],
        [r.reward for r in later[:4]],
        [r.action_index for r in later],
        [r.root_value for r in later],
        [(r.visit_counts / r.visit_counts.sum()).tolist() for r in later],
    )
    stock.game_segment_to_array()
    buffer = UniZeroGameBuffer(config)
    buffer.push_game_segments(([stock], [{"done": True, "unroll_plus_td_steps": 5, "priorities": None}]))
    with pytest.raises(IndexError):
        buffer.sample(4, SimpleNamespace(_target_model=ConstantTarget(config)))


def test_value_targets_by_hand():
    config = demo_config(segment_length=10, batch_size=6)  # td_steps 2, 4 unroll steps
    g = config.discount_factor
    buffer = filled(config, [6])  # rewards 0 1 2 3 4 5, then the end
    _, target, drawn = sample(buffer, config, value=7.0)
    for row, t in enumerate(drawn.positions):
        for u in range(5):
            now = t + u
            td = min(2, 6 - t)
            want = sum(g**i * (now + i) for i in range(td) if now + i < 6)
            want += g**td * 7.0 if now + td < 6 else 0.0
            assert target[1][row, u] == pytest.approx(want, abs=0.02), (t, u)  # categorical values round a little


def test_the_bootstrap_of_value_targets_gets_observations_with_the_actions_that_were_taken_there():
    config = demo_config(segment_length=10, batch_size=15)  # td_steps 2, 4 unroll steps
    buffer = filled(config, [20])
    target, asked = ConstantTarget(config), []

    def initial_inference(obs, action, start_pos):
        asked.append((obs.reshape(len(action), 5, -1)[..., 0].numpy(), action))
        return ConstantTarget.initial_inference(target, obs, action, start_pos)

    target.initial_inference = initial_inference
    *_, drawn = buffer.sample(config.batch_size, SimpleNamespace(_target_model=target))
    [(observations, actions)] = asked
    compared = 0
    for row, (segment, t) in enumerate(zip(drawn.segments, drawn.positions, strict=True)):
        if t + 2 >= len(segment.records):
            continue  # nothing to bootstrap from within the segment
        first = segment.records[t].step + 2
        known = range(first, min(first + 4, segment.records[0].step + len(segment.records)))
        assert observations[row, : len(known)].tolist() == list(known)
        assert actions[row, : len(known)].tolist() == [demo_record(step).action_index for step in known]
        compared += len(known)
    assert compared > 30


def test_eviction_drops_as_many_look_ups_as_decisions():
    config = demo_config(segment_length=4, buffer_size=20, batch_size=4)
    buffer = PriorZeroGameBuffer(config, rng=np.random.default_rng(0))
    for episode in range(30):
        writer = SegmentWriter(config)
        for record, next_features in demo_episode(length=1 + episode % 11, episode=episode):
            buffer.push(writer.add(record, next_features=next_features))
        decisions = sum(len(s.records) for s in buffer.game_segment_buffer)
        assert buffer.get_num_of_transitions() == decisions == len(buffer.game_pos_priorities) <= 20
        if decisions >= 4:
            _, _, drawn = sample(buffer, config)
            assert all(any(s is kept for kept in buffer.game_segment_buffer) for s in drawn.segments)
    assert buffer.num_evicted > 100


def test_lightzeros_own_eviction_still_counts_padding():
    config = demo_config(segment_length=4, batch_size=4)
    buffer = filled(config, [20, 20])
    before, evicted = buffer.get_num_of_transitions(), len(buffer.game_segment_buffer[0].records)
    UniZeroGameBuffer._remove(buffer, 1)
    assert before - buffer.get_num_of_transitions() > evicted


def test_priorities_come_back_and_decide_what_is_drawn():
    config = demo_config(segment_length=10, batch_size=4)
    buffer = filled(config, [10, 10])
    batch = sample(buffer, config, size=20)
    priorities = np.array([1000.0 if r.step == 3 else 1e-6 for r in batch[2].records()])
    buffer.update_priority(batch, priorities)
    drawn = sample(buffer, config, size=2)[2]
    assert [r.step for r in drawn.records()] == [3, 3]


def test_importance_weights_by_hand():
    config = demo_config(segment_length=4, batch_size=3)
    buffer = filled(config, [3])
    buffer.game_pos_priorities = np.array([1.0, 2.0, 4.0])
    current, _, drawn = sample(buffer, config, size=3)
    probs = np.array([1.0, 2.0, 4.0]) ** 0.6
    probs /= probs.sum()
    weights = (3 * probs) ** -0.4
    weights /= weights.max()
    for row, record in enumerate(drawn.records()):
        assert current[5][row] == pytest.approx(weights[record.step])


def test_priorities_of_evicted_decisions_are_passed_over():
    config = demo_config(segment_length=4, buffer_size=20, batch_size=4)
    buffer = filled(config, [4, 4])
    batch = sample(buffer, config, size=8)
    buffer.push(demo_segments(config, lengths=[4, 4, 4, 4]))  # 24 decisions: the first 4 go
    assert buffer.num_evicted == 4
    buffer.update_priority(batch, np.array([100.0 + r.episode for r in batch[2].records()]))
    assert buffer.game_pos_priorities[:4].tolist() == [101.0] * 4
    assert (buffer.game_pos_priorities[4:] == 1.0).all()
    batch = sample(buffer, config, size=20)  # drawn after the eviction: all of them are there
    buffer.update_priority(batch, np.array([10.0 * r.episode + r.step for r in batch[2].records()]))
    stored = [r for segment in buffer.game_segment_buffer for r in segment.records]
    assert buffer.game_pos_priorities.tolist() == [10.0 * r.episode + r.step for r in stored]


def test_a_draw_holds_a_pair_of_decisions_since_lightzero_divides_by_their_number():
    config = demo_config(segment_length=4, batch_size=2)

    def cut_by_the_move_limit(lengths):
        buffer = PriorZeroGameBuffer(config, rng=np.random.default_rng(0))
        for episode, length in enumerate(lengths):
            writer = SegmentWriter(config)
            for record, features in demo_episode(length=length, episode=episode):
                buffer.push(writer.add(record, next_features=features, truncated=True))
        return buffer

    buffer = cut_by_the_move_limit([1] * 30 + [2])
    for _ in range(30):
        _, _, drawn = sample(buffer, config)
        assert any(len(s.records) == 2 and t == 0 for s, t in zip(drawn.segments, drawn.positions, strict=True))
    with pytest.raises(UserError, match=r"env\.max_episode_steps"):
        sample(cut_by_the_move_limit([1] * 30), config)
    current, _, _ = sample(filled(config, [1] * 30), config)  # a game's own end follows: that is a pair
    assert current[3][:, 1].tolist() == [1.0, 1.0]


def test_a_cut_episode_keeps_a_return_for_every_decision():
    config = demo_config(segment_length=4)
    g = config.discount_factor
    writer = SegmentWriter(config)
    for record, next_features in demo_episode(length=3, ends=False):
        assert writer.add(record, next_features=next_features) == []
    (segment,) = writer.flush(final_features=next_features)
    # Rewards 0, 1, 2; the searched value (0.5) of the last decision stands for itself and what would have come.
    assert segment.returns == pytest.approx([0 + g * 1 + g**2 * 0.5, 1 + g * 0.5, 0.5])


def test_asking_for_more_than_there_is():
    config = demo_config()
    with pytest.raises(ValueError, match="8 sequences asked for, 3 decisions stored"):
        sample(filled(config, [3]), config, size=8)


def test_segment_needs_no_more_than_its_records():
    segment = PriorZeroGameSegment(
        [demo_record(0, done=True)], [], final_features=np.ones(6), is_over=False, config=demo_config()
    )
    assert len(segment) == 1 and len(segment.obs_segment) == 2
    assert segment.records[0].action_text == COMMANDS[0]


def realistic_record(step, *, episode, done):
    """A decision as large as the default settings make it: no text and no array is shared with any other decision."""
    name = f"{episode}-{step}"
    state = GameState(
        feedback=f"Taken, number {name}. " + "The grue looks at you. " * 17,  # 400 characters
        valid_actions=tuple(f"put sword {name}-{k} into the old brown sack" for k in range(20)),
        score=float(step),
        max_score=350.0,
        moves=step,
        look=f"Room {name}: " + "a dusty place full of things. " * 10,
        inventory=f"You carry {name}: " + "a lamp, a rope, " * 9,
    )
    return StepRecord(
        state=pickle.loads(pickle.dumps(state)),  # as it comes from the game's process: every string is a new one
        features=np.stack([np.full(3 * 384 + 128, step)]).astype(np.float32)[0],
        action_indices=np.arange(20) + step,
        prompt=f"Decision {name}. " + "x" * 3000,
        prior=ActionPrior(np.full(20, -3.0, dtype=np.float32), "score", step),
        visit_counts=np.full(20, 5),
        root_value=step / 7,
        predicted_value=step / 9,
        chosen=step % 20,
        reward=step / 3,
        done=done,
        episode=episode,
        step=step,
    )


@pytest.mark.slow
def test_ten_thousand_decisions_take_less_than_200_mb():
    """numpy and Python's own objects alike: tracemalloc sees both."""
    config = unizero_config(default_settings(), feature_size=3 * 384 + 128, device="cpu")
    buffer = PriorZeroGameBuffer(config, rng=np.random.default_rng(0))
    final = np.zeros(3 * 384 + 128, dtype=np.float32)
    gc.collect()
    tracemalloc.start()
    try:
        for episode in range(102):  # more than fit: what is evicted must be gone
            writer = SegmentWriter(config)
            for step in range(100):
                record = realistic_record(step, episode=episode, done=step == 99)
                buffer.push(writer.add(record, next_features=final))
        del writer, record
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert buffer.get_num_of_transitions() == 10_000 and buffer.num_evicted == 200
    assert held < 200e6, f"{held / 1e6:.0f} MB"
