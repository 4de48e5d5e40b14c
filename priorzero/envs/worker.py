"""One game in one process of its own: what hangs or crashes inside C is killed, and the run goes on."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, Pipe
from typing import Any

from priorzero.envs.child import python_command
from priorzero.envs.games import GameSpec, make_game
from priorzero.types import GameState, GameWorkerError, TextGame, UserError

START_TIMEOUT_S = 180.0  # loading spaCy takes 3 s on a free core; many workers may start at once on few cores
CLOSE_TIMEOUT_S = 2.0
PARENT_CHECK_S = 0.5

logger = logging.getLogger(__name__)


class GameWorker:
    """A ``TextGame`` behind a pipe. One request at a time; the event loop is never blocked while the game thinks.

    After a hang, a crash or a cancelled request the process is gone (nobody knows what state it was in): ``restart`` or
    the next ``reset`` starts a fresh one. An exception inside the game leaves the process alive.
    """

    def __init__(
        self,
        make: Callable[..., TextGame],
        arguments: Mapping[str, Any],
        *,
        timeout_s: float,
        start_timeout_s: float = START_TIMEOUT_S,
        name: str = "game",
    ) -> None:
        """Nothing is started yet.

        Args:
            make: builds the game inside the process; a function or class that can be imported there.
            arguments: its keyword arguments; must survive pickling.
            timeout_s: the longest that a ``reset`` or a ``step`` may take.
            start_timeout_s: the longest that starting the process and building the game may take.
            name: for error messages.
        """
        self._make = make
        self._arguments = dict(arguments)
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._busy = False

    @property
    def pid(self) -> int | None:
        """Process id, or None while no process runs."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the process and build the game; does nothing if it already runs.

        Raises:
            UserError: raised by ``make``.
            GameWorkerError: the process failed in another way, or took longer than ``start_timeout_s``.
        """
        if self._process is not None:
            return
        recipe = pickle.dumps((self._make, self._arguments))
        self._connection, theirs = Pipe(duplex=True)
        with theirs:
            self._process = subprocess.Popen(  # returns within milliseconds
                python_command("priorzero.envs.worker:serve", str(theirs.fileno()), str(os.getpid())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # frotz prints warnings
                # Games gain nothing from the threads that numerical libraries start for each core.
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C in the terminal does not reach it
            )
        try:
            await self._ask("start", recipe, timeout_s=self._start_timeout_s)
        except (UserError, GameWorkerError):
            self._kill()
            raise

    async def reset(self) -> GameState:
        """Begin a new episode; starts the process if there is none.

        Raises:
            GameWorkerError: hang, crash or exception inside the process.
            UserError: raised by the game.
        """
        await self.start()
        state: GameState = await self._ask("reset", None, timeout_s=self._timeout_s)
        return state

    async def step(self, action: str) -> tuple[GameState, float]:
        """Give a command; return the new state and the points that it gained.

        Raises:
            GameWorkerError: hang, crash or exception inside the process, or no process (call ``reset`` first).
            UserError: raised by the game.
        """
        state, reward = await self._ask("step", action, timeout_s=self._timeout_s)
        return state, reward

    async def restart(self) -> None:
        """Kill the process, if there is one, and start a fresh one. The episode is lost: call ``reset`` next."""
        self._kill()
        await self.start()

    async def close(self) -> None:
        """End the process: ask, wait a moment, kill. May be called again, and after any failure."""
        if self._process is None or self._connection is None:
            return
        process = self._process
        self._connection.close()  # the process reads the end of the pipe and leaves
        try:
            await asyncio.to_thread(process.wait, CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.info("%s: the worker process %d did not leave by itself, killing it", self._name, process.pid)
        finally:
            self._kill()

    async def _ask(self, command: str, argument: Any, *, timeout_s: float) -> Any:
        """Send a request and wait for its answer; kills the process unless an answer arrives in time."""
        shown = f"{command} {argument!r}" if command == "step" else command
        if self._process is None or self._connection is None:
            raise GameWorkerError(f"{self._name}: {shown!r} while no worker process runs: call reset() first")
        if self._busy:
            raise RuntimeError(f"{self._name}: {shown!r} before the last request was answered")
        self._busy = True
        began = time.monotonic()
        answered = False
        try:
            self._connection.send((command, argument))
            async with asyncio.timeout(timeout_s):
                await _readable(self._connection)
            kind, content = self._connection.recv()
            answered = True
        except TimeoutError as error:
            raise GameWorkerError(
                f"{self._name}: {shown!r} took longer than {timeout_s:g} s; the worker process was killed"
            ) from error
        except (EOFError, OSError) as error:
            raise GameWorkerError(
                f"{self._name}: the worker process died in {shown!r} after {time.monotonic() - began:.1f} s "
                f"({type(error).__name__}); its own messages, if any, are on stderr"
            ) from error
        finally:
            self._busy = False
            if not answered:  # also when cancelled: a late answer would be taken for the next request's
                self._kill()
        if kind == "user error":
            raise UserError(content)
        if kind == "error":
            raise GameWorkerError(f"{self._name}: {shown!r} failed inside the worker process: {content}")
        return content

    def _kill(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()  # SIGKILL takes milliseconds; without it a zombie would stay
        self._process = self._connection = None


def make_worker(
    spec: GameSpec,
    *,
    seed: int,
    max_episode_steps: int,
    look_and_inventory: bool,
    drop_inert_commands: bool,
    timeout_s: float,
    start_timeout_s: float = START_TIMEOUT_S,
) -> GameWorker:
    """A worker for a game; see ``make_game`` and ``GameWorker`` for the arguments. Nothing is started yet."""
    arguments = {
        "spec": spec,
        "seed": seed,
        "max_episode_steps": max_episode_steps,
        "look_and_inventory": look_and_inventory,
        "drop_inert_commands": drop_inert_commands,
    }
    return GameWorker(make_game, arguments, timeout_s=timeout_s, start_timeout_s=start_timeout_s, name=spec.name)


def serve(descriptor: str, parent: str) -> None:
    """The worker process: answers requests until the pipe closes. Of an exception it sends back the text only."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, a batch system's notice: the parent's business
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, args=(int(parent),), daemon=True).start()
    # spaCy imports torch where it is installed: 3 s and 180 MB for each worker, for nothing.
    sys.modules["torch"] = None  # type: ignore[assignment]
    connection = Connection(int(descriptor))
    game: TextGame | None = None
    while True:
        try:
            command, argument = connection.recv()
        except EOFError:
            break
        try:
            if command == "start":
                make, arguments = pickle.loads(argument)
                game = make(**arguments)
                answer: Any = None
            else:
                assert game is not None
                answer = game.reset() if command == "reset" else game.step(argument)
            reply = ("ok", answer)
        except UserError as error:
            reply = ("user error", str(error))
        except Exception as error:  # sent to the parent, which raises it
            reply = ("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        try:
            connection.send(reply)
        except (BrokenPipeError, ConnectionResetError):
            break
    if game is not None:
        game.close()


def _leave_with_parent(parent: int) -> None:
    """End this process when its parent is gone, even while the game hangs inside C (which holds no Python lock)."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


async def _readable(connection: Connection) -> None:
    """Wait, without blocking the event loop, until ``connection`` has something to read or its other end has closed."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    descriptor = connection.fileno()
    loop.add_reader(descriptor, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
