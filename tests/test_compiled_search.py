"""Tests that the compiled Z-machine agrees with Jericho's emulator, and of its threads."""

import random
import threading

import numpy as np
import pytest

from priorzero.envs import compiled_search, interpreter
from priorzero.envs.compiled_search import CompiledSearch, _lock
from priorzero.envs.frotz import ReproducibleFrotzEnv
from tests.helpers.game_files import story, supported_stories
from tests.helpers.plain_interpreter import execute

# One game or more of each version: 3, 5, 4, 8 and 3 again.
GAMES = ["zork1.z5", "detective.z5", "trinity.z4", "snacktime.z8", "lurking.z3"]
NUM_COMMANDS = 200


def open_env(name: str, *, num_threads: int = 1, mode: str = "fast") -> ReproducibleFrotzEnv:
    env = ReproducibleFrotzEnv(story(name), seed=0, mode=mode, num_threads=num_threads)
    env.reset()
    return env


def walkthrough_states(env: ReproducibleFrotzEnv, count: int) -> list:
    """``count`` states, evenly spread over Jericho's walkthrough, without those in which the game waits for a key."""
    commands = env.get_walkthrough()
    states = []
    for number, command in enumerate(commands[: len(commands) - 1]):
        if number % (len(commands) // count) == 0 and len(states) < count and not env.waits_for_key():
            states.append(env.full_state())
        env.step(command)
    return states


def sample_commands(env: ReproducibleFrotzEnv, state, *, count: int) -> list[bytes]:
    """Some of the commands that a search in ``state`` tries."""
    env.restore(state)
    names = env._score_object_names(env._identify_interactive_objects(use_object_tree=True))
    commands = env.act_gen.generate_actions(names)
    return [command.encode() for command in random.Random(0).sample(commands, min(count, len(commands)))]


def effects_in_emulator(env: ReproducibleFrotzEnv, commands: list[bytes], state):
    """The index and the change of each command that changes the world, and the indices of those that halt it."""
    env.restore(state)
    effects, halting = [], []
    for index, command in enumerate(commands):
        result = env._try_in_c([command])
        effects += [(index, change) for _, change in result.effects]
        if result.halted:
            env.restore(state)
            halting.append(index)
    return effects, halting


def try_commands(env: ReproducibleFrotzEnv, commands: list[bytes], state) -> compiled_search.Trial:
    return env._compiled.try_commands(commands, state.saved, on_progress=lambda: None)


def check_effects(env: ReproducibleFrotzEnv, state, *, count: int) -> int:
    """Compare the effects of commands; returns how many have one."""
    commands = sample_commands(env, state, count=count)
    trial = try_commands(env, commands, state)
    expected, halting = effects_in_emulator(env, commands, state)
    left_out = {*trial.unknown, *halting}  # the compiled machine executes some commands that halt Jericho's emulator
    changes, expected = ([each for each in effects if each[0] not in left_out] for effects in (trial.changes, expected))
    if env._path.name == "afflicted.z8":
        # Jericho keeps its score in a variable of its library, which restoring a state does not reset. After a command
        # that scores, it thus counts commands that change nothing.
        expected = [(index, change) for index, change in expected if any(change)]
        changes = [(index, change) for index, change in changes if any(change)]
    assert changes == expected
    assert len(trial.unknown) <= 0.05 * len(commands), [commands[index] for index in trial.unknown]
    return len(expected)


@pytest.mark.parametrize("name", GAMES)
def test_compiled_search_effects_are_those_in_jerichos_emulator(name):
    env = open_env(name)
    states = walkthrough_states(env, 4)
    assert len(states) >= 3
    assert sum(check_effects(env, state, count=NUM_COMMANDS) for state in states) > 5
    env.close_emulators()


@pytest.mark.slow
@pytest.mark.parametrize("name", supported_stories())
def test_compiled_search_effects_of_all_games(name):
    env = open_env(name)
    states = walkthrough_states(env, 2)
    if not states:
        pytest.skip("the game waits for a key")
    for state in states:
        check_effects(env, state, count=300)
    env.close_emulators()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zork1.z5", "detective.z5", "snacktime.z8"])
def test_compiled_search_finds_the_actions_of_an_exact_search(name):
    fast, exact = open_env(name, num_threads=2), open_env(name, mode="exact")
    for state in walkthrough_states(exact, 4):
        found = fast.find_actions(state)
        assert found == exact.find_actions(state)
        assert found
    assert fast._compiled is not None
    for env in (fast, exact):
        env.close_emulators()


COMMANDS = {
    "zork1.z5": ["open mailbox", "north", "Open MAILBOX, north", "jump", "xyzzy", "eat house", "again", "inventory"],
    "trinity.z4": ["look", "take all", "east", "examine me", "qwerty"],
    "detective.z5": ["west", "take paper", "read paper", "drop all", "inventory"],
    "snacktime.z8": ["look", "stand", "sleep", "north", "bark"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_compiled_search_memory_and_registers_are_those_of_jerichos_emulator(name):
    env = open_env(name)
    search, state = env._compiled, walkthrough_states(env, 3)[1]
    ram = state.saved[0]
    for command in COMMANDS[name]:
        plain = execute(search._story, search._memory, state.saved, command, alphabet=search._alphabet)
        memory = search._memory.copy()
        (status,) = search._run([command.encode()], state.saved, memory).status
        env.restore(state)
        env.step(command)
        ram, stack, counter, stack_pointer, frame_pointer, frame_count, _, numbers, _ = env.get_state()
        assert plain.known and status != interpreter.UNKNOWN
        for found in (plain.ram, memory[: len(ram)]):
            assert np.flatnonzero(found != ram).tolist() == []
        registers = (counter - 1, stack_pointer, frame_pointer, frame_count, *numbers)
        # Jericho gives 32 bits of the random numbers' state. Higher ones have no influence.
        assert [value % 2**32 for value in plain.registers] == [int(value) % 2**32 for value in registers]
        assert (plain.stack[stack_pointer:] == stack.view(np.uint16)[stack_pointer:]).all()
    env.close_emulators()


def test_compiled_search_leaves_unknown_commands_to_jerichos_emulator():
    env = open_env("zork1.z5")
    trial = try_commands(env, [b"north", b"save", b"look", b"script", b"caf\xc3\xa9"], env.full_state())
    assert trial.unknown == [1, 3, 4]
    assert [index for index, _ in trial.changes] == [0]
    env.close_emulators()


@pytest.mark.parametrize(("num_threads", "chunk"), [(1, 7), (2, 7), (2, 200), (3, 1), (3, 1000)])
def test_compiled_search_results_do_not_depend_on_threads_and_chunks(monkeypatch, num_threads, chunk):
    env = open_env("zork1.z5")
    state = env.full_state()
    commands = [*sample_commands(env, state, count=150), b"save", b"north", b"open mailbox"]
    expected = try_commands(env, commands, state)
    assert expected.unknown and len(expected.changes) > 1
    env._compiled._num_threads = num_threads
    monkeypatch.setattr(compiled_search, "MAX_CHUNK_COMMANDS", chunk)
    assert try_commands(env, commands, state) == expected
    env.close_emulators()


def test_compiled_search_uses_all_threads():
    env = open_env("zork1.z5", num_threads=3)
    search, threads = env._compiled, set()
    together, original = threading.Barrier(3, timeout=20), env._compiled._run

    def watched(*arguments):
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            together.wait()  # passes only if all threads get a chunk
        return original(*arguments)

    search._run = watched
    assert [index for index, _ in try_commands(env, [b"north"] * 100, env.full_state()).changes] == list(range(100))
    assert len(threads) == 3
    env.close_emulators()


def test_compiled_search_raises_errors_of_its_threads():
    env = open_env("zork1.z5", num_threads=2)
    main, failed, count, original = threading.get_ident(), threading.Event(), [], env._compiled._run

    def fail(*arguments):
        count.append(None)
        if threading.get_ident() != main:
            failed.set()
            raise MemoryError("no more")
        assert failed.wait(20)
        return original(*arguments)

    env._compiled._run = fail
    with pytest.raises(MemoryError, match="no more"):
        try_commands(env, [b"north"] * 100, env.full_state())
    env.close_emulators()


def test_compiled_search_stops_its_threads_after_an_error():
    env = open_env("zork1.z5", num_threads=2)
    main, count, failed, original = threading.get_ident(), [], threading.Event(), env._compiled._run

    def fail(*arguments):
        if threading.get_ident() == main:
            failed.set()
            raise MemoryError("no more")
        assert failed.wait(20)
        count.append(None)
        return original(*arguments)

    env._compiled._run = fail
    with pytest.raises(MemoryError, match="no more"):
        try_commands(env, [b"open mailbox"] * 4000, env.full_state())  # 20 chunks
    assert len(count) < 15
    env.close_emulators()


def test_compiled_search_ends_of_the_game_count_as_changes():
    env = open_env("detective.z5")
    commands = env.get_walkthrough()
    for command in commands[:-1]:
        env.step(command)
    state = env.full_state()
    last = [commands[-1].encode(), b"look"]
    trial = try_commands(env, last, state)
    env.restore(state)
    env.step(commands[-1])
    assert env.victory()
    assert trial.changes == effects_in_emulator(env, last, state)[0]
    assert [index for index, _ in trial.changes] == [0]
    env.close_emulators()


@pytest.mark.parametrize("version", range(1, 9))
def test_compiled_search_supports_versions(version):
    assert CompiledSearch.supports(bytes([version, 0])) == (version in (3, 4, 5, 8))


def test_compiled_search_ignored_attributes_of_objects_that_jericho_does_not_count():
    env = open_env("theatre.z5")
    assert env._compiled._lib.get_num_world_objs() < 280
    assert env._compiled._watch.ignored_cleared[280, 27]
    assert not env._compiled._watch.ignored_cleared[280, 26]
    env.close_emulators()


# The lock ------------------------------------------------------------------------------------------------------------


def test_compiled_search_warns_if_the_compiled_functions_cannot_be_kept(monkeypatch, caplog):
    monkeypatch.setattr(interpreter, "compile_functions", lambda: "no folder is writable")
    env = open_env("zork1.z5")
    assert "cannot be kept on disk (no folder is writable)" in caplog.text
    assert "open mailbox" in env.find_actions(env.full_state())


def test_lock_lets_others_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_search, "cache_dir", lambda: tmp_path / "folder")
    order = []

    def wait():
        with _lock():
            order.append("second")

    with _lock():
        other = threading.Thread(target=wait)
        other.start()
        other.join(0.3)
        assert other.is_alive()
        order.append("first")
    other.join(20)
    assert order == ["first", "second"]


def test_lock_is_not_needed_without_a_usable_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compiled_search, "cache_dir", lambda: tmp_path / "file" / "folder")
    entered = []
    with _lock(), _lock():
        entered.append(True)
    assert entered
