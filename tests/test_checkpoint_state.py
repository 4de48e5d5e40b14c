"""What a checkpoint contains comes back as it was: step records and random number generators."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from priorzero.runtime.random_state import global_random_state, set_global_random_state
from priorzero.world_model.records import RecordTable, pack_arrays, read_records, unpack_arrays
from tests.helpers.segments import demo_record


@given(st.lists(st.one_of(st.none(), st.lists(st.integers(-(2**40), 2**40), max_size=5)), max_size=6))
def test_pack_arrays_is_inverted_by_unpack_arrays(rows):
    arrays = [None if row is None else np.array(row, dtype=np.int64) for row in rows]
    again = unpack_arrays(pack_arrays(arrays))
    assert [None if a is None else a.tolist() for a in again] == rows
    assert all(a is None or len(a) == 0 or a.dtype == np.int64 for a in again)


def test_record_table_stores_each_record_once_and_restores_it(tmp_path):
    records = [demo_record(t, episode=3, done=t == 6) for t in range(7)]
    table = RecordTable()
    numbers = [table.number(record) for record in [*records, *records[2:5]]]
    assert numbers == [0, 1, 2, 3, 4, 5, 6, 2, 3, 4]
    torch.save(table.state_dict(), tmp_path / "records.pt")
    again = read_records(torch.load(tmp_path / "records.pt", weights_only=True))
    for old, new in zip(records, again, strict=True):
        assert (old.state, old.prompt, old.reward, old.done) == (new.state, new.prompt, new.reward, new.done)
        assert (old.episode, old.step, old.chosen, old.shaping) == (new.episode, new.step, new.chosen, new.shaping)
        assert (old.root_value, old.predicted_value) == (new.root_value, new.predicted_value)
        for name in ("features", "action_indices", "visit_counts"):
            a, b = getattr(old, name), getattr(new, name)
            assert a.dtype == b.dtype and np.array_equal(a, b)
        assert (old.prior is None) == (new.prior is None)
        if old.prior is not None:
            assert np.array_equal(old.prior.logprobs, new.prior.logprobs) and old.prior.source == new.prior.source


def test_random_state_restores_all_generators(tmp_path):
    def draw():
        return random.random(), np.random.rand(3).tolist(), np.random.randn(), torch.rand(3).tolist()

    np.random.randn()  # numpy draws normal numbers in pairs; one of the pair is part of the state
    rng = np.random.default_rng(7)
    torch.save({"global": global_random_state(), "own": rng.bit_generator.state}, tmp_path / "random.pt")
    first, own = draw(), rng.random(5).tolist()
    draw()
    state = torch.load(tmp_path / "random.pt", weights_only=True)
    set_global_random_state(state["global"])
    rng.bit_generator.state = state["own"]
    assert draw() == first and rng.random(5).tolist() == own
