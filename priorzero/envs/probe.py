"""Tries commands on a copy of a Jericho game in another process, so that the game itself does not change."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from priorzero.envs.child import exit_with_parent
from priorzero.envs.frotz import EmulatorState, RestorableFrotzEnv
from priorzero.envs.progress import report_progress

ACTIVITY = "the search for valid actions"
PROGRESS_INTERVAL_S = 0.2
HANG_S = 30.0  # without a sign of life; less than the default of env.step_timeout_s, which ends the whole game

logger = logging.getLogger(__name__)


class _ChildDied(RuntimeError):
    """The child process ended or hung during a request. The text is its exit code, or the time."""


class Probe:
    """Observes states of a game and finds their valid actions, in a child process.

    Commands that are only tried must not change the game, but an emulator does not save all of its state. Besides, some
    commands crash the emulator: in hollywood.z3, "look" does so in a few places. Others may never end. Here only the
    child process is lost.

    The child process is a fork, since it needs spaCy and the story, which this process has loaded. It starts at the
    first use, and again after a crash.
    """

    def __init__(self, env: RestorableFrotzEnv, *, name: str) -> None:
        """The child process has a copy of ``env``. ``name`` is the game's name, for messages."""
        self._env = env
        self._name = name
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._has_warned = False

    def observe(self, state: EmulatorState, commands: Sequence[str]) -> tuple[str, ...]:
        """What each command would print; "" if it crashes the emulator."""
        texts: tuple[str, ...] = self._request("observe", state, tuple(commands))
        return texts

    def find_actions(self, state: EmulatorState) -> tuple[str, ...]:
        """The valid actions; see :class:`RestorableFrotzEnv`. Commands that crash the emulator are excluded."""
        actions: tuple[str, ...] = self._request("find_actions", state)
        return actions

    def close(self) -> None:
        """End the child process. It starts again at the next use."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _request(self, task: str, *arguments: Any) -> Any:
        """Send a request and wait for the reply. After a crash it is repeated, with a process for each command.

        Raises:
            RuntimeError: the child process raised an error, or died again.
        """
        try:
            return self._request_once(task, False, *arguments)
        except _ChildDied as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "%s: a command that was only tried crashed Jericho's emulator (%s). The command is left out, and "
                    "the game continues. Later crashes are not logged.",
                    self._name, error,
                )  # fmt: skip
        return self._request_once(task, True, *arguments)

    def _request_once(self, task: str, isolated: bool, *arguments: Any) -> Any:
        connection = self._start()
        try:
            connection.send((task, isolated, arguments))
            while (reply := _receive(connection))[0] == "progress":
                report_progress(ACTIVITY)
        except TimeoutError as error:
            self.close()
            raise _ChildDied(f"no reply for {HANG_S:g} s") from error
        except (EOFError, OSError) as error:
            assert self._process is not None
            self._process.join()
            code = self._process.exitcode
            self.close()
            raise _ChildDied(f"exit code {code}") from error
        except BaseException:  # a late reply would be mistaken for the next one
            self.close()
            raise
        kind, content = reply
        if kind == "error":
            raise RuntimeError(f"{self._name}: {task} failed: {content}")
        return content

    def _start(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("fork")
            self._connection, child_end = context.Pipe()
            with child_end:
                self._process = context.Process(
                    target=_serve, args=(self._env, child_end, self._connection, os.getpid()), daemon=True
                )
                self._process.start()
        return self._connection


def _receive(connection: Connection) -> Any:
    """The next message. Raises a TimeoutError if none arrives in time."""
    if not connection.poll(HANG_S):
        raise TimeoutError
    return connection.recv()


def _serve(env: RestorableFrotzEnv, connection: Connection, parent_end: Connection, parent: int) -> None:
    """The main function of the child process: handles requests until the parent closes the connection or ends."""
    parent_end.close()  # otherwise this process would not notice that the parent closed it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it and closes the connection
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.disable()  # crashes are expected
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()
    last_report = 0.0

    def on_progress() -> None:
        nonlocal last_report
        if time.monotonic() - last_report > PROGRESS_INTERVAL_S:
            last_report = time.monotonic()
            connection.send(("progress", None))

    def observe(state: EmulatorState, commands: Sequence[str]) -> tuple[str, ...]:
        texts = []
        for command in commands:
            on_progress()
            env.restore(state)
            texts.append(env.step(command)[0].strip())
        return tuple(texts)

    env.on_progress = on_progress
    tasks: dict[str, Callable[..., Any]] = {"observe": observe, "find_actions": env.find_actions}
    with contextlib.suppress(EOFError, OSError):  # the parent closed the connection
        while True:
            task, env.isolated, arguments = connection.recv()
            try:
                reply: tuple[str, Any] = ("ok", tasks[task](*arguments))
            except Exception as error:  # the parent raises it
                reply = ("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
            connection.send(reply)
    os._exit(0)
