"""Games neither read nor write files, whatever is commanded or tried."""

from __future__ import annotations

import os
from pathlib import Path

import jericho
import pytest

from priorzero.envs import GameWorker
from priorzero.envs.frotz_files import FilelessFrotzEnv, Setup
from tests.helpers.file_commands import FILE_COMMANDS, open_unchecked_game
from tests.helpers.folders import contents
from tests.helpers.game_files import story

# Their commands use files: saved games, in detective.z5 also transcripts and recordings, in plundered.z3 "#record".
STORIES = ["seastalker.z3", "detective.z5", "plundered.z3", "trinity.z4"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, in which the user has files with the names that Jericho uses."""
    for name in STORIES:
        stem = Path(name).stem
        for file in (f"{stem}.qzl", f"{stem}.scr", f"{stem}.rec"):
            (tmp_path / file).write_bytes(b"a file of the user")
    (tmp_path / "script").write_bytes(b"a file of the user")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", STORIES)
def test_jericho_game_leaves_the_working_folder_unchanged(folder, name):
    before = contents(folder)
    game = open_unchecked_game(story(name))
    game.reset()
    for command in FILE_COMMANDS:
        game.step(command)
    game._env.find_actions(game._env.full_state())  # in this process
    game.close()
    assert contents(folder) == before
    assert Path.cwd() == folder


async def test_jericho_game_in_a_worker_leaves_the_working_folder_unchanged(folder):
    before = contents(folder)
    worker = GameWorker(open_unchecked_game, {"path": story("seastalker.z3")}, timeout_s=60)
    try:
        await worker.reset()
        texts = [(await worker.step(command))[0].feedback for command in ("save", "restore", "script")]
    finally:
        await worker.close()
    assert texts[0].startswith("Okay.") and not texts[1].startswith("Okay.")
    assert contents(folder) == before


def test_jericho_uses_files_of_the_working_folder(folder):
    """The reason for ``FilelessFrotzEnv``. If Jericho changes this, the class can be removed."""
    before = contents(folder)
    env = jericho.FrotzEnv(str(story("seastalker.z3")), seed=0)
    env.reset()
    env.step("pause")
    assert contents(folder)["seastalker.qzl"] != before["seastalker.qzl"]


def test_jericho_game_cannot_restore_what_an_episode_has_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = open_unchecked_game(story("zork1.z5"), look_and_inventory=False)
    first.reset()
    assert first.step("save")[0].feedback == "Ok."  # as in Jericho
    second = open_unchecked_game(story("zork1.z5"), look_and_inventory=False)
    second.reset()
    for game in (first, second):
        for _ in range(2):
            assert "North of House" in game.step("north")[0].feedback
            assert game.step("restore")[0].feedback == "Failed."
            game.reset()
        game.close()


def test_jericho_game_finds_the_same_actions_with_and_without_a_saved_game(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for expected_files in ([], ["zork1.qzl"]):
        assert os.listdir() == expected_files
        game = open_unchecked_game(story("zork1.z5"), look_and_inventory=False)
        game._env.act_gen.generate_actions = lambda objects: ["save", "restore", "north", "south"]
        game.reset()
        found.append(game.step("north")[0].valid_actions)
        game.close()
        env = jericho.FrotzEnv(str(story("zork1.z5")), seed=0)
        env.reset()
        env.step("save")  # Jericho writes a file, which would make "restore" a valid action
    assert found[0] == found[1] and "restore" not in found[0]
    assert len(found[0]) >= 1


def test_fileless_frotz_env_refuses_an_emulator_with_other_settings(monkeypatch):
    load = jericho.FrotzEnv.load

    def load_other(env, *arguments):
        load(env, *arguments)
        Setup.in_dll(env.frotz_lib, "f_setup").save_name = None

    monkeypatch.setattr(jericho.FrotzEnv, "load", load_other)
    with pytest.raises(RuntimeError, match="has other settings than Jericho"):
        FilelessFrotzEnv(str(story("zork1.z5")), seed=0)


@pytest.mark.parametrize("length", [20, 71, 80, 150])
def test_jericho_game_survives_a_long_command_that_opens_a_file(tmp_path, monkeypatch, length):
    """Jericho takes the command as the name of the file, and copies it into a buffer of 13 bytes."""
    monkeypatch.chdir(tmp_path)
    env = FilelessFrotzEnv(str(story("detective.z5")), seed=0)
    env.reset()
    text = env.step(("script" + ". look" * 40)[:length])[0]
    assert "Attempt to begin transcript failed." in text
    assert "Chief's office" in env.step("look")[0]
    env.reset()
    assert not os.listdir()
