"""Calls to Ray actors that end: with an answer, or with an error that says which part failed and how."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import ray
from loguru import logger
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError

from priorzero.types import EngineError, GameWorkerError, ProcessError, UserError


async def answer(reference: Any, *, timeout_s: float, who: str, setting: str = "cluster.timeout_s") -> Any:
    """What a remote call returns.

    Args:
        reference: Ray's reference to the answer, or anything that can be awaited.
        timeout_s: the longest that it may take.
        who: the part, for messages.
        setting: that names the limit, for messages.

    Raises:
        ProcessError: it died, or did not answer in time; or what it asked in turn did.
        UserError, GameWorkerError, EngineError: raised by the part.
    """
    try:
        return await asyncio.wait_for(_await(reference), timeout_s)
    except TimeoutError as error:
        raise ProcessError(f"{who} did not answer within {timeout_s:g} s ({setting})") from error
    except RayTaskError as error:  # an exception inside the part: as it is
        for kind in (UserError, GameWorkerError, EngineError):
            if isinstance(error.cause, kind):
                raise kind(str(error.cause)) from error
        if isinstance(error.cause, (RayActorError, GetTimeoutError)):
            raise ProcessError(f"what {who} asked failed ({_line(error.cause)})") from error
        raise
    except RayActorError as error:
        raise ProcessError(f"{who} died ({_line(error)})") from error
    except RayError as error:
        raise ProcessError(f"{who} cannot be reached ({type(error).__name__}: {error})") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


async def _await(reference: Any) -> Any:
    return await reference


async def comes_back(actor: Any, *, timeout_s: float, who: str) -> bool:
    """Wait for an actor that Ray starts again; False if Ray has given it up, or it takes longer than ``timeout_s``."""
    began = time.monotonic()
    while (left := timeout_s - (time.monotonic() - began)) > 0:
        try:
            await answer(actor.__ray_ready__.remote(), timeout_s=left, who=who, setting="cluster.start_timeout_s")
            return True
        except ProcessError as error:
            if isinstance(error.__cause__, ActorDiedError):
                return False
            await asyncio.sleep(1.0)  # unavailable: not up yet
    return False


def kill(actor: Any) -> None:
    """End an actor's process for good."""
    ray.kill(actor, no_restart=True)


class Restartable(Protocol):
    """Something that can be started afresh, and brought to a state that was saved."""

    async def start(self) -> None: ...

    async def save(self, folder: Path) -> None: ...

    async def load(self, folder: Path) -> None: ...

    async def kill(self) -> None: ...


class Durable:
    """A learner that survives its processes: calls since its last saved state are kept, and made again after a restart.

    The calls must lead from equal states to equal states, and tell what they told before; then a run with a restart is
    the run without.

    Args:
        part: the learner.
        name: for messages and for the folder of its states.
        folder: where its states go, the last one only.
        save_every: calls of :meth:`step` between two states.
        max_restarts: beyond them the run ends.

    Attributes:
        restarts: so far.
        replayed: calls that were made again.
    """

    def __init__(self, part: Restartable, *, name: str, folder: Path, save_every: int, max_restarts: int) -> None:
        self.part = part
        self.name = name
        self.restarts = 0
        self.replayed = 0
        self._folder = folder
        self._save_every = save_every
        self._max_restarts = max_restarts
        self._steps = 0
        self._saved: Path | None = None
        self._log: list[Callable[[], Awaitable[Any]]] = []

    async def call(self, function: Callable[[], Awaitable[Any]]) -> Any:
        """Make a call that changes the learner's state; returns its answer.

        Raises:
            UserError: the learner has failed too often.
        """
        told = await self.ask(function)
        self._log.append(function)
        return told

    async def ask(self, function: Callable[[], Awaitable[Any]]) -> Any:
        """Make a call that changes nothing, or that :meth:`call` takes note of; it is made again after a restart.

        Raises:
            UserError: the learner has failed too often.
        """
        while True:
            try:
                return await function()
            except ProcessError as error:
                await self._restart(error)

    async def step(self, function: Callable[[], Awaitable[Any]]) -> Any:
        """:meth:`call`, after which the state is saved when it is due."""
        told = await self.call(function)
        self._steps += 1
        if self._steps % self._save_every == 0:
            await self._save()
        return told

    async def _save(self) -> None:
        folder = self._folder / f"{self.name}_{self._steps}"
        try:
            await self.part.save(folder)
        except ProcessError as error:
            await self._restart(error)
            return  # the next one will do
        except OSError as error:
            logger.error(f"{self.name}: its state could not be saved ({error}); the last one stays")
            return
        before, self._saved, self._log = self._saved, folder, []
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)

    async def _restart(self, error: ProcessError) -> None:
        """Start afresh, load the last state, and make all calls since then again."""
        while True:
            if self.restarts >= self._max_restarts:
                raise UserError(
                    f"{error}; the {self.name} has been started again {self.restarts} times already "
                    f"(cluster.max_restarts={self._max_restarts})"
                ) from error
            self.restarts += 1
            logger.warning(
                f"{error}; the {self.name} is started again, from "
                f"{self._saved.name if self._saved else 'its beginning'} and {len(self._log)} calls since"
            )
            try:
                await self.part.kill()
                await self.part.start()
                if self._saved is not None:
                    await self.part.load(self._saved)
                for function in self._log:
                    await function()
                    self.replayed += 1
                return
            except ProcessError as again:
                error = again
