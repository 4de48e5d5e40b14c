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
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from priorzero.envs.child import exit_with_parent
from priorzero.envs.frotz import EmulatorState, ReproducibleFrotzEnv
from priorzero.envs.progress import report_progress

ACTIVITY = "the search for valid actions"
PROGRESS_INTERVAL_S = 0.2
# Jericho uses these commands to find objects.
OBSERVING_COMMANDS = ("look", "inventory")

logger = logging.getLogger(__name__)


class EmulatorCrashError(RuntimeError):
    """A command crashed the emulator of the other process."""


class Probe:
    """Observes states of a game and finds their valid actions, in a child process.

    Commands that are only tried must not change the game, but an emulator does not save all of its state. Besides, some
    commands crash the emulator: in hollywood.z3, "look" does so in a few places. Here only the child process is lost.

    The child process is a fork, since it needs spaCy and the story, which this process has loaded. It starts at the
    first use, and again after a crash.
    """

    def __init__(self, env: ReproducibleFrotzEnv, *, name: str) -> None:
        """The child process has a copy of ``env``. ``name`` is the game's name, for messages."""
        self._env = env
        self._name = name
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._has_warned = False

    def observe(self, state: EmulatorState, commands: Sequence[str]) -> tuple[str, ...]:
        """What each command would print; "" if it crashes the emulator."""
        try:
            texts: tuple[str, ...] = self._request("observe", state, commands=commands)
            return texts
        except EmulatorCrashError as error:
            self._warn(error)
            return ("",) if len(commands) == 1 else sum((self.observe(state, [one]) for one in commands), ())

    def find_actions(self, state: EmulatorState) -> tuple[str, ...] | None:
        """The valid actions; see :class:`ReproducibleFrotzEnv`. None if the search crashes the emulator.

        If ``look`` or ``inventory`` crashes it, the search is repeated without them.
        """
        skipped: list[str] = []
        try:
            return self._find(state, skipped=())
        except EmulatorCrashError as error:
            self._warn(error)
        for command in OBSERVING_COMMANDS:
            try:
                self._request("observe", state, commands=[command])
            except EmulatorCrashError:
                skipped.append(command)
        if not skipped:
            return None
        try:
            return self._find(state, skipped=skipped)
        except EmulatorCrashError:
            return None

    def close(self) -> None:
        """End the child process. It starts again at the next use."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _find(self, state: EmulatorState, *, skipped: Sequence[str]) -> tuple[str, ...]:
        actions: tuple[str, ...] = self._request("find_actions", state, commands=skipped)
        return actions

    def _request(self, task: Literal["observe", "find_actions"], state: EmulatorState, *, commands: Sequence[str]) -> Any:
        connection = self._start()
        try:
            connection.send((task, state, tuple(commands)))
            while (reply := connection.recv())[0] == "progress":
                report_progress(ACTIVITY)
        except (EOFError, OSError) as error:
            assert self._process is not None
            self._process.join()
            code = self._process.exitcode
            self.close()
            raise EmulatorCrashError(f"exit code {code}") from error
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

    def _warn(self, error: EmulatorCrashError) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: a command that was only tried crashed Jericho's emulator (%s). The game continues. In this state, "
                "some of the room, the inventory and the valid actions may be missing. Later crashes are not logged.",
                self._name, error,
            )  # fmt: skip


def _serve(env: ReproducibleFrotzEnv, connection: Connection, parent_end: Connection, parent: int) -> None:
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

    env.on_progress = on_progress
    with contextlib.suppress(EOFError, OSError):  # the parent closed the connection
        while True:
            task, state, commands = connection.recv()
            try:
                reply: tuple[str, Any] = ("ok", _perform(env, task, state, commands))
            except Exception as error:  # the parent raises it
                reply = ("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
            connection.send(reply)
    os._exit(0)


def _perform(
    env: ReproducibleFrotzEnv, task: str, state: EmulatorState, commands: tuple[str, ...]
) -> tuple[str, ...]:
    if task == "find_actions":
        env.skipped = frozenset(commands)
        return env.find_actions(state)
    env.skipped = frozenset()
    texts = []
    for command in commands:
        env.restore(state)
        texts.append(env.step(command)[0].strip())
    return tuple(texts)
