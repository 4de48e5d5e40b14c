"""Remote calls with a time limit, and errors that name the process that failed."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError

from priorzero.runtime.waiting import wait_at_most
from priorzero.settings import ClusterSettings
from priorzero.types import EngineError, GameTimeoutError, GameWorkerError, ProcessError, UserError


class NodeEndedError(ProcessError):
    """Ray's raylet on this machine has ended, and with it all processes of the run on this machine."""


async def result_of(reference: Any, *, timeout_s: float, process: str, setting: str = "cluster.timeout_s") -> Any:
    """Wait for the result of a remote call: of Ray's reference to it, or of any other awaitable.

    Messages name the ``process`` and the ``setting`` that gives the time limit.

    Raises:
        ProcessError: the process, or a process that it called, died or did not reply in time.
        UserError, GameWorkerError, EngineError: raised in the process.
    """
    try:
        return await wait_at_most(timeout_s, _awaited(reference))
    except TimeoutError as error:
        raise ProcessError(f"{process} did not reply within {timeout_s:g} s ({setting})") from error
    except RayTaskError as error:  # an exception was raised in the process
        for kind in (UserError, GameTimeoutError, GameWorkerError, EngineError):
            if isinstance(error.cause, kind):
                raise kind(str(error.cause)) from error
        if isinstance(error.cause, (RayActorError, GetTimeoutError)):
            raise ProcessError(f"a call from {process} to another process failed ({_one_line(error.cause)})") from error
        raise
    except RayActorError as error:
        raise ProcessError(f"{process} died ({_one_line(error)})") from error
    except RayError as error:
        raise ProcessError(f"{process} cannot be reached ({type(error).__name__}: {error})") from error


async def wait_for_start(reference: Any, *, cluster: ClusterSettings, process: str) -> Any:
    """:func:`result_of` for a call that a process completes when it has loaded everything."""
    limit, setting = cluster.start_timeout_s, "cluster.start_timeout_s"
    return await result_of(reference, timeout_s=limit, process=process, setting=setting)


async def wait_for_restart(actor: Any, *, cluster: ClusterSettings, process: str) -> bool:
    """Wait until an actor replies that Ray restarts; False if Ray has given it up or the time limit has passed."""
    started = time.monotonic()
    while (remaining := cluster.start_timeout_s - (time.monotonic() - started)) > 0:
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


async def _awaited(reference: Any) -> Any:
    return await reference


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
