"""Tests of games in worker processes: time limits, crashes, errors and cleanup."""

import asyncio
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from loguru import logger

from priorzero import envs
from priorzero.config import resolve_settings
from priorzero.envs import GameSpec, GameWorker
from priorzero.envs.worker import gather_replies
from priorzero.types import GameTimeoutError, GameWorkerError, UserError
from tests.helpers.fake_games import ACTIONS, FakeGame, NotAGame
from tests.helpers.game_files import story
from tests.helpers.processes import is_running, send_stop_signals
from tests.helpers.slow_games import make_slow_game


@pytest.fixture
def make_worker():
    """Makes workers that are closed after the test."""
    workers = []

    def make(game=FakeGame, *, timeout_s: float = 20.0, start_timeout_s: float = 20.0, **arguments) -> GameWorker:
        workers.append(GameWorker(game, arguments, timeout_s=timeout_s, start_timeout_s=start_timeout_s, name="fake"))
        return workers[-1]

    yield make
    for worker in workers:
        asyncio.run(worker.close())


@pytest.fixture
def worker(make_worker):
    return make_worker()


async def test_worker_plays_in_one_other_process(worker):
    assert worker.pid is None
    state = await worker.reset()
    assert state.valid_actions == ACTIONS
    pid = worker.pid
    assert await worker.step("go") == (FakeGame().step("go"))
    state, reward = await worker.step("go")
    assert (state.score, reward) == (2.0, 1.0)
    assert (await worker.reset()).score == 0.0
    assert worker.pid == pid != os.getpid()
    await worker.close()
    assert not psutil.pid_exists(pid)


async def test_worker_close_lets_the_process_exit_and_can_be_repeated(worker):
    await worker.close()  # before the start
    await worker.reset()
    process = worker._process
    began = time.monotonic()
    await worker.close()
    assert time.monotonic() - began < 1.5
    assert process.returncode == 0  # it was not killed
    assert worker.pid is None
    await worker.close()
    assert (await worker.reset()).score == 0.0  # a new process


@pytest.mark.parametrize("action", ["hang", "hang in C"])
async def test_worker_kills_a_process_that_hangs(make_worker, action):
    worker = make_worker(timeout_s=0.5)
    await worker.reset()
    pid = worker.pid
    began = time.monotonic()
    with pytest.raises(GameTimeoutError, match=f"fake: \"step '{action}'\" took longer than 0.5 s"):
        await worker.step(action)
    assert 0.5 <= time.monotonic() - began < 4.0
    assert not psutil.pid_exists(pid)
    with pytest.raises(GameWorkerError, match=r"call reset\(\) first"):
        await worker.step("go")
    await worker.restart()
    assert (await worker.reset()).score == 0.0
    assert (await worker.step("go"))[1] == 1.0
    assert worker.pid != pid


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that are logged, each with the limit for slow steps set to one second."""
    monkeypatch.setattr("priorzero.envs.worker.SLOW_S", 1.0)
    monkeypatch.setattr("priorzero.envs.worker._logged_as_slow", set())
    texts: list[str] = []
    handler = logger.add(lambda message: texts.append(message.record["message"]), level="WARNING")
    yield texts
    logger.remove(handler)


async def test_worker_may_take_longer_than_its_limit_while_the_game_reports_progress(make_worker, warnings):
    worker = make_worker(timeout_s=1.0)
    await worker.reset()
    began = time.monotonic()
    for _ in range(2):
        state, _ = await worker.step("long")
        assert state.valid_actions == ACTIONS
    assert time.monotonic() - began > 3.9
    (warning,) = warnings  # once
    assert "fake: a long calculation took 2 s in one state" in warning
    assert "This is not an error" in warning


async def test_worker_kills_a_game_that_hangs_after_it_reported_progress(make_worker, warnings):
    worker = make_worker(timeout_s=0.6)
    await worker.reset()
    began = time.monotonic()
    with pytest.raises(GameWorkerError, match=r"took longer than 0\.6 s"):
        await worker.step("stuck")
    assert 0.6 <= time.monotonic() - began < 4.0
    assert warnings == []


async def test_worker_uses_a_reply_that_arrived_while_the_event_loop_was_blocked(make_worker):
    worker = make_worker(timeout_s=0.6)
    await worker.reset()
    step = asyncio.create_task(worker.step("go"))
    await asyncio.sleep(0)  # the request is sent
    time.sleep(1.0)
    assert (await step)[1] == 1.0


@pytest.mark.slow
async def test_worker_waits_for_a_long_search_and_kills_a_search_that_hangs(warnings):
    path = story("detective.z5")
    slow = GameWorker(make_slow_game, {"path": path}, timeout_s=1.5, name="detective")
    hanging = GameWorker(make_slow_game, {"path": path, "hangs_at": 4}, timeout_s=1.5, name="detective")
    try:
        await asyncio.gather(slow.start(), hanging.start())
        began = time.monotonic()
        state = await slow.reset()
        assert time.monotonic() - began > 4.0  # more than twice the limit
        assert "west" in state.valid_actions and "Chief" in state.look
        (warning,) = warnings
        assert warning.startswith("detective: the search for valid actions took ")
        children = psutil.Process(hanging.pid).children
        with pytest.raises(GameWorkerError, match=r"'reset' took longer than 1\.5 s"):
            await asyncio.gather(hanging.reset(), wait_for_child(children, processes := []))
        psutil.wait_procs(processes, timeout=5)
        assert not any(is_running(process.pid) for process in processes)
    finally:
        await asyncio.gather(slow.close(), hanging.close())


async def wait_for_child(children, found: list) -> None:
    """Append the child processes to ``found`` as soon as there are any."""
    while not found:
        await asyncio.sleep(0.02)
        found.extend(children())


@pytest.mark.parametrize("when", ["during a request", "between two requests"])
async def test_worker_reports_a_crash(worker, when):
    await worker.reset()
    pid = worker.pid
    if when == "between two requests":
        os.kill(pid, signal.SIGKILL)
        worker._process.wait()
    with pytest.raises(GameWorkerError, match="died in \"step 'crash'\""):
        await worker.step("crash")
    assert worker.pid is None
    assert not psutil.pid_exists(pid)
    assert (await worker.reset()).score == 0.0  # starts a new process


@pytest.mark.slow
async def test_worker_leaks_nothing_when_processes_are_killed_repeatedly(make_worker):
    def resources():
        """Numbers of child processes (including zombies), of open files, and of shared memory files."""
        process = psutil.Process()
        return len(process.children()), process.num_fds(), len(os.listdir("/dev/shm"))

    async def kill(worker, times):
        for n in range(times):
            if n % 2:
                os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(GameWorkerError):
                await worker.step("crash")
            await worker.reset()

    workers = [make_worker() for _ in range(4)]
    await asyncio.gather(*(worker.reset() for worker in workers))
    before = resources()
    await asyncio.gather(*(kill(worker, 10) for worker in workers))
    assert resources() == before
    await asyncio.gather(*(worker.close() for worker in workers))
    assert resources()[0] == before[0] - 4


async def test_worker_raises_exceptions_of_the_game_and_keeps_the_process(worker):
    await worker.reset()
    await worker.step("go")
    pid = worker.pid
    with pytest.raises(GameWorkerError, match="KeyError: 'the lamp is gone'") as caught:
        await worker.step("raise")
    assert re.search(r"fake_games.py, line \d+, in \w+\)$", str(caught.value)) and "\n" not in str(caught.value)
    assert not isinstance(caught.value, GameTimeoutError)
    with pytest.raises(UserError, match=r"^type something else$"):
        await worker.step("user error")
    assert (await worker.step("go"))[0].score == 2.0
    assert worker.pid == pid


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        ("raise", GameWorkerError, "'start' failed inside the worker process: KeyError: 'the lamp is gone'"),
        ("user error", UserError, "type something else"),
        ("crash", GameWorkerError, "died in 'start'"),
        ("hang", GameWorkerError, "'start' took longer than 1 s"),
    ],
)
async def test_worker_reset_reports_a_failed_start(make_worker, start, error, message):
    worker = make_worker(start=start, start_timeout_s=1.0 if start == "hang" else 20.0)
    with pytest.raises(error, match=message):
        await worker.reset()
    assert worker.pid is None


@pytest.mark.parametrize(("game", "errors"), [(NotAGame, GameWorkerError), (lambda: None, pickle.PicklingError)])
async def test_worker_start_reports_a_game_that_cannot_be_created_or_pickled(make_worker, game, errors):
    worker = make_worker(game, size=1)
    with pytest.raises(errors):
        await worker.start()
    assert worker.pid is None


async def test_worker_step_does_not_block_the_event_loop(worker):
    await worker.reset()
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.02)
            ticks += 1

    ticking = asyncio.create_task(tick())
    await worker.step("pause")  # half a second
    ticking.cancel()
    assert ticks >= 10


async def test_worker_refuses_two_requests_at_once(worker):
    await worker.reset()
    first = asyncio.create_task(worker.step("pause"))
    await asyncio.sleep(0.05)
    with pytest.raises(RuntimeError, match="while another request is in progress"):
        await worker.step("go")
    await first
    assert (await worker.step("go"))[1] == 1.0


async def test_worker_kills_the_process_when_a_request_is_cancelled(worker):
    await worker.reset()
    pid = worker.pid
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(worker.step("pause"), 0.1)
    assert not psutil.pid_exists(pid)
    await worker.reset()
    assert (await worker.step("go"))[0].feedback == "ok"


async def test_worker_process_ignores_stop_signals_also_while_it_starts(worker):
    worker.launch()
    send_stop_signals(psutil.Process(worker.pid))
    await worker.reset()
    send_stop_signals(psutil.Process(worker.pid))
    assert (await worker.step("go"))[1] == 1.0
    assert os.getsid(worker.pid) != os.getsid(0)  # the terminal does not send Ctrl-C to it


async def test_worker_process_does_not_print_to_the_terminal(worker, capfd):
    await worker.reset()
    await worker.step("print")
    assert (await worker.step("go"))[1] == 1.0
    assert capfd.readouterr().out == ""


async def test_worker_returns_large_texts_and_its_process_does_not_import_torch(worker):
    await worker.reset()
    assert len((await worker.step("big"))[0].feedback) == 3_000_000
    modules = (await worker.step("modules"))[0].feedback.split()
    assert not {"torch", "jericho", "textworld", "pytest"} & set(modules)
    assert "no-torch" in modules  # so that spaCy cannot import it later


PARENT = """
import asyncio, os, sys
from tests.helpers.game_files import story
from tests.helpers.fake_games import FakeGame
from priorzero import envs
from priorzero.config import resolve_settings
from priorzero.envs import GameSpec, GameWorker
async def main():
    worker = GameWorker(FakeGame, {}, timeout_s=100.0)
    await worker.reset()
    print(worker.pid, flush=True)
    await worker.step(sys.argv[1])
    await asyncio.sleep(100)
asyncio.run(main())
"""


@pytest.mark.parametrize("action", ["go", "hang in C"])
def test_worker_process_exits_when_its_parent_is_killed(action):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, action],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    pid = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 5
    while (running := is_running(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running


async def test_gather_replies_returns_worker_errors_and_raises_all_others():
    async def reply(value):
        if isinstance(value, Exception):
            raise value
        return value

    error = GameWorkerError("a game failed")
    assert await gather_replies(map(reply, (1, error, 2))) == [1, error, 2]
    with pytest.raises(UserError, match="wrong"):
        await gather_replies(map(reply, (error, UserError("wrong"), 2)))


def test_make_workers_passes_the_settings_of_the_games():
    env = {"collector_env_num": 2, "max_episode_steps": 7, "look_and_inventory": False, "drop_inert_commands": False}
    settings = resolve_settings({"env": {**env, "valid_actions": "exact"}})
    specs = [GameSpec(name, "jericho", Path(name), "", name) for name in ("a.z5", "b.z5")]
    workers = envs.make_workers(settings, specs, count=3, first_seed=5)
    assert [worker._arguments.pop("spec") for worker in workers] == [specs[0], specs[1], specs[0]]
    expected = {"max_episode_steps": 7, "look_and_inventory": False, "drop_inert_commands": False}
    expected |= {"valid_actions": "exact", "max_score": 0}
    assert [worker._arguments for worker in workers] == [{"seed": seed, **expected} for seed in (5, 6, 7)]


@pytest.mark.slow
async def test_worker_kills_and_restarts_a_jericho_game():
    arguments = {"seed": 0, "max_episode_steps": 50, "look_and_inventory": True, "drop_inert_commands": True}
    spec = envs.resolve_game(str(story("zork1.z5")))
    worker = envs.make_worker(spec, **arguments, valid_actions="exact", timeout_s=20.0)
    try:
        first = await worker.reset()
        assert "open mailbox" in first.valid_actions
        state, _ = await worker.step("open mailbox")
        assert "leaflet" in state.feedback
        pid = worker.pid
        os.kill(pid, signal.SIGSTOP)  # no reply, as in an endless loop in C
        worker._timeout_s = 0.5
        with pytest.raises(GameWorkerError, match=r"\"step 'north'\" took longer than 0\.5 s"):
            await worker.step("north")
        assert not psutil.pid_exists(pid)
        worker._timeout_s = 20.0
        assert await worker.reset() == first
    finally:
        await worker.close()
