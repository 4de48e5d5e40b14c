"""What keeps the parts of the loop apart: a thread that owns something, a gate, and tasks that fail together."""

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
    """The only thread that touches something, such as the world model. Calls run one at a time, in their order.

    The loop goes on meanwhile. A cancelled call that has begun is still run to its end.

    Args:
        name: of the thread.
        timeline: takes note of what runs.
    """

    def __init__(self, name: str, timeline: Timeline) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._timeline = timeline

    async def run(self, span: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``function(*args, **kwargs)`` in the thread, in the timeline as ``span``."""
        work = functools.partial(self._timed, span, function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _timed(self, span: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        with self._timeline.span(span):
            return function(*args, **kwargs)

    def close(self) -> None:
        """Wait for what has begun; drop what has not."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class Gate:
    """Many may pass together, or one alone. Who wants to be alone goes before those who come later."""

    def __init__(self) -> None:
        self._inside = 0
        self._alone = asyncio.Lock()  # held by whoever is alone or waits for the others to leave
        self._empty = asyncio.Event()
        self._empty.set()

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        async with self._alone:
            self._inside += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._alone:
            await self._empty.wait()
            yield


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Folders of this process that nobody needs after it.
scratch_folders: set[Path] = set()


def end_at_once() -> NoReturn:
    """End this process and all that it has started, with exit code 130. What hangs cannot hold this up."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "resource_tracker" not in " ".join(
                process.cmdline()
            ):  # Python's own: removes shared memory, then leaves
                process.kill()
    for folder in scratch_folders:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(130)


@contextmanager
def signals_end_at_once() -> Iterator[None]:
    """Until the end of the block Ctrl-C and SIGTERM end the process at once, where nothing else listens to them."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        # Not print: the signal may have come in the middle of another one.
        os.write(2, f"{signal.Signals(number).name}: ended at once; nothing more is saved\n".encode())
        end_at_once()

    listens = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, end) for number in STOP_SIGNALS} if listens else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """The wish to end a run, by Ctrl-C or SIGTERM. The first is noted; a second one ends the process at once."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def asked(self) -> bool:
        return self._event.is_set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take these signals from now on, and give them back afterwards. Outside the main thread none arrive."""
        loop = asyncio.get_running_loop()
        listens = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS} if listens else {}
        for number in before:
            loop.add_signal_handler(number, self.ask, number.name)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def ask(self, reason: str) -> None:
        if self.asked:
            logger.warning(f"{reason} once more: ended at once, nothing is saved")
            end_at_once()
        self._event.set()
        logger.warning(f"{reason}: the step is finished and saved, then the run ends (once more ends it at once)")

    async def before(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of ``work``, or None if the wish came first; ``work`` has then been cancelled and has ended."""
        task, wish = asyncio.ensure_future(work), asyncio.ensure_future(self._event.wait())
        try:
            await asyncio.wait([task, wish], return_when=asyncio.FIRST_COMPLETED)
            return await task if task.done() else None
        finally:
            for each in (task, wish):
                each.cancel()
            await asyncio.gather(task, wish, return_exceptions=True)


async def gather_or_cancel(*work: Coroutine[Any, Any, T]) -> list[T]:
    """Like :func:`asyncio.gather`, but when one fails the others are cancelled and have ended before it is raised."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
