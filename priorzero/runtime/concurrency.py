"""Threads, locks, stop signals and groups of tasks for the asyncio loop of a run."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar

import psutil
from loguru import logger

from priorzero.runtime.signals import STOP_SIGNALS
from priorzero.runtime.timeline import Timeline
from priorzero.types import UserError

P = ParamSpec("P")
T = TypeVar("T")


class OwnerThread:
    """A single worker thread that owns an object, such as the world model.

    All calls that use the object run in this thread, one at a time and in order. The event loop is not blocked. If a
    call is cancelled after it has started, it still runs to its end.
    """

    def __init__(self, name: str, timeline: Timeline) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._timeline = timeline

    async def run(self, span: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``function(*args, **kwargs)`` in the thread and record it in the timeline as ``span``."""
        work = functools.partial(self._timed, span, function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def drain(self) -> None:
        """Wait until all calls so far have ended, also those that were cancelled after they had started."""
        await asyncio.get_running_loop().run_in_executor(self._executor, lambda: None)

    def _timed(self, span: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        with self._timeline.span(span):
            return function(*args, **kwargs)

    def close(self) -> None:
        """Wait for the call that is running, and cancel the calls that have not started."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class ReadersWriterLock:
    """An asyncio readers-writer lock that prefers writers.

    Any number of tasks can hold it in shared mode, or one task in exclusive mode. A waiting exclusive request blocks
    shared requests that come after it.
    """

    def __init__(self) -> None:
        self._num_readers = 0
        self._writer = asyncio.Lock()  # held by the writer, also while it waits for the readers to finish
        self._no_readers = asyncio.Event()
        self._no_readers.set()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold the lock together with other readers."""
        async with self._writer:
            self._num_readers += 1
            self._no_readers.clear()
        try:
            yield
        finally:
            self._num_readers -= 1
            if not self._num_readers:
                self._no_readers.set()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Hold the lock alone."""
        async with self._writer:
            await self._no_readers.wait()
            yield


REPEAT_S = 1.0  # a signal that arrives within this time of the first of its kind was sent together with it

scratch_folders: set[Path] = set()  # temporary folders of this process, which `exit_immediately` deletes
_exit_callbacks: list[Callable[[], None]] = []  # `exit_immediately` calls them


def handled_signals() -> list[signal.Signals]:
    """The stop signals that this thread can handle: none outside the main thread, where Python allows no handlers.

    Signals that are ignored stay ignored: `nohup` does this to SIGHUP, and a shell to the SIGINT of background jobs.
    A handler that was not installed from Python could not be restored and stays, too.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in STOP_SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def clear_terminal_line() -> None:
    """Remove a line that is rewritten in place from the terminal on stderr, if it is one."""
    if os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb":
        _write_to_stderr(b"\r\x1b[2K")


def _write_to_stderr(message: bytes) -> None:
    with suppress(OSError):  # after SIGHUP the terminal is gone
        os.write(2, message)


@contextmanager
def called_at_exit(callback: Callable[[], None]) -> Iterator[None]:
    """Within the block, :func:`exit_immediately` calls ``callback``, which must not take long."""
    _exit_callbacks.append(callback)
    try:
        yield
    finally:
        _exit_callbacks.remove(callback)


def exit_immediately() -> NoReturn:
    """Kill all child processes, delete the scratch folders, call the callbacks and exit with code 130.

    It does not wait for threads or tasks, so a hanging one cannot delay the exit.
    """
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            # Python's resource tracker frees shared memory and then exits by itself.
            if "resource_tracker" not in " ".join(process.cmdline()):
                process.kill()
    for folder in scratch_folders:
        shutil.rmtree(folder, ignore_errors=True)
    for callback in _exit_callbacks:
        callback()
    clear_terminal_line()
    os._exit(130)


@contextmanager
def exit_immediately_on_signal() -> Iterator[None]:
    """Within the block, the stop signals exit the process immediately unless another handler is installed.

    See :func:`handled_signals` for the exceptions.
    """

    def handle(number: int, frame: FrameType | None) -> NoReturn:
        # Not `print`: the signal may have interrupted another print, which is not reentrant.
        clear_terminal_line()
        _write_to_stderr(f"{signal.Signals(number).name}: exiting immediately; nothing more is saved\n".encode())
        exit_immediately()

    previous = {number: signal.signal(number, handle) for number in handled_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequest:
    """A request to stop the run, made by one of :data:`~priorzero.runtime.signals.STOP_SIGNALS`.

    The first signal is recorded, so that the run can save its state. A second Ctrl-C or a second SIGTERM exits the
    process immediately. Other signals do not, because the run may be saving: batch systems send different signals one
    after the other, and SIGXCPU every second. The same signal may also arrive twice at once: `timeout` sends it to the
    command and then to its group, and a closed terminal sends SIGHUP as the kernel and as the shell.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._received: dict[signal.Signals, float] = {}  # the time of the first of its kind

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""
        return self._event.is_set()

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Within the block, handle the stop signals; see :func:`handled_signals` for the exceptions."""
        loop = asyncio.get_running_loop()
        previous = {number: signal.getsignal(number) for number in handled_signals()}
        for number in previous:
            loop.add_signal_handler(number, self.receive, number)
        try:
            yield
        finally:
            for number, handler in previous.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def receive(self, number: signal.Signals) -> None:
        """A stop signal has arrived."""
        now = time.monotonic()
        since_first = now - self._received.setdefault(number, now)
        if number in (signal.SIGINT, signal.SIGTERM) and since_first >= REPEAT_S:
            logger.warning(f"second {number.name}: exiting immediately; nothing more is saved")
            exit_immediately()
        self.request(number.name)

    def request(self, reason: str) -> None:
        """Request a stop because of ``reason``, which is logged. Further requests have no effect."""
        if self.requested:
            return
        self._event.set()
        logger.warning(
            f"{reason}: the run will stop when the current step is finished and saved (a second Ctrl-C or SIGTERM "
            "exits immediately)"
        )

    async def run_or_cancel(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Run a coroutine to its result, or cancel it when a stop is requested and return None once it has ended."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._event.wait())
        try:
            await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
            return await task if task.done() else None
        finally:
            for each in (task, stop):
                each.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)


def check_no_running_loop(instead: str) -> None:
    """Raises UserError if an event loop runs in this thread, as in a notebook; then ``instead`` must be awaited."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise UserError(f"an event loop is running in this thread, as in a notebook; type: await {instead}")


@contextmanager
def only_run_of_process() -> Iterator[None]:
    """Raises UserError if another run is within this block: random states and the terminal belong to the process."""
    if not _run_lock.acquire(blocking=False):
        raise UserError("a run is in progress in this process; wait for its end, or start a second process")
    try:
        yield
    finally:
        _run_lock.release()


_run_lock = threading.Lock()


async def run_in_thread(function: Callable[[], T], *, on_cancel: Callable[[], object] = lambda: None) -> T:
    """Run a function in a thread. If the caller is cancelled, it waits until the function has returned."""
    work = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        on_cancel()
        await asyncio.wait([work])
        work.exception()  # retrieved, so that asyncio does not log it
        raise
    finally:
        # Otherwise an exception and this frame would refer to each other. Files that the function left open would stay
        # open until the garbage is collected, and deleted files would still take space on the disk.
        del work


async def run_unless(failure: Coroutine[Any, Any, NoReturn], work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its result. If ``failure`` raises meanwhile, cancel ``work``, await it, and raise the error."""
    tasks = watching, working = asyncio.ensure_future(failure), asyncio.ensure_future(work)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else watching.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def gather_or_cancel(*work: Coroutine[Any, Any, T]) -> list[T]:
    """Like :func:`asyncio.gather`, but when one coroutine fails, the others are cancelled and awaited first."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
