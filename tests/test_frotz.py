"""Tests of the search for valid actions in two threads, which must agree with Jericho's own."""

import ctypes
import os
import threading
import time
from collections import deque

import numpy as np
import pytest

from priorzero.envs.frotz import (
    MAX_SINGLE_THREAD_SEARCHES,
    NUM_CHUNKS,
    ChunkResult,
    EmulatorState,
    ReproducibleFrotzEnv,
    _try_chunks,
)
from tests.helpers.game_files import story


@pytest.fixture
def open_env():
    opened = []

    def make(name: str = "zork1.z5", *, second_opened: bool = False, **changes) -> ReproducibleFrotzEnv:
        opened.append(ReproducibleFrotzEnv(story(name), **{"seed": 0, "filter_threads": 2, **changes}))
        opened[-1].reset()
        if second_opened:  # the second emulator, which the first search opens
            opened[-1]._filter_candidate_actions(["wait"], use_ctypes=True)
            opened[-1]._single_thread_searches = 0
        return opened[-1]

    yield make
    for env in opened:
        env.close_emulators()


def walkthrough_states(env: ReproducibleFrotzEnv, count: int) -> list:
    """``count`` states, evenly spread over Jericho's walkthrough."""
    commands = env.get_walkthrough()
    states = []
    for number, command in enumerate(commands):
        if number % (len(commands) // count) == 0 and len(states) < count:
            states.append(env.get_state())
        env.step(command)
    return states


def digest(saved: tuple) -> bytes:
    return EmulatorState(saved, b"").digest()


def candidates(env: ReproducibleFrotzEnv, *, objects: int) -> list[str]:
    """Commands with some of the visible objects. Jericho uses more, which takes longer."""
    names = env._score_object_names(env._identify_interactive_objects(use_object_tree=True))
    return env.act_gen.generate_actions(names[:objects])


def groups(by_change: dict) -> list[tuple[bytes, list[str]]]:
    """The result as a list. Changes are converted to bytes, because Jericho's are tuples of numbers."""
    return [
        (change if isinstance(change, bytes) else np.array(change, dtype=np.uint16).tobytes(), commands)
        for change, commands in by_change.items()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zork1.z5", "detective.z5"])
def test_frotz_two_threads_find_the_commands_that_jericho_finds(open_env, name):
    env, one = open_env(name), open_env(name, filter_threads=1)
    states = walkthrough_states(env, 6)
    found = 0
    for state in states:
        for each in (env, one):
            each.set_state(state)
        commands = candidates(env, objects=4)
        env._single_thread_searches = 0
        commands_by_change = groups(env._filter_candidate_actions(commands, use_ctypes=True))
        assert commands_by_change == groups(one._filter_candidate_actions(commands, use_ctypes=True))
        assert digest(env.get_state()) == digest(state)  # the state of the game is unchanged
        found += len(commands_by_change)
    assert env._second is not None
    assert one._second is None
    assert found > 2 * len(states)


def test_frotz_python_and_c_try_commands_with_equal_results(open_env):
    env = open_env()
    for state in walkthrough_states(env, 6):
        env.set_state(state)
        commands = [command.encode() for command in candidates(env, objects=4)]
        env._filter_candidate_actions(["wait"], use_ctypes=True)  # opens the second emulator
        env._second.env.set_state(state)
        in_c = env._try_in_c(commands)
        assert env._second._try(commands, state) == in_c
        assert len(in_c[0]) > 5
        assert digest(env._second.env.get_state()[:-1]) == digest(state[:-1])  # all but the last text


def test_frotz_excludes_commands_that_first_take_an_object(open_env):
    env = open_env(second_opened=True)
    env.step("open mailbox")
    state = env.get_state()
    assert "(Taken)" in env.step("read leaflet")[0]
    env.set_state(state)
    commands = [b"read leaflet", b"take leaflet", b"read mailbox"]
    env._second.env.set_state(state)
    in_c = env._try_in_c(commands)
    assert env._second._try(commands, state) == in_c
    assert [command for command, _ in in_c[0]] == [b"take leaflet"]


def test_frotz_uses_both_threads(open_env):
    env = open_env(second_opened=True)
    threads = set()
    both = threading.Barrier(2, timeout=20)

    def watched(original):
        def attempt(*arguments):
            if threading.get_ident() not in threads:
                threads.add(threading.get_ident())
                both.wait()  # passes only if the other thread gets a chunk too
            return original(*arguments)

        return attempt

    env._try_in_c, env._second._try = watched(env._try_in_c), watched(env._second._try)
    assert env.get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False)
    assert len(threads) == 2


@pytest.mark.parametrize("halting", [0, 3, 7, 9])
def test_frotz_ignores_commands_after_one_that_halts_the_emulator(open_env, halting):
    commands = [f"say {number}" for number in range(10)]
    env = open_env(second_opened=True)

    def attempt(chunk, state=None):
        effects = []
        for command in chunk:
            if command == f"say {halting}".encode():
                time.sleep(0.2)  # meanwhile the other thread tries all following commands
                return ChunkResult(effects, halted=True)
            effects.append((command, command))
        return ChunkResult(effects, halted=False)

    env._try_in_c = env._second._try = attempt
    found = env._filter_candidate_actions(commands, use_ctypes=True)
    assert list(found.values()) == [[command] for command in commands[:halting]]


def test_try_chunks_takes_chunks_in_order_until_one_halts():
    chunks = deque(enumerate([[b"a"], [b"b"], [b"c"], [b"d"]]))
    results: dict = {}
    _try_chunks(lambda commands: ChunkResult([], halted=commands == [b"c"]), chunks=chunks, results=results)
    assert list(results) == [0, 1, 2]
    assert not chunks


def test_frotz_resets_a_halted_second_emulator(open_env):
    env = open_env()
    expected = env.get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False)
    halted = env._second.env
    ctypes.c_int.in_dll(halted.frotz_lib, "emulator_halted").value = 1  # as after an error in the emulator
    assert halted.step("look")[0].startswith("Emulator halted")
    env._single_thread_searches = 0
    assert env.get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False) == expected
    assert not halted._emulator_halted()


def test_frotz_raises_errors_of_the_second_thread(open_env):
    env = open_env(second_opened=True)
    failed = threading.Event()

    def fail(commands, state):
        failed.set()
        raise MemoryError("no more")

    def wait(commands):
        assert failed.wait(20)
        return ChunkResult([], halted=False)

    env._second._try, env._try_in_c = fail, wait
    with pytest.raises(MemoryError, match="no more"):
        env._filter_candidate_actions(["wait"] * 10 * NUM_CHUNKS, use_ctypes=True)


def test_frotz_uses_one_thread_for_longer_while_cores_are_busy(open_env):
    env = open_env()
    backoffs = []
    for cores in [1.0] * 8 + [1.9, 1.0]:
        env._update_backoff(cores)
        backoffs.append(env._single_thread_searches)
        env._single_thread_searches = 0
    assert backoffs == [1, 2, 4, 8, 16, 32, 32, 32, 0, 1]
    assert max(backoffs) == MAX_SINGLE_THREAD_SEARCHES
    env._single_thread_searches = 2
    for left in (1, 0):
        assert env._filter_candidate_actions(["north"], use_ctypes=True)
        assert env._single_thread_searches == left
        assert env._second is None
    assert env._filter_candidate_actions(["north"], use_ctypes=True)
    assert env._second is not None


def test_frotz_number_of_threads_follows_the_available_cores(open_env, monkeypatch):
    for cores, threads in (({0}, 1), ({0, 1}, 2), ({4, 5, 6, 7}, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: cores)
        assert open_env(filter_threads=None)._filter_threads == threads
    with pytest.raises(ValueError, match="filter_threads=3"):
        open_env(filter_threads=3)


def test_frotz_tries_no_commands_after_the_end(open_env):
    env = open_env("detective.z5")
    for command in env.get_walkthrough():
        env.step(command)
    assert env.victory()
    assert env._filter_candidate_actions(["north"], use_ctypes=True) == {}
