"""Threads, locks, stop signals and groups of tasks for the asyncio loop of a run."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar

import psutil
from loguru import logger

from priorzero.runtime.timeline import Timeline

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


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

scratch_folders: set[Path] = set()  # temporary folders of this process, which `exit_immediately` deletes
exit_callbacks: list[Callable[[], None]] = []  # short functions that `exit_immediately` calls


def clear_terminal_line() -> None:
    """Remove a line that is rewritten in place from the terminal on stderr, if it is one."""
    if os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb":
        os.write(2, b"\r\x1b[2K")


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
    for callback in exit_callbacks:
        callback()
    clear_terminal_line()
    os._exit(130)


@contextmanager
def exit_immediately_on_signal() -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM exit the process immediately unless another handler is installed.

    Outside the main thread this does nothing, because signal handlers can only be installed there.
    """

    def handle(number: int, frame: FrameType | None) -> NoReturn:
        # Not `print`: the signal may have interrupted another print, which is not reentrant.
        clear_terminal_line()
        os.write(2, f"{signal.Signals(number).name}: exiting immediately; nothing more is saved\n".encode())
        exit_immediately()

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handle) for number in STOP_SIGNALS} if in_main_thread else {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequest:
    """A request to stop the run, made by Ctrl-C or SIGTERM.

    The first request is recorded, so that the run can save its state. The second one exits the process immediately.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""
        return self._event.is_set()

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Within the block, handle the stop signals. Outside the main thread this does nothing."""
        loop = asyncio.get_running_loop()
        in_main_thread = threading.current_thread() is threading.main_thread()
        previous = {number: signal.getsignal(number) for number in STOP_SIGNALS} if in_main_thread else {}
        for number in previous:
            loop.add_signal_handler(number, self.request, number.name)
        try:
            yield
        finally:
            for number, handler in previous.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def request(self, reason: str) -> None:
        """Request a stop because of ``reason``, which is logged; the second request exits the process immediately."""
        if self.requested:
            logger.warning(f"second {reason}: exiting immediately; nothing more is saved")
            exit_immediately()
        self._event.set()
        logger.warning(
            f"{reason}: the run will stop when the current step is finished and saved (a second signal exits "
            "immediately)"
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


async def gather_or_cancel(*work: Coroutine[Any, Any, T]) -> list[T]:
    """Like :func:`asyncio.gather`, but when one coroutine fails, the others are cancelled and awaited first."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
