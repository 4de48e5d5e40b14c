"""Tests of the owner thread, the readers-writer lock, stop signals, groups of tasks, and runs in event loops."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from priorzero.runtime import concurrency
from priorzero.runtime.concurrency import (
    OwnerThread,
    ReadersWriterLock,
    StopRequest,
    check_no_running_loop,
    exit_immediately_on_signal,
    gather_or_cancel,
    only_run_of_process,
)
from priorzero.runtime.signals import STOP_SIGNALS, children_ignore_stop_signals
from priorzero.runtime.timeline import Timeline
from priorzero.types import UserError
from tests.helpers.processes import is_running, send_stop_signals


async def test_owner_thread_runs_calls_in_order_without_blocking_the_event_loop():
    timeline = Timeline()
    owner = OwnerThread("owner", timeline)
    log, threads = [], set()

    def work(name):
        threads.add(threading.current_thread().name)
        log.append(f"begin {name}")
        time.sleep(0.02)
        log.append(f"end {name}")
        return name

    calls = asyncio.gather(*(owner.run("work", work, name) for name in "abc"))
    ticks = 0
    while not calls.done():
        await asyncio.sleep(0.001)
        ticks += 1
    assert await calls == ["a", "b", "c"] and ticks > 5 and len(threads) == 1
    assert log == [f"{what} {name}" for name in "abc" for what in ("begin", "end")]
    assert timeline.finish_interval().busy["work"] >= 0.06
    owner.close()


async def test_owner_thread_close_waits_for_the_running_call_only():
    owner = OwnerThread("owner", Timeline())
    done = []

    def work(name):
        time.sleep(0.05)
        done.append(name)

    calls = [asyncio.ensure_future(owner.run("work", work, name)) for name in "ab"]
    await asyncio.sleep(0.01)
    for call in calls:
        call.cancel()
    owner.close()
    assert done == ["a"]
    await asyncio.wait(calls)
    assert done == ["a"]


async def test_owner_thread_drain_waits_for_a_cancelled_call():
    owner, done = OwnerThread("owner", Timeline()), []
    call = asyncio.ensure_future(owner.run("work", lambda: (time.sleep(0.05), done.append("work"))))
    await asyncio.sleep(0.01)
    call.cancel()
    await owner.drain()
    assert done == ["work"]
    owner.close()


async def test_owner_thread_raises_errors_in_the_caller():
    owner = OwnerThread("owner", Timeline())
    with pytest.raises(ZeroDivisionError):
        await owner.run("work", lambda: 1 / 0)
    owner.close()


async def test_readers_writer_lock_prefers_writers():
    lock, log = ReadersWriterLock(), []

    async def read(name, seconds):
        async with lock.shared():
            log.append(f"begin {name}")
            await asyncio.sleep(seconds)
            log.append(f"end {name}")

    async def write():
        async with lock.exclusive():
            log.append("begin writer")
            await asyncio.sleep(0.02)
            log.append("end writer")

    first = asyncio.gather(read("a", 0.03), read("b", 0.05))
    await asyncio.sleep(0.01)
    writer = asyncio.ensure_future(write())
    await asyncio.sleep(0.01)
    later = asyncio.ensure_future(read("c", 0.01))
    await asyncio.gather(first, writer, later)
    expected = "begin a, begin b, end a, end b, begin writer, end writer, begin c, end c"
    assert log == expected.split(", ")


async def test_readers_writer_lock_is_released_when_holders_and_waiters_are_cancelled():
    lock = ReadersWriterLock()

    async def hold(context):
        async with context:
            await asyncio.sleep(10)

    for mode in (lock.shared, lock.exclusive):
        holder, waiter = asyncio.ensure_future(hold(mode())), asyncio.ensure_future(hold(lock.exclusive()))
        await asyncio.sleep(0.01)
        assert not holder.done() and not waiter.done()
        for task in (waiter, holder):
            task.cancel()
        await asyncio.gather(holder, waiter, return_exceptions=True)
    entered = []
    for mode in (lock.shared, lock.exclusive):
        async with asyncio.timeout(1), mode():
            entered.append(mode)
    assert entered == [lock.shared, lock.exclusive]


async def test_gather_or_cancel_waits_for_cancelled_tasks_before_it_raises():
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

    with pytest.raises(ValueError, match="boom"):
        await gather_or_cancel(slow(), fails())
    assert ended == ["slow"]
    assert await gather_or_cancel(asyncio.sleep(0.01, "a"), asyncio.sleep(0, "b")) == ["a", "b"]


@pytest.fixture
def default_handlers():
    """The handlers of a process that was started in a terminal; `nohup` and `&` let it ignore some signals."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


PROGRAM = """
import asyncio, signal, subprocess, sys
from pathlib import Path
from priorzero.runtime.concurrency import exit_immediately_on_signal, scratch_folders

for number in (signal.SIGINT, signal.SIGHUP):  # ignored if the tests were started with `nohup` or `&`
    signal.signal(number, signal.SIG_DFL)
folder = Path(sys.argv[1], "scratch")
folder.mkdir()
(folder / "parameters").write_text("many")
scratch_folders.add(folder)
# A child process that ignores SIGTERM and has a child process itself.
child = "import signal, subprocess, time; signal.signal(15, signal.SIG_IGN); p = subprocess.Popen(['sleep', '60']); "
child += "print(p.pid, flush=True); time.sleep(60)"

async def main():
    print(subprocess.Popen([sys.executable, "-c", child], stderr=subprocess.DEVNULL).pid, flush=True)
    await asyncio.to_thread(__import__("time").sleep, 60)  # a thread cannot be cancelled

with exit_immediately_on_signal():
    asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_exit_immediately_on_signal_kills_children_and_deletes_scratch_folders(tmp_path, number):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    ) as process:
        children = [int(process.stdout.readline()) for _ in range(2)]
        process.send_signal(number)
        assert process.wait(5) == 130
        errors = process.stderr.read()
    assert errors == f"{number.name}: exiting immediately; nothing more is saved\n"
    deadline = time.monotonic() + 2
    while (running := [pid for pid in children if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running and not list(tmp_path.iterdir())


def test_exit_immediately_on_signal_restores_previous_handlers(default_handlers):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with exit_immediately_on_signal():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


async def test_stop_request_run_or_cancel_cancels_work_when_a_stop_is_requested():
    ended = []

    async def long_work():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def short_work():
        return 7

    async def fails():
        raise ValueError("ours")

    stop = StopRequest()
    assert await stop.run_or_cancel(short_work()) == 7
    with pytest.raises(ValueError, match="ours"):
        await stop.run_or_cancel(fails())
    asyncio.get_running_loop().call_later(0.01, stop.request, "test")
    assert await stop.run_or_cancel(long_work()) is None and ended == [True] and stop.requested


async def receive(*numbers, pause_s=0.01):
    """Send signals to this process."""
    for number in numbers:
        os.kill(os.getpid(), number)
        await asyncio.sleep(pause_s)


@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_stop_request_records_a_signal_and_restores_previous_handlers(default_handlers, number):
    before, stop = [signal.getsignal(n) for n in STOP_SIGNALS], StopRequest()
    with stop.handle_signals():
        await receive(number)
    assert stop.requested
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before


async def test_stop_request_lets_ignored_signals_be_ignored(default_handlers):
    """`nohup` ignores SIGHUP, and a shell without job control the SIGINT of its background jobs."""
    stop, ignored = StopRequest(), (signal.SIGINT, signal.SIGHUP)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    with exit_immediately_on_signal(), stop.handle_signals():
        await receive(*ignored)
    assert not stop.requested and all(signal.getsignal(number) is signal.SIG_IGN for number in ignored)


class Exited(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def clock(monkeypatch):
    """Sets the time that StopRequest sees, and lets it raise Exited."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(concurrency, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    monkeypatch.setattr(concurrency, "exit_immediately", lambda: (_ for _ in ()).throw(Exited))
    return now


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_stop_request_exits_at_a_second_ctrl_c_or_sigterm(clock, number):
    stop = StopRequest()
    stop.receive(number)
    clock.seconds += 0.9
    stop.receive(number)  # `timeout` sends its signal twice
    clock.seconds += 0.2
    with pytest.raises(Exited):
        stop.receive(number)


async def test_stop_request_does_not_exit_at_other_sequences_of_signals(clock):
    """LSF sends SIGINT, then SIGTERM; Slurm may send SIGUSR1, then SIGTERM; the kernel sends SIGXCPU every second."""
    stop = StopRequest()
    for number in (signal.SIGINT, *STOP_SIGNALS[2:], *STOP_SIGNALS[2:], signal.SIGTERM):
        stop.receive(number)
        clock.seconds += 10
    assert stop.requested


async def test_stop_request_handles_no_signal_outside_the_main_thread():
    async def handle():
        with StopRequest().handle_signals():
            return [signal.getsignal(number) for number in STOP_SIGNALS]

    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    assert await asyncio.to_thread(lambda: asyncio.run(handle())) == before


# ---- children and event loops ----


def test_children_ignore_stop_signals_from_the_start_and_pass_this_on():
    grandchild = "import time; print('ready', flush=True); time.sleep(60)"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with children_ignore_stop_signals():
        process = subprocess.Popen([sys.executable, "-c", child, grandchild], stdout=subprocess.PIPE, text=True)
    send_stop_signals(psutil.Process(process.pid))
    assert process.stdout.readline() == "ready\n"
    (started,) = psutil.Process(process.pid).children()
    send_stop_signals(started)
    assert is_running(process.pid) and is_running(started.pid)
    started.kill()
    assert process.wait(10) == 0
    process.stdout.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def test_check_no_running_loop_names_what_to_await():
    check_no_running_loop("train(settings)")

    async def in_a_loop():
        check_no_running_loop("train(settings)")

    with pytest.raises(UserError, match=r"an event loop is running .* type: await train\(settings\)"):
        asyncio.run(in_a_loop())


def test_only_run_of_process_refuses_a_second_run_until_the_first_has_ended():
    with only_run_of_process(), pytest.raises(UserError, match="start a second process"), only_run_of_process():
        pass
    with only_run_of_process():
        pass
