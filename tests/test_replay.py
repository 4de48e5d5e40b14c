"""The replay buffer: what it samples, the targets it computes, priorities and eviction."""

from __future__ import annotations

import dataclasses
import gc
import pickle
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from priorzero.runtime.quiet import quiet
from priorzero.settings import EnvSettings, ReplaySettings, Settings
from priorzero.types import ActionPrior, UserError
from priorzero.world_model.batch import SampledSequences
from priorzero.world_model.lightzero import unizero_config
from priorzero.world_model.records import RecordTable, read_records
from priorzero.world_model.replay import PriorZeroGameBuffer
from priorzero.world_model.segment import SegmentWriter
from tests.helpers.segments import FEATURE_SIZE, demo_config, demo_record, demo_segments

with quiet():
    from lzero.mcts.buffer.game_buffer_unizero import UniZeroGameBuffer
    from lzero.policy import DiscreteSupport, phi_transform, scalar_transform


class ConstantTarget:
    """A target network that predicts the same value for all states. LightZero calls it for the value targets.

    Attributes:
        calls: the arguments of the calls: features of the first feature ``[B, U + 1]`` and actions ``[B, U]``.
    """

    training = False

    def __init__(self, config, value=0.0):
        scale = config.model.support_scale
        scaled = scalar_transform(torch.full((1, 1), value))
        self._logits = torch.log(phi_transform(DiscreteSupport(-scale, scale, delta=1), scaled)[0] + 1e-12)
        self._num_steps = config.num_unroll_steps + 1
        self.calls = []

    def to(self, device):
        return self

    def eval(self):
        return self

    def initial_inference(self, obs, action, start_pos):
        self.calls.append((obs.reshape(len(action), self._num_steps, -1)[..., 0].numpy(), action))
        values = self._logits.expand(len(obs), -1)
        return SimpleNamespace(latent_state=torch.zeros(1), value=values, policy_logits=torch.zeros(1), reward=[0.0])


def make_buffer(config, lengths=(), *, truncated=False):
    """A buffer with one episode of each length."""
    buffer = PriorZeroGameBuffer(config, rng=np.random.default_rng(0))
    buffer.push(demo_segments(config, lengths=lengths, truncated=truncated))
    return buffer


def sample(buffer, config, *, size=None, value=0.0):
    return buffer.sample(size or config.batch_size, SimpleNamespace(_target_model=ConstantTarget(config, value)))


def terminal_targets(config, *, truncated):
    """Targets of the sequence at decision 1 of an episode with rewards 0, 1, 2, 3; all states have the value 10."""
    batch = sample(make_buffer(config, [4], truncated=truncated), config, size=4, value=10.0)
    row = batch.sequences.positions.tolist().index(1)
    assert batch.features.reshape(4, -1, FEATURE_SIZE)[row, :5, 0].tolist() == [1, 2, 3, 4, 4]
    g = config.discount_factor
    assert batch.rewards[row].ravel() == pytest.approx([1, 2, 3, 0, 0])
    # Two steps of reward, then the value of 10 unless the episode has ended.
    assert batch.value_targets[row].ravel() == pytest.approx([1 + 2 * g + 10 * g**2, 2 + 3 * g, 3, 0, 0], abs=1e-3)
    return batch.mask[row].tolist(), batch.policy_targets[row].sum(axis=-1)


def test_sample_teaches_that_a_terminal_state_is_absorbing_with_zero_value():
    mask, policies = terminal_targets(demo_config(), truncated=False)
    assert mask == [1, 1, 1, 1, 0]  # includes the terminal state, which has no policy target
    assert policies == pytest.approx([1, 1, 1, 0, 0])


def test_sample_masks_what_follows_a_truncated_episode():
    mask, _ = terminal_targets(demo_config(), truncated=True)
    assert mask == [1, 1, 1, 0, 0]


def test_sample_gives_both_models_the_same_decisions():
    config = demo_config(segment_length=5, batch_size=16)
    buffer = make_buffer(config, [3, 12, 1, 20])
    for _ in range(20):
        batch = sample(buffer, config)
        for row, record in enumerate(batch.sequences.records()):
            assert batch.features[row][:FEATURE_SIZE] == pytest.approx(record.features)
            assert batch.actions[row, 0] == record.action_index
            assert batch.rewards[row, 0] == record.reward
            assert batch.policy_targets[row, 0, record.action_indices] == pytest.approx(record.visit_probs())
            assert (batch.policy_targets[row].sum(axis=-1) <= 1 + 1e-5).all()


def test_decisions_are_runs_that_contain_the_first_decision_of_a_sequence():
    config = demo_config(segment_length=8, batch_size=16)
    buffer = make_buffer(config, [8, 20, 12])  # segments of 8 and 4
    for _ in range(20):
        sequences = sample(buffer, config).sequences
        decisions = sequences.decisions(10, run_length=4)
        for b, run in enumerate((slice(0, 4), slice(4, 7), slice(7, 10))):
            segment, records = sequences.segments[b], decisions.records[run]
            assert segment.records[sequences.positions[b]] in records
            start = segment.records.index(records[0])
            assert records == segment.records[start : start + len(records)]
            assert decisions.returns[run] == pytest.approx(segment.returns[start : start + len(records)])


@pytest.mark.parametrize("run_length", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_decisions_are_unbiased_with_respect_to_the_priorities(run_length, size):
    """The sum over all places of a run: each decision's expected weight is proportional to its probability."""
    (segment,) = demo_segments(demo_config(segment_length=20), lengths=[size])
    probs = np.random.default_rng(0).dirichlet(np.ones(size))
    expected = np.zeros(size)
    length = min(run_length, size)
    for position in range(size):
        for shift in range(length):
            sequences = SampledSequences([segment], np.array([position]), [probs], np.array([(shift + 0.5) / length]))
            decisions = sequences.decisions(run_length, run_length=run_length)
            for record, weight in zip(decisions.records, decisions.weights, strict=True):
                expected[record.step] += probs[position] / length * weight
    assert expected == pytest.approx(run_length * probs)
    if run_length == 1:
        assert decisions.weights.tolist() == [1.0]


def test_decisions_of_equal_priority_have_weights_near_one():
    (segment,) = demo_segments(demo_config(segment_length=40), lengths=[40])
    probs = [np.full(40, 1 / 40)]
    for position, want in ((20, [1, 1, 1, 1]), (0, [8 / 5, 8 / 7, 8 / 9, 8 / 11])):
        sequences = SampledSequences([segment], np.array([position]), probs, np.array([0.0]))
        assert sequences.decisions(4, run_length=4).weights == pytest.approx(want)


def test_sample_begins_at_every_decision_of_long_episodes_and_never_in_padding():
    config = demo_config(segment_length=4, batch_size=8)
    buffer = make_buffer(config, [40, 40])
    seen = set()
    for _ in range(100):
        sequences = sample(buffer, config).sequences
        assert all(t < len(s.records) for s, t in zip(sequences.segments, sequences.positions, strict=True))
        seen |= {(r.episode, r.step) for r in sequences.records()}
    assert seen == {(e, t) for e in range(2) for t in range(40)}


def test_sample_value_targets_are_discounted_rewards_and_the_bootstrapped_value():
    config = demo_config(segment_length=10, batch_size=6)  # td_steps 2, 4 unroll steps
    g = config.discount_factor
    batch = sample(make_buffer(config, [6]), config, value=7.0)  # rewards 0 1 2 3 4 5, then the end
    for row, t in enumerate(batch.sequences.positions):
        for u in range(5):
            now, td = t + u, min(2, 6 - t)
            expected = sum(g**i * (now + i) for i in range(td) if now + i < 6)
            expected += g**td * 7.0 if now + td < 6 else 0.0
            assert batch.value_targets[row, u] == pytest.approx(expected, abs=0.02), (t, u)  # categorical rounding


def test_sample_bootstraps_from_observations_and_the_actions_taken_there():
    config = demo_config(segment_length=10, batch_size=15)  # td_steps 2, 4 unroll steps
    target = ConstantTarget(config)
    batch = make_buffer(config, [20]).sample(config.batch_size, SimpleNamespace(_target_model=target))
    [(observations, actions)] = target.calls
    compared = 0
    for row, (segment, t) in enumerate(zip(batch.sequences.segments, batch.sequences.positions, strict=True)):
        if t + 2 >= len(segment.records):
            continue  # the bootstrap is beyond the segment
        first = segment.records[t].step + 2
        known = range(first, min(first + 4, segment.records[0].step + len(segment.records)))
        assert observations[row, : len(known)].tolist() == list(known)
        assert actions[row, : len(known)].tolist() == [demo_record(step).action_index for step in known]
        compared += len(known)
    assert compared > 30


def test_sample_contains_a_pair_of_steps_since_lightzero_divides_by_their_number():
    config = demo_config(segment_length=4, batch_size=2)
    buffer = make_buffer(config, [1] * 30 + [2], truncated=True)
    for _ in range(30):
        sequences = sample(buffer, config).sequences
        pairs = zip(sequences.segments, sequences.positions, strict=True)
        assert any(len(s.records) == 2 and t == 0 for s, t in pairs)
    with pytest.raises(UserError, match=r"env\.max_episode_steps"):
        sample(make_buffer(config, [1] * 30, truncated=True), config)
    batch = sample(make_buffer(config, [1] * 30), config)  # the absorbing step follows
    assert batch.mask[:, 1].tolist() == [1.0, 1.0]


def test_sample_refuses_more_sequences_than_decisions():
    config = demo_config()
    with pytest.raises(ValueError, match="cannot sample 8 sequences: only 3 decisions are stored"):
        sample(make_buffer(config, [3]), config, size=8)


def test_sample_weights_are_those_of_prioritised_replay():
    config = demo_config(segment_length=4, batch_size=3)
    buffer = make_buffer(config, [3])
    buffer.game_pos_priorities = np.array([1.0, 2.0, 4.0])
    batch = sample(buffer, config, size=3)
    probs = np.array([1.0, 2.0, 4.0]) ** 0.6
    probs /= probs.sum()
    weights = (3 * probs) ** -0.4
    weights /= weights.max()
    for row, record in enumerate(batch.sequences.records()):
        assert batch.weights[row] == pytest.approx(weights[record.step])


def test_batch_arrays_are_tensors_in_lightzeros_order():
    config = demo_config()
    batch = sample(make_buffer(config, [9]), config)
    arrays = batch.arrays()
    assert list(arrays) == ["current", "target"]
    assert [tuple(a.shape) for a in arrays["current"]] == [(4, 30), (4, 4), (4, 4), (4, 5), (4,), (4,), (4,), (4, 4)]
    assert [tuple(a.shape) for a in arrays["target"]] == [(4, 5), (4, 5), (4, 5, 8)]
    assert torch.equal(arrays["current"][3], torch.as_tensor(batch.mask))
    assert torch.equal(arrays["target"][1], torch.as_tensor(batch.value_targets))


def test_eviction_removes_as_many_index_entries_as_decisions():
    config = demo_config(segment_length=4, buffer_size=20, batch_size=4)
    buffer = make_buffer(config)
    for length in range(30):
        buffer.push(demo_segments(config, lengths=[1 + length % 11]))
        decisions = sum(len(s.records) for s in buffer.game_segment_buffer)
        assert buffer.get_num_of_transitions() == decisions == len(buffer.game_pos_priorities) <= 20
        if decisions >= 4:
            sequences = sample(buffer, config).sequences
            assert all(any(s is kept for kept in buffer.game_segment_buffer) for s in sequences.segments)
    assert buffer.num_evicted > 100


def test_lightzeros_own_eviction_still_counts_padding():
    config = demo_config(segment_length=4, batch_size=4)
    buffer = make_buffer(config, [20, 20])
    before, evicted = buffer.get_num_of_transitions(), len(buffer.game_segment_buffer[0].records)
    UniZeroGameBuffer._remove(buffer, 1)
    assert before - buffer.get_num_of_transitions() > evicted


def test_update_priority_determines_what_is_sampled_next():
    config = demo_config(segment_length=10, batch_size=4)
    buffer = make_buffer(config, [10, 10])
    batch = sample(buffer, config, size=20)
    buffer.update_priority(batch, np.array([1000.0 if r.step == 3 else 1e-6 for r in batch.sequences.records()]))
    assert [r.step for r in sample(buffer, config, size=2).sequences.records()] == [3, 3]


def test_update_priority_ignores_evicted_decisions():
    config = demo_config(segment_length=4, buffer_size=20, batch_size=4)
    buffer = make_buffer(config, [4, 4])
    batch = sample(buffer, config, size=8)
    buffer.push(demo_segments(config, lengths=[4, 4, 4, 4]))  # 24 decisions: the first 4 are evicted
    assert buffer.num_evicted == 4
    buffer.update_priority(batch, np.array([100.0 + r.episode for r in batch.sequences.records()]))
    assert buffer.game_pos_priorities[:4].tolist() == [101.0] * 4
    assert (buffer.game_pos_priorities[4:] == 1.0).all()
    batch = sample(buffer, config, size=20)  # sampled after the eviction
    buffer.update_priority(batch, np.array([10.0 * r.episode + r.step for r in batch.sequences.records()]))
    stored = [r for segment in buffer.game_segment_buffer for r in segment.records]
    assert buffer.game_pos_priorities.tolist() == [10.0 * r.episode + r.step for r in stored]


def test_buffer_state_dict_restores_what_is_sampled_next(tmp_path):
    config = demo_config(segment_length=4, buffer_size=20, batch_size=4)
    buffer = make_buffer(config, [9, 9, 9])
    batch = sample(buffer, config)
    buffer.update_priority(batch, np.arange(1.0, 5.0))
    table = RecordTable()
    torch.save({"buffer": buffer.state_dict(table), "records": table.state_dict()}, tmp_path / "replay.pt")
    state = torch.load(tmp_path / "replay.pt", weights_only=True)
    restored = PriorZeroGameBuffer(config, rng=np.random.default_rng(99))
    restored.load_state_dict(state["buffer"], read_records(state["records"]))
    for _ in range(3):
        expected, found = sample(buffer, config), sample(restored, config)
        for name in ("features", "indices", "weights", "mask", "rewards", "value_targets", "policy_targets"):
            assert np.array_equal(getattr(expected, name), getattr(found, name)), name
        assert expected.sequences.returns().tolist() == found.sequences.returns().tolist()
    assert restored.num_evicted == buffer.num_evicted > 0


def realistic_record(step, *, episode, done):
    """A decision of the size that the default settings give. It shares no text and no array with other decisions."""
    name = f"{episode}-{step}"
    record = demo_record(step, episode=episode, done=done)
    state = dataclasses.replace(
        record.state,
        feedback=f"Taken, number {name}. " + "The grue looks at you. " * 17,  # 400 characters
        valid_actions=tuple(f"put sword {name}-{k} into the old brown sack" for k in range(20)),
        look=f"Room {name}: " + "a dusty place full of things. " * 10,
        inventory=f"You carry {name}: " + "a lamp, a rope, " * 9,
    )
    return dataclasses.replace(
        record,
        state=pickle.loads(pickle.dumps(state)),  # every string is a new object, as after the transfer from a process
        features=np.full(3 * 384 + 128, step, dtype=np.float32),
        action_indices=np.arange(20) + step,
        prompt=f"Decision {name}. " + "x" * 3000,
        prior=ActionPrior(np.full(20, -3.0, dtype=np.float32), "score", step),
        visit_counts=np.full(20, 5),
    )


def test_buffer_takes_less_than_20_kb_for_a_decision():
    """Counts the memory of numpy's arrays and of Python's objects."""
    settings = Settings(env=EnvSettings(action_space_size=256), replay=ReplaySettings(buffer_size=1000))
    config = unizero_config(settings, feature_size=3 * 384 + 128, device="cpu")
    buffer = make_buffer(config)
    final = np.zeros(3 * 384 + 128, dtype=np.float32)
    gc.collect()
    tracemalloc.start()
    try:
        for episode in range(12):  # the buffer holds 10 of these
            writer = SegmentWriter(config)
            for step in range(100):
                record = realistic_record(step, episode=episode, done=step == 99)
                buffer.push(writer.add(record, next_features=final))
        del writer, record
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert buffer.get_num_of_transitions() == 1000 and buffer.num_evicted == 200
    assert held < 1000 * 20e3, f"{held / 1000:.0f} bytes for a decision"
