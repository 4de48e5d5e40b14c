"""The folder of a run: its name, its creation, its lock and the files that are cut when it is resumed."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from priorzero.runs.files import recording_path
from priorzero.runs.folder import (
    check_run_folder,
    create_files,
    given_folder,
    is_run_name,
    lock_folder,
    new_run_folder,
    rename_unsaved,
    truncate_files,
)
from priorzero.types import UserError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.models import make_settings
from tests.helpers.toy_game import toy_spec

ROOT = Path(__file__).parent.parent


def folder_settings(folder, **run):
    return make_settings({"run": {"output_dir": str(folder), **run}})


# ---- the name ----


def test_new_run_folder_is_named_after_games_seed_and_time(tmp_path):
    games = [toy_spec("toy"), toy_spec("other")]
    with new_run_folder(folder_settings(tmp_path, seed=3), games) as first:
        assert re.fullmatch(r"toy_and_1_more_seed3_\d{8}-\d{6}", first.name) and first.parent == tmp_path


@pytest.mark.parametrize("num_games", [1, 10, 1000])
def test_new_run_folder_has_a_bounded_name_that_can_be_given_again(tmp_path, num_games):
    games = [dataclasses.replace(toy_spec("toy"), name="textworld-cooking-" + "x" * 300)] * num_games
    settings = folder_settings(tmp_path, seed=2_000_000_000)
    with new_run_folder(settings, games) as folder:
        assert is_run_name(folder.name) and folder.name.startswith("textworld-cooking-")


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", "/", "-a", "x" * 101, "語" * 100, "a\n", " a", "a b", "~"])
def test_new_run_folder_refuses_names(tmp_path, name):
    with (
        pytest.raises(UserError, match="use at most 100 letters, digits"),
        new_run_folder(folder_settings(tmp_path, exp_name=name), [toy_spec("toy")]),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["2024_01_05", "null", "010", "1e3", "Zürich", "語" * 60])
def test_new_run_folder_accepts_names(tmp_path, name):
    with new_run_folder(folder_settings(tmp_path, exp_name=name), [toy_spec("toy")]) as folder:
        assert folder == tmp_path / name and folder.is_dir()


# ---- runs that start at the same time ----


def test_new_run_folder_is_created_for_one_run_alone(tmp_path, monkeypatch):
    """The runs of one second have the same name, except for a number."""
    monkeypatch.setattr(time, "strftime", lambda _: "20240105-123000")
    start, done = threading.Barrier(20, timeout=30), threading.Barrier(20, timeout=30)

    def claim(_):
        start.wait()
        with new_run_folder(folder_settings(tmp_path / "new" / "data"), [toy_spec("toy")]) as folder:
            with pytest.raises(UserError, match="another process"):
                lock_folder(folder)
            done.wait()
            (folder / "config.yaml").touch()
            return folder.name

    with ThreadPoolExecutor(20) as pool:
        names = list(pool.map(claim, range(20)))
    stem = "toy_seed0_20240105-123000"
    assert sorted(names) == sorted([stem, *(f"{stem}_{n}" for n in range(2, 21))])


def test_new_run_folder_with_a_name_is_given_to_one_of_many(tmp_path):
    start, done = threading.Barrier(20, timeout=30), threading.Barrier(20, timeout=30)

    def claim(_):
        start.wait()
        try:
            with new_run_folder(folder_settings(tmp_path / "data", exp_name="mine"), [toy_spec("toy")]) as folder:
                done.wait()
                (folder / "config.yaml").touch()
                return folder.name
        except UserError as error:
            done.wait()
            return str(error)

    with ThreadPoolExecutor(20) as pool:
        outcomes = list(pool.map(claim, range(20)))
    assert outcomes.count("mine") == 1
    assert sum("run.exp_name=mine" in text and "exists already; give another name" in text for text in outcomes) == 19


def test_new_run_folder_survives_runs_that_remove_their_unused_folders(tmp_path):
    """A run that fails removes the folder of all runs if it had created it, while others want to use it."""

    def claim(n):
        for _ in range(20):
            with new_run_folder(folder_settings(tmp_path / "data", exp_name=f"run{n}"), [toy_spec("toy")]) as folder:
                assert folder.is_dir()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(claim, range(8)))
    assert not list(tmp_path.glob("data/*"))


# ---- what remains ----


def test_new_run_folder_is_removed_if_nothing_was_written(tmp_path):
    (tmp_path / "old").mkdir()
    for root in (tmp_path / "old", tmp_path / "new" / "deep"):
        with pytest.raises(KeyError), new_run_folder(folder_settings(root), [toy_spec("toy")]):
            raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    with new_run_folder(folder_settings(tmp_path / "new", exp_name="run"), [toy_spec("toy")]) as folder:
        create_files(folder_settings(tmp_path), folder)
    lock_folder(folder).close()  # it is unlocked
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.yaml", "log"]


def test_new_run_folder_is_removed_by_a_signal(tmp_path):
    code = (
        "import sys, os, signal\n"
        "from tests.test_run_folder import folder_settings, new_run_folder, toy_spec\n"
        "from priorzero.runtime.concurrency import exit_immediately_on_signal\n"
        "with exit_immediately_on_signal(), new_run_folder(folder_settings('new/data'), [toy_spec('toy')]) as folder:\n"
        "    assert folder.is_dir()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 130 and list(tmp_path.iterdir()) == []


# ---- run.output_dir ----


def test_check_run_folder_refuses_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for root, words in (
        (tmp_path / "file", "file is not a writable folder"),
        (tmp_path / "file" / "sub", "file is not a writable folder"),
        ("/proc/data", "/proc is not a writable folder"),
        ("/proc", "/proc is not a writable folder"),
        ("/sys/data", "/sys is not a writable folder"),
        (tmp_path / "loop", "cannot be accessed"),
        ("x" * 300, "a name in this path has 300 bytes"),
        ("x/" * 3000, "the path has 6000 bytes"),
        ("", "run.output_dir is empty"),
        ("~nobody-of-this-name/data", "there is no user nobody-of-this-name"),
        ("$PRIORZERO_NOT_SET/data", "variable PRIORZERO_NOT_SET is not set"),
    ):
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            check_run_folder(folder_settings(root))
        assert "run.output_dir" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_new_run_folder_expands_home_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", "scratch")
    monkeypatch.chdir(tmp_path)
    literal = tmp_path / "$literal"
    literal.mkdir()
    for given, root in (
        ("~/data", tmp_path / "home" / "data"),
        ("${SCRATCH}/$SCRATCH", Path("scratch/scratch")),
        ("./~", tmp_path / "~"),
        (str(literal), literal),
        ('it\'s a "quoted" ünïcode', Path('it\'s a "quoted" ünïcode')),
    ):
        with new_run_folder(folder_settings(given, exp_name="run"), [toy_spec("toy")]) as folder:
            assert folder == root / "run" and folder.is_dir()


def test_given_folder_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "run" / "log").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "log")
    for given in ("..", "../", "../../run", tmp_path / "run", f"{tmp_path}/run//", "../log/.."):
        assert given_folder(given, what="") == tmp_path / "run"
    monkeypatch.chdir(tmp_path / "run")
    assert given_folder(".", what="") == tmp_path / "run" and given_folder("log/", what="") == Path("log")


def test_truncate_files_cuts_to_the_sizes_of_the_checkpoint(tmp_path):
    names = ("episodes.jsonl", "evaluations.jsonl", "events.out.tfevents.1.a", "events.out.tfevents.2.a", "notes.jsonl")
    for name in names:
        (tmp_path / name).write_text("12345")
    (tmp_path / "recordings").mkdir()
    recordings = [recording_path(tmp_path, env_step=step, episode=step // 4) for step in (4, 8, 12)]
    pages = [path.with_suffix(".html") for path in recordings[1:]]
    for path in (*recordings, *pages, tmp_path / "recordings" / "mine.json"):
        path.write_text("{}")
    truncate_files(tmp_path, {"episodes.jsonl": 3, "events.out.tfevents.1.a": 5, "missing.jsonl": 4}, env_step=8)
    left = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert left == {"episodes.jsonl": "123", "events.out.tfevents.1.a": "12345", "notes.jsonl": "12345"}
    kept = {path.name for path in (tmp_path / "recordings").iterdir()}
    assert kept == {"mine.json", *(path.name for path in (*recordings[:2], pages[0]))}


def test_lock_folder_admits_one_process(tmp_path):
    with lock_folder(tmp_path), pytest.raises(UserError, match="another process"):
        lock_folder(tmp_path)
    lock_folder(tmp_path).close()


def test_create_files_reports_a_folder_that_cannot_be_written(tmp_path):
    create_files(folder_settings(tmp_path), tmp_path)
    create_files(folder_settings(tmp_path), tmp_path)  # when it is resumed
    with pytest.raises(UserError, match="cannot be written"):
        create_files(folder_settings(tmp_path), tmp_path / "missing")


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
