"""The folder of a run: its name, its lock and the files that are cut when it is resumed."""

from __future__ import annotations

import re

import pytest

from priorzero.runs.folder import create_files, lock_folder, new_run_folder, rename_unsaved, truncate_files
from priorzero.types import UserError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.models import make_settings
from tests.helpers.toy_game import toy_spec


def test_new_run_folder_is_named_after_games_seed_and_time(tmp_path):
    settings = make_settings({"run": {"output_dir": str(tmp_path), "seed": 3}})
    first = new_run_folder(settings, [toy_spec("toy"), toy_spec("other")])
    assert re.fullmatch(r"toy_and_1_more_seed3_\d{8}-\d{6}", first.name) and first.parent == tmp_path
    first.mkdir()
    second = new_run_folder(settings, [toy_spec("toy"), toy_spec("other")])
    assert second != first and not second.exists()


def test_truncate_files_cuts_to_the_sizes_of_the_checkpoint(tmp_path):
    names = ("episodes.jsonl", "evaluations.jsonl", "events.out.tfevents.1.a", "events.out.tfevents.2.a", "notes.jsonl")
    for name in names:
        (tmp_path / name).write_text("12345")
    truncate_files(tmp_path, {"episodes.jsonl": 3, "events.out.tfevents.1.a": 5, "missing.jsonl": 4})
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == {"episodes.jsonl": "123", "events.out.tfevents.1.a": "12345", "notes.jsonl": "12345"}


def test_lock_folder_admits_one_process(tmp_path):
    with lock_folder(tmp_path), pytest.raises(UserError, match="another process"):
        lock_folder(tmp_path)
    lock_folder(tmp_path).close()


def test_create_files_locks_a_new_run_only(tmp_path):
    settings = make_settings({"run": {"output_dir": str(tmp_path)}})
    lock = create_files(settings, tmp_path / "new", resumed=False)
    with pytest.raises(UserError, match="another process"):
        lock_folder(tmp_path / "new")
    assert create_files(settings, tmp_path / "new", resumed=True) is None
    lock.close()
    with pytest.raises(UserError, match="cannot be written"):
        create_files(settings, tmp_path / "new", resumed=False)  # it exists by now


def test_rename_unsaved_frees_the_name_of_a_run_without_checkpoints(tmp_path):
    assert rename_unsaved(tmp_path, "job") is None
    for n in (1, 2):
        (tmp_path / "job").mkdir()
        assert rename_unsaved(tmp_path, "job") == tmp_path / f"job.unsaved{n}"
    (tmp_path / "job").mkdir()
    with lock_folder(tmp_path / "job"), pytest.raises(UserError, match="another process"):
        rename_unsaved(tmp_path, "job")
    write_checkpoint(tmp_path / "job" / "checkpoints" / "iteration_1")
    assert rename_unsaved(tmp_path, "job") is None


def test_rename_unsaved_stays_below_the_output_folder(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "data").mkdir()
    assert rename_unsaved(tmp_path / "data", "../secret") is None and rename_unsaved(tmp_path / "data", "") is None
    assert (tmp_path / "secret").is_dir()
