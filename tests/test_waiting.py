"""Time limits: what counts, and what happens to the work."""

from __future__ import annotations

import asyncio
import time

import pytest

from priorzero.runtime.waiting import wait_at_most


async def test_wait_at_most_returns_results_and_raises_errors():
    assert await wait_at_most(5.0, asyncio.sleep(0.01, "result")) == "result"
    with pytest.raises(ZeroDivisionError):
        await wait_at_most(5.0, fails())


async def fails():
    return 1 / 0


async def test_wait_at_most_cancels_the_work_after_the_limit_and_when_it_is_cancelled():
    ended = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(time.monotonic())

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await wait_at_most(0.2, work())
    assert 0.2 <= ended[0] - began < 1.0
    waiting = asyncio.create_task(wait_at_most(60.0, work()))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(ended) == 2


async def test_wait_at_most_does_not_count_the_time_of_a_suspension():
    async def work():
        await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)  # the process that it waits for was suspended, too
        return "result"

    waiting = asyncio.create_task(wait_at_most(0.5, work()))
    await asyncio.sleep(0.01)
    time.sleep(1.0)  # this process does not run, as after SIGSTOP
    assert await waiting == "result"
