"""Tests of trying commands in a child process that may crash."""

import ctypes
import os
import signal

import jericho
import psutil
import pytest

from priorzero.envs.frotz import ReproducibleFrotzEnv
from priorzero.envs.probe import Probe
from priorzero.envs.progress import set_progress_listener
from tests.helpers.game_files import story


@pytest.fixture
def env():
    opened = ReproducibleFrotzEnv(story("detective.z5"), seed=0, num_threads=1)
    opened.reset()
    yield opened
    opened.close_emulators()


@pytest.fixture
def probe(env):
    opened = Probe(env, name="detective.z5")
    yield opened
    opened.close()


def test_probe_observes_without_changing_the_game(env, probe):
    before = env.full_state()
    look, west = probe.observe(before, ["look", "west"])
    assert look.startswith("<< Chief's office >>")
    assert west.startswith("<< Closet >>")
    assert env.full_state().digest() == before.digest()
    assert env.step("west")[0].strip() == west


def test_probe_finds_the_actions_that_the_environment_finds(env, probe):
    reports = []
    set_progress_listener(reports.append)
    try:
        found = probe.find_actions(env.full_state())
    finally:
        set_progress_listener(None)
    assert found == env.find_actions(env.full_state())
    assert "west" in found
    assert set(reports) == {"the search for valid actions"}


def test_probe_isolated_commands_give_equal_actions(env):
    state = env.full_state()
    env.act_gen.generate_actions = lambda objects: ["west", "wait", "take paper", "read paper", "yell"]
    expected = env.find_actions(state)
    assert expected == ("take paper", "west")
    env.isolated = True
    assert env.find_actions(state) == expected


def test_probe_starts_a_new_process_after_a_crash(env, probe, caplog):
    parent, take_state = os.getpid(), env.full_state
    original = env._try_in_c

    def crash(commands):
        if b"yell" in commands and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGSEGV)
        return original(commands)

    env._try_in_c = crash
    env.act_gen.generate_actions = lambda objects: ["west", "wait", "take paper", "read paper", "yell"]
    for _ in range(2):
        assert probe.find_actions(take_state()) == ("take paper", "west")
    (message,) = caplog.messages  # once
    assert "detective.z5: a command that was only tried crashed Jericho's emulator (exit code -11)" in message


def test_probe_leaves_out_a_command_that_hangs(env, probe, caplog, monkeypatch):
    monkeypatch.setattr("priorzero.envs.probe.HANG_S", 3.0)
    monkeypatch.setattr("priorzero.envs.frotz.ISOLATED_TIMEOUT_S", 1.0)
    step = jericho.FrotzEnv.step

    def hang(self, action):
        if action == "yell":
            ctypes.CDLL(None).sleep(1000)
        return step(self, action)

    monkeypatch.setattr(jericho.FrotzEnv, "step", hang)
    yell, look = probe.observe(env.full_state(), ["yell", "look"])
    assert yell == ""
    assert look.startswith("<< Chief's office >>")
    assert "(no reply for 3 s)" in caplog.messages[0]


def test_probe_survives_the_death_of_its_process_between_two_requests(env, probe):
    others = psutil.Process().children()
    (look,) = probe.observe(env.full_state(), ["look"])
    (child,) = [process for process in psutil.Process().children() if process not in others]
    child.kill()
    child.wait()
    assert probe.observe(env.full_state(), ["look"]) == (look,)


def test_probe_raises_errors_of_the_child_process(env, probe):
    def fail(state):
        raise KeyError("the lamp is gone")

    env.find_actions = fail
    with pytest.raises(RuntimeError, match=r"detective\.z5: find_actions failed: KeyError: 'the lamp is gone'"):
        probe.find_actions(env.full_state())
    assert probe.observe(env.full_state(), ["look"])[0]


def test_probe_close_ends_the_process(env, probe):
    others = psutil.Process().children()
    probe.observe(env.full_state(), ["look"])
    (child,) = [process for process in psutil.Process().children() if process not in others]
    probe.close()
    assert not child.is_running()
    probe.close()
    assert probe.observe(env.full_state(), ["look"])[0]
