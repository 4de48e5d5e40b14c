"""Tests of the search for valid actions with Jericho's emulator and the compiled Z-machine."""

import ctypes
import logging
import os
import signal

import numpy as np
import pytest

from priorzero.envs import compiled_search, interpreter
from priorzero.envs.compiled_search import Trial
from priorzero.envs.frotz import MAX_CHUNK_COMMANDS, ChunkResult, EmulatorState, ReproducibleFrotzEnv
from tests.helpers.game_files import story

MODES = ["fast", "exact"]


@pytest.fixture
def open_env():
    opened = []

    def make(name: str = "zork1.z5", **changes) -> ReproducibleFrotzEnv:
        opened.append(ReproducibleFrotzEnv(story(name), **{"seed": 0, "mode": "fast", "num_threads": 1, **changes}))
        opened[-1].reset()
        return opened[-1]

    yield make
    for env in opened:
        env.close_emulators()


def digest(env: ReproducibleFrotzEnv) -> bytes:
    return EmulatorState(env.get_state(), b"").digest()


def search(env: ReproducibleFrotzEnv, commands: list[str]) -> list[tuple[bytes, list[str]]]:
    """The commands that change the world, grouped by change, as a list, so that the order matters."""
    return list(env._filter_candidate_actions(commands, use_ctypes=True).items())


def tried(env: ReproducibleFrotzEnv) -> list[bytes]:
    """A list to which the commands are added that Jericho's emulator tries."""
    commands: list[bytes] = []
    original = env._try

    def watched(chunk):
        commands.extend(chunk)
        return original(chunk)

    env._try = watched
    return commands


@pytest.mark.parametrize("mode", MODES)
def test_frotz_groups_commands_by_change_in_order(open_env, mode):
    env = open_env(mode=mode)
    found = search(env, ["east", "north", "open mailbox", "open small mailbox", "n", "look", "west", "jump"])
    assert [commands for _, commands in found] == [["north", "n"], ["open mailbox", "open small mailbox"], ["west"]]


@pytest.mark.parametrize("mode", MODES)
def test_frotz_excludes_commands_that_first_take_an_object(open_env, mode):
    env = open_env(mode=mode)
    env.step("open mailbox")
    state = env.get_state()
    assert "(Taken)" in env.step("read leaflet")[0]
    env.set_state(state)
    assert [commands for _, commands in search(env, ["read leaflet", "take leaflet", "read mailbox"])] == [
        ["take leaflet"]
    ]


@pytest.mark.parametrize("mode", MODES)
def test_frotz_state_is_unchanged_after_a_search(open_env, mode):
    env = open_env(mode=mode)
    before = digest(env)
    assert search(env, ["north", "save", "open mailbox", "restart", "quit"])
    assert digest(env) == before
    assert "you a leaflet" not in env.step("open mailbox")[0]
    assert "west" in env.find_actions(env.full_state())


@pytest.mark.parametrize("mode", MODES)
def test_frotz_tries_no_commands_after_the_end(open_env, mode):
    env = open_env("detective.z5", mode=mode)
    for command in env.get_walkthrough():
        env.step(command)
    assert env.victory()
    assert search(env, ["north"]) == []


@pytest.mark.parametrize("halting", [0, 3, 9])
def test_frotz_ignores_commands_after_one_that_halts_the_emulator(open_env, halting):
    commands = [f"say {number}" for number in range(10)]
    env = open_env(mode="exact")

    def attempt(chunk):
        effects = [(command, command) for command in chunk[:halting]]
        return ChunkResult(effects, halted=True)

    env._try_in_c = attempt
    assert [names for _, names in search(env, commands)] == [[command] for command in commands[:halting]]


def test_frotz_ignores_commands_after_an_unknown_one_that_halts_the_emulator(open_env):
    env = open_env()
    commands = ["north", "save", "south"]
    expected = search(env, ["north"])
    original = env._try
    env._try = lambda chunk: ChunkResult([], halted=True) if chunk == [b"save"] else original(chunk)
    assert search(env, commands) == expected
    assert expected[0][1] == ["north"]


def test_frotz_jerichos_emulator_tries_unknown_commands_and_confirms_the_chosen_ones(open_env):
    env = open_env()
    commands = tried(env)
    found = search(env, ["save", "open mailbox", "wait", "jump", "north", "n"])
    assert commands == [b"save", b"open mailbox", b"north"]
    assert [names for _, names in found] == [["open mailbox"], ["north", "n"]]


def test_frotz_effects_of_unknown_commands_are_sorted_in(open_env):
    env, exact = open_env(), open_env(mode="exact")
    commands = ["open mailbox", "north", "west", "look", "n", "jump"]
    env._compiled.try_commands = lambda *arguments, **options: Trial([(0, effect(exact, "open mailbox"))], [1, 4])
    assert search(env, commands) == search(exact, [name for name in commands if name != "west"])


def effect(env: ReproducibleFrotzEnv, command: str) -> bytes:
    ((_, change),) = env._try_in_c([command.encode()]).effects
    return change


def test_frotz_uses_jerichos_emulator_if_most_commands_are_unknown(open_env):
    env, exact = open_env(), open_env(mode="exact")
    commands = ["north", "save", "script", "save"]
    watched = tried(env)
    assert search(env, commands) == search(exact, commands)
    assert watched == [command.encode() for command in commands]
    assert env._compiled is not None


def test_frotz_disables_the_compiled_machine_after_a_disagreement(open_env, caplog):
    env, exact = open_env(), open_env(mode="exact")
    commands = ["north", "open mailbox", "west"]
    original = env._compiled.try_commands

    def change_one(*arguments, **options):
        trial = original(*arguments, **options)
        index, change = trial.changes[1]
        trial.changes[1] = index, b"\1" + change[1:]
        return trial

    env._compiled.try_commands = change_one
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert search(env, commands) == search(exact, commands)
    (message,) = caplog.messages
    assert message.startswith("zork1.z5: the compiled Z-machine and Jericho's emulator disagree about 'open mailbox'.")
    assert env._compiled is None


def test_frotz_searches_again_if_a_confirmed_command_halts_the_emulator(open_env):
    env, exact = open_env(), open_env(mode="exact")
    commands = ["north", "open mailbox", "west"]
    original = env._try

    def halt(chunk):
        if chunk != [b"open mailbox"]:
            return original(chunk)
        ctypes.c_int.in_dll(env.frotz_lib, "emulator_halted").value = 1  # as after an error in the emulator
        return ChunkResult([], halted=True)

    env._try = halt
    assert search(env, commands) == search(exact, commands)
    assert not env._emulator_halted()


def test_frotz_isolated_search_drops_a_chosen_command_that_crashes_the_emulator(open_env, caplog):
    env = open_env()
    expected = search(env, ["north", "open mailbox", "open small mailbox", "west"])
    assert expected[1][1] == ["open mailbox", "open small mailbox"]
    env.isolated = True
    parent, original = os.getpid(), env._try_in_c

    def crash(commands):
        if commands[0] in (b"open mailbox", b"west"):
            assert os.getpid() != parent
            os.kill(os.getpid(), signal.SIGKILL)
        return original(commands)

    env._try_in_c = crash
    found = search(env, ["north", "open mailbox", "open small mailbox", "west"])
    assert found == [expected[0], (expected[1][0], ["open small mailbox"])]
    assert caplog.messages == []
    assert env._compiled is not None


@pytest.mark.parametrize("mode", MODES)
def test_frotz_isolated_search_finds_equal_actions(open_env, mode):
    env = open_env(mode=mode)
    commands = ["north", "save", "open mailbox", "wait", "west"]
    expected = search(env, commands)
    env.isolated = True
    assert search(env, commands) == expected
    assert len(expected) == 3


def test_frotz_reports_the_progress_of_a_search(open_env):
    env = open_env(mode="exact")
    reports = []
    env.on_progress = lambda: reports.append(None)
    search(env, ["wait"] * (2 * MAX_CHUNK_COMMANDS + 1))
    assert len(reports) == 3


def test_frotz_fast_search_reports_progress_at_each_chunk_and_confirmation(open_env, monkeypatch):
    monkeypatch.setattr(compiled_search, "MAX_CHUNK_COMMANDS", 10)
    env = open_env()
    reports = []
    env.on_progress = lambda: reports.append(None)
    search(env, ["wait"] * 98 + ["north", "west"])
    assert len(reports) == 10 + 2


def test_frotz_uses_jerichos_emulator_for_other_versions_of_the_z_machine(open_env, monkeypatch):
    monkeypatch.setattr(compiled_search, "SUPPORTED_VERSIONS", (4, 5, 8))  # zork1.z5 has version 3
    env = open_env()
    assert env._compiled is None
    assert [names for _, names in search(env, ["north", "wait"])] == [["north"]]


def test_frotz_number_of_threads_follows_the_available_cores(open_env, monkeypatch):
    for cores, threads in ((1, 1), (2, 2), (4, 4), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        assert open_env(num_threads=None)._compiled._num_threads == threads
    assert open_env(num_threads=9)._compiled._num_threads == 9
    with pytest.raises(ValueError, match="num_threads=0 must be at least 1, or None"):
        open_env(num_threads=0)


def test_frotz_exact_search_does_not_compile(open_env, monkeypatch):
    monkeypatch.setattr(interpreter, "compile_functions", lambda: pytest.fail("compiled"))
    env = open_env(mode="exact")
    assert env._compiled is None
    changes = [np.frombuffer(change, np.uint16) for change, _ in search(env, ["open mailbox"])]
    assert [len(change) for change in changes] == [128]
