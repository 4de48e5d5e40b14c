import ctypes
import os
import threading
import time
from collections import deque

import numpy as np
import pytest

from priorzero.envs.frotz import MAX_SEARCHES_ALONE, PORTIONS, ReproducibleFrotzEnv, _work, state_digest
from tests.helpers.game_files import story


@pytest.fixture
def open_env():
    opened = []

    def make(name: str = "zork1.z5", **changes) -> ReproducibleFrotzEnv:
        opened.append(ReproducibleFrotzEnv(story(name), **{"seed": 0, "filter_threads": 2, **changes}))
        opened[-1].reset()
        return opened[-1]

    yield make
    for env in opened:
        env.free()


def walkthrough_states(env: ReproducibleFrotzEnv, count: int) -> list:
    """States from all over Jericho's own solution."""
    commands = env.get_walkthrough()
    states = []
    for number, command in enumerate(commands):
        if number % (len(commands) // count) == 0 and len(states) < count:
            states.append(env.get_state())
        env.step(command)
    return states


def candidates(env: ReproducibleFrotzEnv, *, objects: int) -> list[str]:
    """Commands with some of the things in sight (fewer than Jericho takes, to save time)."""
    names = env._score_object_names(env._identify_interactive_objects(use_object_tree=True))
    return env.act_gen.generate_actions(names[:objects])


def groups(by_change: dict) -> list[tuple[bytes, list[str]]]:
    """Changes as bytes (Jericho has tuples of numbers), everything in order."""
    return [
        (change if isinstance(change, bytes) else np.array(change, dtype=np.uint16).tobytes(), commands)
        for change, commands in by_change.items()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zork1.z5", "detective.z5"])
def test_two_threads_find_what_jericho_finds(open_env, name):
    env, one = open_env(name), open_env(name, filter_threads=1)
    states = walkthrough_states(env, 6)
    found = 0
    for state in states:
        for each in (env, one):
            each.set_state(state)
        commands = candidates(env, objects=4)
        env._searches_alone = 0
        here = groups(env._filter_candidate_actions(commands, use_ctypes=True))
        assert here == groups(one._filter_candidate_actions(commands, use_ctypes=True))
        assert state_digest(env.get_state()) == state_digest(state)  # the game goes on from where it was
        found += len(here)
    assert env._twin is not None
    assert one._twin is None
    assert found > 2 * len(states)


def test_both_ways_to_try_commands_agree(open_env):
    env = open_env()
    for state in walkthrough_states(env, 6):
        env.set_state(state)
        commands = [command.encode() for command in candidates(env, objects=4)]
        env._filter_candidate_actions(["wait"], use_ctypes=True)  # opens the twin
        env._twin.env.set_state(state)
        in_c = env._try_in_c(commands)
        assert env._twin._try(commands, state) == in_c
        assert len(in_c[0]) > 5
        assert state_digest(env._twin.env.get_state()[:-1]) == state_digest(state[:-1])  # but for the last text


def test_what_takes_something_first_is_left_out(open_env):
    env = open_env()
    env.step("open mailbox")
    state = env.get_state()
    assert "(Taken)" in env.step("read leaflet")[0]
    env.set_state(state)
    commands = [b"read leaflet", b"take leaflet", b"read mailbox"]
    env._filter_candidate_actions(["wait"], use_ctypes=True)
    env._twin.env.set_state(state)
    in_c = env._try_in_c(commands)
    assert env._twin._try(commands, state) == in_c
    assert [command for command, _ in in_c[0]] == [b"take leaflet"]


def test_both_threads_work(open_env):
    env = open_env()
    env._filter_candidate_actions(["wait"], use_ctypes=True)
    threads = set()
    both = threading.Barrier(2, timeout=20)

    def watched(original):
        def attempt(*arguments):
            if threading.get_ident() not in threads:
                threads.add(threading.get_ident())
                both.wait()  # only passed if the other one gets a portion as well
            return original(*arguments)

        return attempt

    env._try_in_c, env._twin._try = watched(env._try_in_c), watched(env._twin._try)
    env._searches_alone = 0
    assert env.get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False)
    assert len(threads) == 2


@pytest.mark.parametrize("halting", [0, 3, 7, 9])
def test_commands_after_one_that_halts_do_not_count(open_env, halting):
    commands = [f"say {number}" for number in range(10)]
    env = open_env()

    def attempt(portion, state=None):
        done = []
        for command in portion:
            if command == f"say {halting}".encode():
                time.sleep(0.2)  # meanwhile the other thread tries all that follow
                return done, True
            done.append((command, command))
        return done, False

    env._filter_candidate_actions(["wait"], use_ctypes=True)
    env._try_in_c = env._twin._try = attempt
    env._searches_alone = 0
    found = env._filter_candidate_actions(commands, use_ctypes=True)
    assert list(found.values()) == [[command] for command in commands[:halting]]


def test_portions_are_taken_in_order_until_one_halts():
    portions = deque(enumerate([[b"a"], [b"b"], [b"c"], [b"d"]]))
    tried: dict = {}
    _work(portions, tried, lambda commands: ([], commands == [b"c"]))
    assert list(tried) == [0, 1, 2]
    assert not portions


def test_a_halted_twin_starts_again(open_env):
    env = open_env()
    expected = env.get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False)
    halted = env._twin.env
    ctypes.c_int.in_dll(halted.frotz_lib, "emulator_halted").value = 1  # as after an error inside the emulator
    assert halted.step("look")[0].startswith("Emulator halted")
    env._searches_alone = 0
    assert env.get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False) == expected
    assert not halted._emulator_halted()


def test_an_error_in_the_second_thread_is_raised(open_env):
    env = open_env()
    env._filter_candidate_actions(["wait"], use_ctypes=True)

    failed = threading.Event()

    def fail(commands, state):
        failed.set()
        raise MemoryError("no more")

    def wait(commands):
        assert failed.wait(20)
        return [], False

    env._twin._try, env._try_in_c = fail, wait
    env._searches_alone = 0
    with pytest.raises(MemoryError, match="no more"):
        env._filter_candidate_actions(["wait"] * 10 * PORTIONS, use_ctypes=True)


def test_busy_cores_are_left_alone_for_longer_and_longer(open_env):
    env = open_env()
    paused = []
    for cores in [1.0] * 8 + [1.9, 1.0]:
        env._note_cores(cores)
        paused.append(env._searches_alone)
        env._searches_alone = 0
    assert paused == [1, 2, 4, 8, 16, 32, 32, 32, 0, 1]
    assert max(paused) == MAX_SEARCHES_ALONE
    env._searches_alone = 2
    for left in (1, 0):
        assert env._filter_candidate_actions(["north"], use_ctypes=True)
        assert env._searches_alone == left
        assert env._twin is None  # one thread did it
    assert env._filter_candidate_actions(["north"], use_ctypes=True)
    assert env._twin is not None


def test_number_of_threads(open_env, monkeypatch):
    for cores, threads in (({0}, 1), ({0, 1}, 2), ({4, 5, 6, 7}, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: cores)
        assert open_env(filter_threads=None)._filter_threads == threads
    with pytest.raises(ValueError, match="filter_threads=3"):
        open_env(filter_threads=3)


def test_nothing_is_tried_after_the_end(open_env):
    env = open_env("detective.z5")
    for command in env.get_walkthrough():
        env.step(command)
    assert env.victory()
    assert env._filter_candidate_actions(["north"], use_ctypes=True) == {}
