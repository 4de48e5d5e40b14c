"""Remote calls with a time limit, and errors that name the process that failed."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError

from priorzero.types import EngineError, GameWorkerError, ProcessError, UserError


async def result_of(reference: Any, *, timeout_s: float, process: str, setting: str = "cluster.timeout_s") -> Any:
    """Wait for the result of a remote call.

    Args:
        reference: Ray's reference to the result, or any other awaitable.
        timeout_s: time limit in seconds.
        process: name of the process, for messages.
        setting: the setting that gives the time limit, for messages.

    Raises:
        ProcessError: the process, or a process that it called, died or did not reply in time.
        UserError, GameWorkerError, EngineError: raised in the process.
    """
    try:
        return await asyncio.wait_for(_await(reference), timeout_s)
    except TimeoutError as error:
        raise ProcessError(f"{process} did not reply within {timeout_s:g} s ({setting})") from error
    except RayTaskError as error:  # an exception was raised in the process
        for kind in (UserError, GameWorkerError, EngineError):
            if isinstance(error.cause, kind):
                raise kind(str(error.cause)) from error
        if isinstance(error.cause, (RayActorError, GetTimeoutError)):
            raise ProcessError(f"a call from {process} to another process failed ({_one_line(error.cause)})") from error
        raise
    except RayActorError as error:
        raise ProcessError(f"{process} died ({_one_line(error)})") from error
    except RayError as error:
        raise ProcessError(f"{process} cannot be reached ({type(error).__name__}: {error})") from error


async def wait_for_restart(actor: Any, *, timeout_s: float, process: str) -> bool:
    """Wait until an actor replies that Ray restarts; False if Ray has given it up or ``timeout_s`` has passed."""
    started = time.monotonic()
    while (remaining := timeout_s - (time.monotonic() - started)) > 0:
        try:
            ready = actor.__ray_ready__.remote()
            await result_of(ready, timeout_s=remaining, process=process, setting="cluster.start_timeout_s")
            return True
        except ProcessError as error:
            if isinstance(error.__cause__, ActorDiedError):
                return False
            await asyncio.sleep(1.0)  # the process is not running yet
    return False


def kill_if_hanging(actor: Any, error: ProcessError) -> None:
    """Kill an actor that did not reply in time, so that Ray restarts it."""
    if isinstance(error.__cause__, TimeoutError):
        ray.kill(actor, no_restart=False)


def kill(actor: Any) -> None:
    """Kill an actor's process. Ray does not restart it."""
    ray.kill(actor, no_restart=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


async def _await(reference: Any) -> Any:
    return await reference
