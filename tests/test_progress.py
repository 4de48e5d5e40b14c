"""What the terminal shows: the live line, messages above it, reports of long activities, and the status of a run."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import subprocess
import sys
import time

import pytest
from loguru import logger

from priorzero.runs import progress
from priorzero.runs.progress import Display, Progress, terminal_output
from priorzero.runtime.activity import Activities, announced
from tests.helpers.terminal import Terminal, shown_lines


@pytest.fixture(autouse=True)
def quick_refresh(monkeypatch):
    monkeypatch.setattr(progress, "REFRESH_S", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def logged(output):
    """Messages in an output, without time and level."""
    return [line[17:] for line in output.splitlines()]


# ---- the display ----


def test_display_shows_activities_and_status_in_the_last_line_of_a_terminal():
    terminal = Terminal()
    display = Display(terminal, watched=(watched := Activities()))
    display.start()
    with watched.announced("collecting"):
        display.status = lambda: "iteration 3/10"
        wait_until(lambda: terminal.shown[-1] == "collecting  iteration 3/10")
    display.status = lambda: "iteration 4/10"
    wait_until(lambda: terminal.shown[-1] == "iteration 4/10")
    display.stop()
    assert terminal.shown[0] == "" and set(terminal.shown) == {""}


def test_display_counts_the_seconds_of_an_activity():
    terminal, now = Terminal(), [100.0]
    display = Display(terminal, watched=(watched := Activities(lambda: now[0])))
    display.start()
    with watched.announced("loading the LLM"):
        wait_until(lambda: terminal.shown[-1].rstrip() == "loading the LLM")
        now[0] = 113.0
        wait_until(lambda: terminal.shown[-1].rstrip() == "loading the LLM (13 s)")
    display.stop()
    assert "still" not in terminal.getvalue()  # the live line says it


def test_display_writes_messages_above_the_live_line():
    terminal = Terminal()
    with terminal_output(terminal), announced("collecting"):
        wait_until(lambda: terminal.shown[-1].startswith("collecting"))
        logger.info("[bold]a message[/bold] :smile:")  # no markup
        logger.warning("two\nlines of " + 30 * "long text ")
        print("printed by a package", file=sys.stderr)
        wait_until(lambda: terminal.shown[-1].startswith("collecting"))
        above = terminal.shown[:-1]
    assert [above[0][17:], above[1][17:], *above[2:]] == [
        "[bold]a message[/bold] :smile:",
        "two",
        "lines of " + 30 * "long text ",
        "printed by a package",
    ]
    assert terminal.shown[:4] == above and set(terminal.shown[4:]) == {""}


def test_display_shows_a_long_status_in_several_lines():
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "40")
        display = Display(terminal, watched=Activities())
        display.status = lambda: 100 * "x"
        display.start()
        wait_until(lambda: terminal.shown[-1])
        assert terminal.shown == [40 * "x", 40 * "x", 20 * "x"]
        display.stop()
        assert set(terminal.shown) == {""}


@pytest.mark.parametrize(("make", "term"), [(io.StringIO, "xterm"), (Terminal, "dumb")])
def test_display_writes_plain_lines_without_a_terminal(make, term, monkeypatch):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")
    output, now = make(), [100.0]
    display = Display(output, watched=(watched := Activities(lambda: now[0])))
    display.start()
    with watched.announced("loading the LLM"):
        logger.info("a message")
        now[0] = 110.0
        wait_until(lambda: "10 s" in output.getvalue())
        now[0] = 135.0
        wait_until(lambda: "35 s" in output.getvalue())
    logger.bind(topic="segments").info("for a file only")
    logger.debug("not shown")
    display.stop()
    assert "\x1b" not in output.getvalue() and "\r" not in output.getvalue()
    assert logged(output.getvalue()) == ["a message", "still loading the LLM (10 s)", "still loading the LLM (35 s)"]


def test_terminal_output_removes_the_live_line_after_an_error_and_can_be_nested():
    terminal, other = Terminal(), Terminal()
    with pytest.raises(RuntimeError), terminal_output(terminal), terminal_output(other), announced("collecting"):
        wait_until(lambda: terminal.shown[-1].startswith("collecting"))
        raise RuntimeError
    assert set(terminal.shown) == {""} and other.getvalue() == ""
    with terminal_output(other):  # the first one has ended
        logger.info("again")
    assert other.shown[0].endswith("again") and "again" not in terminal.getvalue()


def test_terminal_output_leaves_a_clean_terminal_when_the_process_exits_immediately():
    code = (
        "import os, signal, time\n"
        "from priorzero.runtime.concurrency import exit_immediately_on_signal\n"
        "from priorzero.runs.progress import terminal_output\n"
        "from priorzero.runtime.activity import announced\n"
        "with exit_immediately_on_signal(), terminal_output(), announced('loading the LLM'):\n"
        "    time.sleep(1.2)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    own, other = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=other, stdout=other, stderr=other)
    os.close(other)
    output = b""
    try:
        while chunk := os.read(own, 10_000):
            output += chunk
    except OSError:  # the process has closed its end
        pass
    assert process.wait() == 130
    text = output.decode()
    assert "loading the LLM" in text
    lines = [line for line in shown_lines(text) if line]
    assert lines == ["SIGINT: exiting immediately; nothing more is saved"]
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is visible


def test_terminal_output_continues_when_the_terminal_is_closed(tmp_path):
    own, other = pty.openpty()
    terminal = os.fdopen(other, "w")
    with terminal_output(terminal), announced("collecting"):
        progress.open_logs(tmp_path)
        os.close(own)
        wait_until(lambda: "the terminal cannot be written" in (tmp_path / "run.log").read_text())
        logger.info("the run continues")
    with contextlib.suppress(OSError):  # it still has text to write
        terminal.close()
    assert "the run continues" in (tmp_path / "run.log").read_text()


# ---- the status of a run ----


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def make_progress(**arguments):
    clock = Clock()
    return clock, Progress(**{"max_iter": 10, "max_env_step": 1000, "every": 1, "clock": clock, **arguments})


def show(progress, iteration, env_step, *, episode_return=None, world_model_loss=None, llm_loss=None):
    progress.show(
        iteration=iteration,
        env_step=env_step,
        episode_return=episode_return,
        world_model_loss=world_model_loss,
        llm_loss=llm_loss,
    )


def test_progress_measures_speed_and_time_left_from_the_first_iteration_on():
    steps = [0]
    clock, progress = make_progress(env_steps=lambda: steps[0])
    progress.start(iteration=0, env_step=0)
    assert progress.status() == "iteration 0/10  env steps 0  left ?"
    clock.now, steps[0] = 107.0, 12  # in the middle of an iteration
    assert progress.status() == "iteration 0/10  env steps 12  left ?"
    clock.now, steps[0] = 110.0, 20  # 10 s for 1 of 10 iterations
    show(progress, 1, 20)
    assert progress.status() == "iteration 1/10  env steps 20  left 0:01:30  return -  2.00 env steps/s"
    clock.now = 115.0
    progress.start(iteration=1, env_step=20)  # has no effect
    show(progress, 2, 45, episode_return=1.25, world_model_loss=12.345, llm_loss=0.5)  # 15 s for 2 iterations
    steps[0] = 45
    assert progress.status() == (
        "iteration 2/10  env steps 45  left 0:01:00  return 1.25  loss: world model 12.3, LLM 0.5  3.00 env steps/s"
    )
    clock.now += 59
    assert "left 0:00:01" in progress.status()
    clock.now += 59
    assert "left 0:00:00" in progress.status()


def test_progress_of_a_resumed_run_ignores_the_time_before():
    clock, progress = make_progress(max_iter=1000, max_env_step=400)
    progress.start(iteration=10, env_step=200)
    clock.now += 4
    show(progress, 11, 220)  # 20 of the last 200 steps in 4 s
    assert progress.status() == "iteration 11/1000  env steps 220/400  left 0:00:36  return -  5.00 env steps/s"


def test_progress_estimates_from_the_latest_iterations():
    """Early iterations are quick, because the models do not learn yet."""
    clock, progress = make_progress(max_iter=100)
    progress.start(iteration=0, env_step=0)
    for iteration in range(1, 51):
        clock.now += 1 if iteration <= 30 else 3
        show(progress, iteration, iteration)
    assert "left 0:02:30" in progress.status()


def test_progress_logs_a_line_every_few_iterations_and_at_the_end():
    output = io.StringIO()
    with terminal_output(output):
        clock, progress = make_progress(max_iter=5, every=2)
        progress.start(iteration=0, env_step=0)
        for iteration in range(1, 6):
            clock.now += 1
            show(progress, iteration, iteration)
    assert [line.split("  ")[0] for line in logged(output.getvalue())] == [f"iteration {n}/5" for n in (2, 4, 5)]
    assert "left" not in logged(output.getvalue())[-1]


def test_progress_is_the_status_of_the_live_line_and_not_logged_on_a_terminal(tmp_path):
    terminal = Terminal()
    with terminal_output(terminal):
        progress.open_logs(tmp_path)
        clock, own = make_progress()
        own.start(iteration=0, env_step=0)
        clock.now += 1
        show(own, 1, 20)
        wait_until(
            lambda: terminal.shown == ["iteration 1/10  env steps 20  left 0:00:09  return -  20.00 env steps/s"]
        )
        own.end()
        wait_until(lambda: terminal.shown == [""])
    assert "iteration 1/10" in (tmp_path / "run.log").read_text()
