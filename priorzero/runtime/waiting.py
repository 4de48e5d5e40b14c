"""Time limits that a suspended process does not exceed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

MAX_SLICE_S = 1.0


async def wait_at_most(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Like :func:`asyncio.wait_for`, but only time in which this process runs counts.

    Ctrl-Z, SIGSTOP, a batch system or a closed laptop suspend a process, and possibly those that it waits for. So the
    limit is counted in slices, of which a suspension uses up only one.

    Raises:
        TimeoutError: the limit has passed; the work was cancelled and has ended.
    """
    task = asyncio.ensure_future(work)
    slice_s, remaining = min(MAX_SLICE_S, seconds / 10), seconds
    try:
        while remaining > 0:
            done, _ = await asyncio.wait([task], timeout=min(slice_s, remaining))
            if done:
                return task.result()
            remaining -= slice_s
        raise TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
