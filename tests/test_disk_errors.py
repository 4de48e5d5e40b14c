"""Errors of the file system during a run: one message, the last checkpoint stays, and the run can be resumed."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import stat
import subprocess
from pathlib import Path

import psutil
import pytest
from loguru import logger
from tensorboardX.event_file_writer import EventsWriter

from priorzero.envs import textworld_files
from priorzero.envs.textworld_files import get_or_make, parse_request
from priorzero.runs.checkpoint import saved_checkpoints
from priorzero.runs.errors import disk_advice
from priorzero.runs.loggers.tensorboard import TensorBoardLogger
from priorzero.runs.progress import LogFile, Progress
from priorzero.runs.resume import newest_checkpoint
from priorzero.runs.saver import Saver
from priorzero.runtime.paths import replace_text
from priorzero.types import UserError
from tests.helpers.models import make_settings
from tests.helpers.runs import NO_LLM, lines, short_settings, train
from tests.helpers.toy_game import toy_games


def run(folder, *layers, checkpoint=None):
    with toy_games():
        return train(short_settings(folder, NO_LLM, *layers), checkpoint=checkpoint)


def fail_from_iteration(monkeypatch, number, fail):
    """Call ``fail`` when the iteration is shown."""
    show = Progress.show

    def show_and_fail(self, **values):
        show(self, **values)
        if values["iteration"] == number:
            fail()

    monkeypatch.setattr(Progress, "show", show_and_fail)


# ---- runs ----


@pytest.mark.parametrize(
    ("number", "name", "advice"),
    [
        (errno.EACCES, "episodes.jsonl", "make it writable, then type --resume"),
        (errno.ENOSPC, "metrics.csv", "free some space, or ask for a larger quota, then type --resume"),
        (errno.EDQUOT, "last_evaluation.json.tmp", "free some space, or ask for a larger quota, then type --resume"),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else None,
)
def test_run_with_a_disk_error_is_resumed(tmp_path, monkeypatch, capfd, number, name, advice):
    """All files are opened with this function. No other one fails, so that the log says the same as the message."""
    original, broken = io.open, []
    loggers = {"run": {"loggers": ["tensorboard", "csv"]}}

    def faulty_open(file, *arguments, **keywords):
        if broken and str(file).endswith(name):
            raise OSError(number, os.strerror(number), str(file))
        return original(file, *arguments, **keywords)

    with monkeypatch.context() as patch:
        fail_from_iteration(patch, 5, lambda: broken.append(True))
        patch.setattr(io, "open", faulty_open)
        patch.setattr(builtins, "open", faulty_open)
        with pytest.raises(UserError, match=os.strerror(number)) as caught:
            run(tmp_path, loggers)
    assert str(caught.value).startswith(f"{tmp_path / 'run'}: cannot write") and advice in str(caught.value)
    assert saved_checkpoints(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.tmp")) and "Traceback" not in capfd.readouterr().err
    second = run(tmp_path, loggers, checkpoint=newest_checkpoint(tmp_path / "run"))
    assert second.rows["iterations"] == 6 and len(lines(second.folder, "evaluations.jsonl")) == 2
    rows = [line.split(",")[:3] for line in (second.folder / "metrics.csv").read_text().splitlines()]
    assert ["time/run_s", "iteration", "6"] in rows and len(rows) == len({tuple(row) for row in rows})  # none twice
    assert len(lines(second.folder, "episodes.jsonl")) == second.rows["episodes finished"]


def test_run_whose_folder_is_moved_ends_and_is_resumed_when_it_is_back(tmp_path, monkeypatch, capfd):
    folder, elsewhere = tmp_path / "run", tmp_path / "moved"
    with monkeypatch.context() as patch:
        fail_from_iteration(patch, 4, lambda: folder.rename(elsewhere))
        with pytest.raises(UserError, match=r"cannot write .*if the run's folder was moved, move it back, then type"):
            run(tmp_path)
    stderr = capfd.readouterr().err
    assert "Traceback" not in stderr and "trace.json could not be written" in stderr
    assert not folder.exists()
    elsewhere.rename(folder)
    assert run(tmp_path, checkpoint=newest_checkpoint(folder)).rows["iterations"] == 6


def test_run_saves_again_when_the_disk_has_recovered(tmp_path, monkeypatch, capfd):
    """The first checkpoint cannot be synchronised to the disk."""
    fsync, failures = os.fsync, []

    def faulty_fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) and not failures:
            failures.append(descriptor)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", faulty_fsync)
    summary = run(tmp_path)
    assert summary.rows["iterations"] == 6
    stderr = capfd.readouterr().err
    assert "checkpoint iteration_3 could not be written ([Errno 116] Stale file handle)" in stderr
    assert [path.name for path in saved_checkpoints(summary.folder)] == ["iteration_6"]
    assert [path.name for path in (summary.folder / "checkpoints").iterdir()] == ["iteration_6"]


def test_run_on_a_disk_that_is_too_small_for_a_checkpoint(tmp_path, monkeypatch, capfd):
    """A real full disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a tmpfs")
    monkeypatch.setattr("priorzero.preflight.checkpoint_size", lambda *_, **__: 0)
    try:
        with pytest.raises(UserError, match="the run has ended, but iteration_6 could not be written"):
            run(disk)
        assert len(lines(disk / "run", "evaluations.jsonl")) == 2
        assert not saved_checkpoints(disk / "run") and not list((disk / "run" / "checkpoints").iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    stderr = capfd.readouterr().err
    assert "checkpoint iteration_3 could not be written" in stderr and "Traceback" not in stderr


# ---- advice ----


def test_disk_advice_is_for_the_files_of_the_run():
    folder = Path("data/run")
    inside, outside = str(folder.absolute() / "episodes.jsonl"), "/etc/model"
    assert disk_advice(OSError(errno.EACCES, "denied", inside), folder=folder) == "make it writable"
    assert disk_advice(OSError(errno.EXDEV, "rename", outside, None, inside), folder=folder) is None
    assert disk_advice(OSError(errno.ENOENT, "rename", outside, None, inside), folder=folder) is not None
    assert disk_advice(OSError(errno.EACCES, "denied", outside), folder=folder) is None
    assert disk_advice(OSError(errno.EPIPE, "broken pipe"), folder=folder) is None
    assert disk_advice(OSError("no number"), folder=folder) is None
    for number in (errno.EIO, errno.ESTALE, errno.EDQUOT, errno.EMFILE, errno.EROFS):
        assert disk_advice(OSError(number, os.strerror(number)), folder=folder) is not None


# ---- writers ----


def test_log_file_that_cannot_be_written_is_reported_once_and_tried_again(tmp_path, capsys):
    log = LogFile(tmp_path / "log" / "run.log")
    log.write("two\n")
    assert capsys.readouterr().err.count("run.log cannot be written ([Errno 2] No such file or directory") == 1
    (tmp_path / "log").mkdir()
    log.write("three\n")
    log.write("a file's name: \udcff\n")
    log.stop()
    expected = "(2 messages could not be written)\nthree\na file's name: \\udcff\n"
    assert (tmp_path / "log" / "run.log").read_text() == expected and capsys.readouterr().err == ""


def test_log_file_that_is_full_is_renamed(tmp_path):
    log = LogFile(tmp_path / "run.log", max_bytes=5)
    for text in ("first\n", "second\n", "third\n"):
        log.write(text)
    log.stop()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"run.1.log": "first\n", "run.2.log": "second\n", "run.log": "third\n"}


def test_replace_text_leaves_the_old_file_if_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    replace_text(path, "old")

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_tensorboard_logger_is_closed_on_a_full_disk(tmp_path, monkeypatch):
    writer = TensorBoardLogger(tmp_path)

    def no_space(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    messages: list[str] = []
    sink = logger.add(messages.append, format="{message}")
    with monkeypatch.context() as patch:
        patch.setattr(EventsWriter, "close", no_space)
        writer.close(failed=True)
    logger.remove(sink)
    assert messages == ["a metrics file was not closed properly ([Errno 28] No space left on device)\n"]
    writer.close(failed=True)


def test_tensorboard_logger_closes_both_files_if_one_cannot_be_written(tmp_path, monkeypatch):
    def open_event_files():
        return {Path(file.path) for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))}

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    close = EventsWriter.close

    def close_or_fail(writer):
        close(writer)
        if Path(writer._file_name).parent == tmp_path / "b":
            no_space()

    for folder, method, fail in (("a", "write_event", no_space), ("b", "close", close_or_fail)):
        (tmp_path / folder).mkdir()
        writer = TensorBoardLogger(tmp_path / folder, settings=make_settings())
        assert len(open_event_files()) == 2  # the run's and that of the HParams plugin
        with monkeypatch.context() as patch:
            patch.setattr(EventsWriter, method, fail)
            writer.close(failed=True)
        assert open_event_files() == set()


async def test_saver_keeps_a_checkpoint_if_an_older_one_cannot_be_removed(tmp_path, monkeypatch):
    saver = Saver(tmp_path, keep=1)

    def write(folder):
        (folder / "training.pt").touch()

    await saver.save("iteration_1", write=write, about={})
    rename = Path.rename

    def faulty_rename(path, target):
        if path.name == "iteration_1":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", faulty_rename)
    await saver.save("iteration_2", write=write, about={})
    assert saver.last == tmp_path / "checkpoints" / "iteration_2" and not saver.failure


def test_textworld_game_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    output = "Traceback ...\nOSError: [Errno 28] No space left on device"
    failed = subprocess.CompletedProcess([], 1, stdout=output)
    monkeypatch.setattr(textworld_files.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"Cannot generate the game in .*: No space left.*Set XDG_CACHE_HOME"):
        get_or_make(parse_request("textworld:simple?seed=7"), tmp_path)
    assert not list(tmp_path.rglob("*simple*"))
