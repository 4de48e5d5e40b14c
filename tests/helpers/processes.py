"""``python -m priorzero.entry`` in processes that can be stopped and killed.

These are forked from a server process that has imported everything once, since the imports take much longer than a run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from priorzero.runtime.signals import STOP_SIGNALS
from tests.helpers.toy_game import toy_games

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["priorzero.train", "priorzero.entry", "tests.helpers.toy_game"])


ENDLESS_UPDATE = "the world model learns endlessly"


def _main(arguments: Sequence[str], stderr: str, endless_update: bool) -> None:
    from priorzero import entry, learning

    def learn_endlessly(*_: Any, **__: Any) -> None:
        print(ENDLESS_UPDATE, file=sys.stderr)
        time.sleep(600)

    for number in STOP_SIGNALS:  # also if the tests were started with `nohup` or `&`
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.setsid()  # the first terminal that is opened for reading becomes the session's
    descriptor = os.open(stderr, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stderr.fileno())
    if endless_update:
        learning.update_world_model = learn_endlessly
    with toy_games(in_process=False):
        code = entry.main(arguments)
    sys.stderr.flush()
    os._exit(code)


def send_stop_signals(process: psutil.Process) -> None:
    """Send all signals that ask a run to stop."""
    for number in STOP_SIGNALS:
        process.send_signal(number)


class EntryProcess:
    """The command line with ``arguments`` in a session of its own; games are toy games in worker processes.

    Args:
        arguments: of the command line.
        folder: gets the file ``stderr``.
        terminal: the name of a terminal, which becomes that of the session and gets stderr instead.
        endless_update: the first update of the world model writes :data:`ENDLESS_UPDATE` and does not end.
    """

    def __init__(
        self, arguments: Sequence[str], *, folder: Path, terminal: str = "", endless_update: bool = False
    ) -> None:
        self._stderr = folder / "stderr"
        stderr = terminal or str(self._stderr)
        self._process = FORKSERVER.Process(target=_main, args=(list(arguments), stderr, endless_update))

    def __enter__(self) -> EntryProcess:
        self._process.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.join()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return self._stderr.read_text() if self._stderr.exists() else ""

    def wait_for(self, text: str, *, timeout_s: float = 120.0) -> None:
        """Wait until ``text`` is on stderr."""
        deadline = time.monotonic() + timeout_s
        while text not in self.stderr:
            assert self._process.is_alive() and time.monotonic() < deadline, f"no {text!r} in:\n{self.stderr}"
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def send_to_all(self, number: signal.Signals) -> None:
        """Send a signal to the process and all its descendants, as a batch system does."""
        process = psutil.Process(self.pid)
        for each in [process, *process.children(recursive=True)]:
            each.send_signal(number)

    def wait(self, timeout_s: float) -> int | None:
        """The exit code; None if the process still runs after ``timeout_s``. A signal that ended it is negative."""
        self._process.join(timeout_s)
        return self._process.exitcode


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
