"""A learner that is restarted after a crash and replays the calls since its last saved state."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

from loguru import logger

from priorzero.types import ProcessError, UserError

T = TypeVar("T")


class Restartable(Protocol):
    """A learner that can be killed, started again and restored from a saved state."""

    async def start(self) -> None:
        """Start the processes, and wait until they have loaded everything."""
        ...

    async def save(self, folder: Path) -> None:
        """Write everything that the next call depends on, or raise OSError. The folder is complete or not there."""
        ...

    async def load(self, folder: Path) -> None: ...

    async def kill(self) -> None: ...


class RestartableLearner:
    """Makes the calls of a learner. If the learner fails, it is restarted, and calls are replayed.

    The learner's state must be a function of the sequence of calls. Then a run with a restart equals a run without.
    After ``save_every`` calls of :meth:`step` the state is saved in ``folder``; only the last one is kept.
    """

    def __init__(self, learner: Restartable, *, name: str, folder: Path, save_every: int, max_restarts: int) -> None:
        self.restarts = 0
        self.replayed = 0  # number of calls
        self._learner = learner
        self._name = name
        self._folder = folder
        self._save_every = save_every
        self._max_restarts = max_restarts
        self._num_steps = 0
        self._saved: Path | None = None
        self._calls: list[Callable[[], Awaitable[object]]] = []  # since the last saved state

    async def query(self, function: Callable[[], Awaitable[T]]) -> T:
        """Make a call that does not change the state. Raises UserError if the learner has failed too often."""
        while True:
            try:
                return await function()
            except ProcessError as error:
                await self._restart(error)

    async def apply(self, function: Callable[[], Awaitable[T]]) -> T:
        """Make a call that changes the state."""
        result = await self.query(function)
        self._calls.append(function)
        return result

    async def step(self, function: Callable[[], Awaitable[T]]) -> T:
        """:meth:`apply`, and save the state if it is due."""
        result = await self.apply(function)
        self._num_steps += 1
        if self._num_steps % self._save_every == 0:
            await self._save()
        return result

    async def _save(self) -> None:
        folder = self._folder / f"{self._name.replace(' ', '_')}_{self._num_steps}"
        try:
            await self._learner.save(folder)
        except ProcessError as error:
            await self._restart(error)
            return  # the state is saved when the next one is due
        except OSError as error:
            logger.error(f"the state of the {self._name} could not be saved ({error}); the last saved state remains")
            return
        previous, self._saved, self._calls = self._saved, folder, []
        if previous is not None:
            shutil.rmtree(previous, ignore_errors=True)

    async def _restart(self, error: ProcessError) -> None:
        """Start the learner again, load the last saved state, and replay all calls since then."""
        while True:
            if self.restarts >= self._max_restarts:
                raise UserError(
                    f"{error}; the {self._name} has already been restarted {self.restarts} times "
                    f"(cluster.max_restarts={self._max_restarts})"
                ) from error
            self.restarts += 1
            state = f"from {self._saved.name}" if self._saved else "without a saved state"
            logger.warning(f"{error}; the {self._name} is restarted {state}, and {len(self._calls)} calls are replayed")
            try:
                await self._learner.kill()
                await self._learner.start()
                if self._saved is not None:
                    await self._learner.load(self._saved)
                for function in self._calls:
                    await function()
                    self.replayed += 1
                return
            except ProcessError as next_error:
                error = next_error
