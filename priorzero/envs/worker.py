"""Runs a game in a worker process. If the game hangs or crashes, only this process is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from loguru import logger

from priorzero.envs.child import exit_with_parent, python_command
from priorzero.envs.games import GameSpec, make_game
from priorzero.envs.limits import episode_steps
from priorzero.envs.progress import set_progress_listener
from priorzero.envs.registered_game import location
from priorzero.runtime.signals import children_ignore_stop_signals
from priorzero.runtime.waiting import wait_at_most
from priorzero.types import GameArguments, GameState, GameTimeoutError, GameWorkerError, TextGame, UserError

if TYPE_CHECKING:
    from priorzero.settings import Settings  # pydantic, which worker processes do not need

START_TIMEOUT_S = 180.0  # loading spaCy takes 3 s on an idle core, but many workers may start at once on few cores
CLOSE_TIMEOUT_S = 2.0
PROGRESS_INTERVAL_S = 0.2
SLOW_S = 5.0  # a request that takes longer, although the game does not hang, is logged

T = TypeVar("T")
_logged_as_slow: set[str] = set()  # names of games; each is logged once


class GameWorker:
    """An asynchronous ``TextGame`` in a worker process. It handles one request at a time.

    After a hang, a crash or a cancelled request the process is killed, because its state is unknown. ``restart`` or the
    next ``reset`` starts a new one. An exception inside the game does not end the process.
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
        """The process is started by ``start`` or ``reset``.

        Args:
            make: creates the game inside the process; a function or class that can be imported there.
            arguments: keyword arguments of ``make``, which must be picklable.
            timeout_s: time limit of a ``reset`` or ``step``, in seconds. It counts from the last sign of life; see
                :func:`~priorzero.envs.progress.report_progress`.
            start_timeout_s: time limit of starting the process and creating the game, in seconds.
            name: the game's name, for messages.
        """
        self._make = make
        self._arguments = dict(arguments)
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._busy = False
        self._is_starting = False  # the process was launched, and its reply was not received yet

    @property
    def pid(self) -> int | None:
        """The process ID; None if no process is running."""
        return None if self._process is None else self._process.pid

    def launch(self) -> None:
        """Start the process, which creates the game, without waiting for it; :meth:`start` waits.

        Nothing happens if the process is already running.
        """
        if self._process is not None:
            return
        pickled = pickle.dumps((self._make, self._arguments))
        self._connection, child_end = Pipe(duplex=True)
        with child_end, children_ignore_stop_signals():
            self._process = subprocess.Popen(  # returns within milliseconds
                python_command("priorzero.envs.worker:serve", str(child_end.fileno()), str(os.getpid())),
                pass_fds=[child_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the emulator prints warnings
                # Games do not profit from the threads of numerical libraries.
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # it has no terminal, whose end would end a game
            )
        self._is_starting = True
        with contextlib.suppress(OSError):  # the process has died already; `start` reports it
            self._connection.send(("start", pickled))

    async def start(self) -> None:
        """Start the process and create the game, unless this is done already."""
        self.launch()
        if not self._is_starting:
            return
        try:
            await self._reply("start", timeout_s=self._start_timeout_s)
        except (UserError, GameWorkerError):
            self.kill()
            raise
        self._is_starting = False

    async def reset(self) -> GameState:
        """Begin a new episode. Starts the process if none is running.

        Raises:
            GameWorkerError: the process exceeded its time limit, crashed or raised an exception.
            UserError: the game raised it.
        """
        await self.start()
        state: GameState = await self._request("reset", None, timeout_s=self._timeout_s)
        return state

    async def step(self, action: str) -> tuple[GameState, float]:
        """Take an action; return the new state and the points that the action gained. Raises as :meth:`reset` does.

        A :class:`GameWorkerError` is also raised if no process is running.
        """
        state, reward = await self._request("step", action, timeout_s=self._timeout_s)
        return state, reward

    async def restart(self) -> None:
        """Kill the process if it is running, and start a new one. The episode is lost; call ``reset`` next."""
        self.kill()
        await self.start()

    async def close(self) -> None:
        """End the process. It is killed if it does not exit in time. Can be called repeatedly and after any failure."""
        if self._process is None or self._connection is None:
            return
        process = self._process
        self._connection.close()  # the process reads the end of the pipe and exits
        try:
            await asyncio.to_thread(process.wait, CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.info(f"{self._name}: killing the worker process {process.pid}, which did not exit in time")
        finally:
            self.kill()

    async def _request(self, command: str, argument: Any, *, timeout_s: float) -> Any:
        """Send a request and wait for the reply. Kills the process if no reply arrives in time."""
        label = f"{command} {argument!r}" if command == "step" else command
        return await self._reply(label, request=(command, argument), timeout_s=timeout_s)

    async def _reply(self, label: str, *, request: tuple[str, Any] | None = None, timeout_s: float) -> Any:
        """Wait for the reply to a request, which is sent first if it was not sent yet."""
        if self._process is None or self._connection is None:
            raise GameWorkerError(f"{self._name}: {label!r} while no worker process is running: call reset() first")
        if self._busy:
            raise RuntimeError(f"{self._name}: {label!r} while another request is in progress")
        self._busy = True
        start = time.monotonic()
        received = False
        try:
            if request is not None:
                self._connection.send(request)
            activity = None
            while (message := await _receive(self._connection, timeout_s=timeout_s))[0] == "progress":
                activity = message[1]
            received = True
        except TimeoutError as error:
            raise GameTimeoutError(
                f"{self._name}: {label!r} took longer than {timeout_s:g} s; the worker process was killed"
            ) from error
        except (EOFError, OSError) as error:
            raise GameWorkerError(
                f"{self._name}: the worker process died in {label!r} after {time.monotonic() - start:.1f} s "
                f"({type(error).__name__}); if it printed messages, they are on stderr"
            ) from error
        finally:
            self._busy = False
            if not received:  # also after a cancellation: a late reply would be mistaken for the next one
                self.kill()
        if activity is not None:
            _log_if_slow(self._name, activity, seconds=time.monotonic() - start)
        kind, content = message
        if kind == "user error":
            raise UserError(content)
        if kind == "error":
            raise GameWorkerError(f"{self._name}: {label!r} failed inside the worker process: {content}")
        return content

    def kill(self) -> None:
        """End the process at once if it is running."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # and its child process, which tries commands
            self._process.wait()  # takes milliseconds after SIGKILL, and avoids a zombie process
        self._process = self._connection = None
        self._is_starting = False


def make_worker(
    spec: GameSpec,
    *,
    timeout_s: float,
    start_timeout_s: float = START_TIMEOUT_S,
    max_score: int = 0,
    **arguments: Unpack[GameArguments],
) -> GameWorker:
    """Create a worker for a game without starting it; see ``make_game`` and ``GameWorker`` for the arguments."""
    everything = {"spec": spec, "max_score": max_score, **arguments}
    return GameWorker(make_game, everything, timeout_s=timeout_s, start_timeout_s=start_timeout_s, name=spec.name)


def make_workers(settings: Settings, games: Sequence[GameSpec], *, count: int, first_seed: int) -> list[GameWorker]:
    """``count`` worker processes; worker ``e`` plays game ``e % len(games)`` with the seed ``first_seed + e``."""
    env = settings.env
    return [
        make_worker(
            games[e % len(games)],
            seed=first_seed + e,
            max_episode_steps=episode_steps(env, games[e % len(games)]),
            look_and_inventory=env.look_and_inventory,
            drop_inert_commands=env.drop_inert_commands,
            valid_actions=env.valid_actions,
            timeout_s=env.step_timeout_s,
            max_score=env.max_score,
        )
        for e in range(count)
    ]


def try_registered_games(settings: Settings, games: Sequence[GameSpec]) -> None:
    """Open each registered game in a worker process and begin an episode, which takes about a second.

    So a factory that fails, and a game that violates the protocol at once, are reported before a run writes anything.

    Raises:
        UserError: a game cannot be opened, or its first state violates the protocol.
    """
    registered = [game for game in games if game.kind == "registered"]
    workers = make_workers(settings, registered, count=len(registered), first_seed=settings.run.seed)
    try:
        for worker in workers:
            worker.launch()
        if workers:
            with ThreadPoolExecutor(1) as executor:  # this thread may run an event loop already
                executor.submit(asyncio.run, _reset_all(workers)).result()
    except GameWorkerError as error:
        raise UserError(f"A registered game cannot be played: {error}") from error
    finally:
        for worker in workers:
            worker.kill()


async def _reset_all(workers: Sequence[GameWorker]) -> None:
    for worker in workers:
        await worker.reset()


def serve(descriptor: str, parent: str) -> None:
    """The main function of a worker process: handles requests until the pipe with this file descriptor is closed."""
    threading.Thread(target=exit_with_parent, args=(int(parent),), daemon=True).start()
    # spaCy would import torch, which it does not need here and which takes 3 s and 180 MB per worker.
    sys.modules["torch"] = None  # type: ignore[assignment]
    connection = Connection(int(descriptor))
    set_progress_listener(_progress_sender(connection))
    game: TextGame | None = None
    while True:
        try:
            command, argument = connection.recv()
        except (EOFError, ConnectionResetError):  # the parent closed the pipe, or ended
            break
        try:
            content: Any = None
            if command == "start":
                make, arguments = pickle.loads(argument)
                game = make(**arguments)
            else:
                assert game is not None
                content = game.reset() if command == "reset" else game.step(argument)
            reply = ("ok", content)
        except UserError as error:
            reply = ("user error", str(error))
        except Exception as error:  # the parent raises it; the text is sent, since the exception may not be picklable
            reply = ("error", f"{type(error).__name__}: {error}{location(error)}")
        try:
            connection.send(reply)
        except (BrokenPipeError, ConnectionResetError):
            break
    if game is not None:
        game.close()


def _progress_sender(connection: Connection) -> Callable[[str], None]:
    last = 0.0

    def send(activity: str) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_INTERVAL_S:  # the parent may read nothing for a while
            last = time.monotonic()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `serve` notices it, too
                connection.send(("progress", activity))

    return send


def _log_if_slow(name: str, activity: str, *, seconds: float) -> None:
    if seconds > SLOW_S and name not in _logged_as_slow:
        _logged_as_slow.add(name)
        logger.warning(
            f"{name}: {activity} took {seconds:.0f} s in one state. This is not an error: a step may take longer than "
            "env.step_timeout_s as long as the search makes progress. The results are cached, so the same state takes "
            "no time later. Further slow steps of this game are not logged."
        )


async def gather_replies(requests: Iterable[Awaitable[T]]) -> list[T | GameWorkerError]:
    """Wait for requests to several workers. The error of a worker that failed is in the place of its reply."""
    replies = await asyncio.gather(*requests, return_exceptions=True)
    results: list[T | GameWorkerError] = []
    for reply in replies:
        if isinstance(reply, BaseException) and not isinstance(reply, GameWorkerError):
            raise reply
        results.append(reply)
    return results


async def _receive(connection: Connection, *, timeout_s: float) -> tuple[str, Any]:
    """The next message. Raises a TimeoutError if none arrives in time, and an EOFError if the other end is closed."""
    try:
        await wait_at_most(timeout_s, _wait_readable(connection))
    except TimeoutError:
        # After something has blocked the event loop, the time may be over although a message is waiting.
        if not connection.poll():
            raise
    message: tuple[str, Any] = connection.recv()
    return message


async def _wait_readable(connection: Connection) -> None:
    """Wait, without blocking the event loop, until ``connection`` has data or its other end is closed."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    descriptor = connection.fileno()
    loop.add_reader(descriptor, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
