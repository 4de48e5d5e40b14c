"""What keeps the parts of the loop apart."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from priorzero.runtime.concurrency import STOP_SIGNALS, Gate, OwnerThread, gather_or_cancel, signals_end_at_once
from priorzero.runtime.timeline import Timeline


def test_an_owner_runs_one_call_at_a_time_in_their_order_and_the_loop_goes_on():
    timeline = Timeline()
    owner = OwnerThread("owner", timeline)
    log, threads = [], set()

    def work(name):
        threads.add(threading.current_thread().name)
        log.append(f"begin {name}")
        time.sleep(0.02)
        log.append(f"end {name}")
        return name

    async def run():
        calls = asyncio.gather(*(owner.run("work", work, name) for name in "abc"))
        ticks = 0
        while not calls.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return await calls, ticks

    names, ticks = asyncio.run(run())
    assert names == ["a", "b", "c"] and ticks > 5 and len(threads) == 1
    assert log == [f"{what} {name}" for name in "abc" for what in ("begin", "end")]
    assert timeline.take().busy["work"] >= 0.06
    owner.close()


def test_closing_an_owner_waits_for_what_has_begun_only():
    owner = OwnerThread("owner", Timeline())
    done = []

    def work(name):
        time.sleep(0.05)
        done.append(name)

    async def run():
        calls = [asyncio.ensure_future(owner.run("work", work, name)) for name in "ab"]
        await asyncio.sleep(0.01)
        for call in calls:
            call.cancel()
        owner.close()
        return list(done)

    assert asyncio.run(run()) == ["a"] and done == ["a"]


def test_an_error_reaches_the_caller():
    owner = OwnerThread("owner", Timeline())
    with pytest.raises(ZeroDivisionError):
        asyncio.run(owner.run("work", lambda: 1 / 0))
    owner.close()


def test_the_gate():
    gate, log = Gate(), []

    async def together(name, seconds):
        async with gate.together():
            log.append(f"+{name}")
            await asyncio.sleep(seconds)
            log.append(f"-{name}")

    async def alone():
        async with gate.alone():
            log.append("+alone")
            await asyncio.sleep(0.02)
            log.append("-alone")

    async def run():
        first = asyncio.gather(together("a", 0.03), together("b", 0.05))
        await asyncio.sleep(0.01)
        one = asyncio.ensure_future(alone())
        await asyncio.sleep(0.01)
        late = asyncio.ensure_future(together("late", 0.01))
        await asyncio.gather(first, one, late)

    asyncio.run(run())
    assert log == ["+a", "+b", "-a", "-b", "+alone", "-alone", "+late", "-late"]


def test_who_is_cancelled_leaves_the_gate_open():
    gate = Gate()

    async def inside(door):
        async with door:
            await asyncio.sleep(10)

    async def run():
        for door in (gate.together, gate.alone):
            one, waiting = asyncio.ensure_future(inside(door())), asyncio.ensure_future(inside(gate.alone()))
            await asyncio.sleep(0.01)
            for task in (waiting, one):
                task.cancel()
            await asyncio.gather(one, waiting, return_exceptions=True)
        async with asyncio.timeout(1), gate.together():
            pass
        async with asyncio.timeout(1), gate.alone():
            return True

    assert asyncio.run(run())


def test_when_one_fails_the_others_have_ended():
    ended = []

    async def slow():
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(0.01)  # cleaning up takes a moment
            ended.append("slow")

    async def fails():
        await asyncio.sleep(0.01)
        raise ValueError("boom")

    async def run():
        with pytest.raises(ValueError, match="boom"):
            await gather_or_cancel(slow(), fails())
        assert ended == ["slow"]
        return await gather_or_cancel(asyncio.sleep(0.01, "a"), asyncio.sleep(0, "b"))

    assert asyncio.run(run()) == ["a", "b"]


LOADING = """
import asyncio, subprocess, sys
from pathlib import Path
from priorzero.concurrency import scratch_folders, signals_end_at_once

folder = Path(sys.argv[1], "scratch")
folder.mkdir()
(folder / "parameters").write_text("many")
scratch_folders.add(folder)
# A child that ignores every polite signal, with a child of its own.
child = "import signal, subprocess, time; signal.signal(15, signal.SIG_IGN); p = subprocess.Popen(['sleep', '60']); "
child += "print(p.pid, flush=True); time.sleep(60)"

async def load():
    print(subprocess.Popen([sys.executable, "-c", child], stderr=subprocess.DEVNULL).pid, flush=True)
    await asyncio.to_thread(__import__("time").sleep, 60)  # what cannot be cancelled

with signals_end_at_once():
    asyncio.run(load())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_there_is_anything_to_save_ends_all_at_once(tmp_path, number):
    with subprocess.Popen(
        [sys.executable, "-c", LOADING, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    ) as process:
        children = [int(process.stdout.readline()) for _ in range(2)]
        process.send_signal(number)
        assert process.wait(5) == 130
        said = process.stderr.read()
    assert said == f"{number.name}: ended at once; nothing more is saved\n"
    gone = time.monotonic() + 2
    while (left := [pid for pid in children if runs(pid)]) and time.monotonic() < gone:
        time.sleep(0.01)
    assert not left and not list(tmp_path.iterdir())


def runs(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_signals_are_given_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with signals_end_at_once():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
