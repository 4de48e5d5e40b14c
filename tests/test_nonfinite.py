"""Non-finite updates are counted, their batches are saved, and too many in a row end the run."""

from __future__ import annotations

import pytest
import torch

from priorzero.runs.nonfinite import MAX_SAVED_BATCHES, NonFiniteUpdates
from priorzero.types import NonFiniteError, UserError
from priorzero.world_model.records import read_records
from tests.helpers.segments import demo_record

ERROR = NonFiniteError("the loss is not finite")


def test_nonfinite_updates_save_the_first_batches(tmp_path):
    updates = NonFiniteUpdates(tmp_path / "not_finite", limit=100)
    records = [demo_record(0), demo_record(1)]
    for n in range(MAX_SAVED_BATCHES + 2):
        updates.skipped("LLM", ERROR, records=records, arrays={"n": torch.tensor(n)})
    assert updates.total == MAX_SAVED_BATCHES + 2
    names = sorted(path.name for path in (tmp_path / "not_finite").iterdir())
    assert names == [f"batch_{n}.pt" for n in range(1, MAX_SAVED_BATCHES + 1)]
    saved = torch.load(tmp_path / "not_finite" / "batch_2.pt", weights_only=True)
    assert saved["error"] == "the loss is not finite" and saved["arrays"]["n"] == 1
    assert [record.state for record in read_records(saved["records"])] == [record.state for record in records]


def test_nonfinite_updates_end_the_run_after_too_many_in_a_row_of_one_model(tmp_path):
    updates = NonFiniteUpdates(tmp_path, limit=2)

    def skip(model):
        updates.skipped(model, ERROR, records=[], arrays={})

    skip("LLM")
    skip("world model")
    updates.applied("LLM")
    skip("LLM")
    with pytest.raises(
        UserError, match=r"2 non-finite updates in a row .*\(train\.max_nonfinite_updates\): the loss is"
    ):
        skip("LLM")
    assert updates.total == 4


def test_nonfinite_updates_continue_the_count_of_a_resumed_run(tmp_path):
    first = NonFiniteUpdates(tmp_path, limit=2)
    first.skipped("LLM", ERROR, records=[], arrays={})
    again = NonFiniteUpdates(tmp_path, limit=2)
    again.load_state_dict(first.state_dict())
    with pytest.raises(UserError, match="2 non-finite updates in a row"):
        again.skipped("LLM", ERROR, records=[], arrays={})
    assert again.total == 2


def test_nonfinite_updates_on_a_full_disk_are_counted(tmp_path, monkeypatch):
    def full_disk(*_):
        raise RuntimeError("file write failed")

    monkeypatch.setattr(torch, "save", full_disk)
    updates = NonFiniteUpdates(tmp_path / "not_finite", limit=2)
    updates.skipped("LLM", ERROR, records=[], arrays={})
    assert updates.total == 1
