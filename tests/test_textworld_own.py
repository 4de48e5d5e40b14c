"""Games that a user made with TextWorld: textworld:file=PATH."""

import json
import shutil

import pytest

from priorzero.envs import textworld_own
from priorzero.envs.games import check_names, make_game, resolve_game, resolve_games
from priorzero.envs.limits import episode_steps
from priorzero.envs.textworld_own import own_name
from priorzero.settings import EnvSettings
from priorzero.types import UserError
from tests.helpers.game_files import session_cache
from tests.helpers.tiny_story import tiny_story

ARGUMENTS = {
    "seed": 0,
    "max_episode_steps": 100,
    "look_and_inventory": True,
    "drop_inert_commands": False,
    "valid_actions": "exact",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files of a game, g.z8 and g.json; the story is not TextWorld's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.z8").write_bytes(tiny_story(8))
    (tmp_path / "g.json").write_text(json.dumps({"world": [], "quests": [], "infos": [], "KB": {}}))
    return tmp_path


def error_of(env_id: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_game(env_id)
    return str(caught.value)


@pytest.mark.parametrize("path", ["g.z8", "./g.z8", "$HERE/g.z8"])
def test_resolve_game_finds_a_file_of_the_user(folder, monkeypatch, path):
    monkeypatch.setenv("HERE", str(folder))
    spec = resolve_game(f"textworld:file={path}")
    assert (spec.kind, spec.name, spec.path) == ("textworld", "textworld-g", folder / "g.z8")
    assert episode_steps(EnvSettings(), spec) == 100  # its data has no solution


def test_resolve_game_accepts_a_file_whose_name_contains_special_characters(folder):
    for suffix in (".z8", ".json"):
        shutil.copy(folder / f"g{suffix}", folder / f"a, b? c=1&d{suffix}")
    env_id = "textworld:file=./a, b? c=1&d.z8"
    (spec,) = resolve_games(env_id)
    assert (spec.path.name, spec.name) == ("a, b? c=1&d.z8", "textworld-a_b_c_1_d")
    assert list(check_names(env_id).values()) == [env_id]
    assert own_name("textworld:file=/x/?.z8") == "textworld-game"


def test_resolve_games_refuses_two_files_with_the_same_content(folder):
    for suffix in (".z8", ".json"):
        shutil.copy(folder / f"g{suffix}", folder / f"h{suffix}")
    with pytest.raises(UserError, match="occurs twice"):
        resolve_games("textworld:file=g.z8,textworld:file=h.z8")


def test_resolve_game_reports_missing_and_wrong_files(folder):
    assert "The TextWorld game 'h.z8' does not exist" in error_of("textworld:file=h.z8")
    assert error_of("textworld:file=").endswith("names no file; type textworld:file=PATH")
    assert str(folder / "h.z8") in error_of("textworld:file=h.z8")
    assert "is named neither .z8 nor .ulx" in error_of("textworld:file=g.json")
    (folder / "d.z8").mkdir()
    assert "'d.z8' is not a file" in error_of("textworld:file=d.z8")
    (folder / "g.z8").write_bytes(b"no story")
    assert "'g.z8' is not a Z-machine story" in error_of("textworld:file=g.z8")
    assert "tw-make custom --output" in error_of("textworld:file=g.z8")


@pytest.mark.parametrize("suffix", [".z8", ".ulx"])
def test_resolve_game_reports_missing_and_wrong_data(folder, suffix):
    story, data = folder / f"h{suffix}", folder / "h.json"
    story.write_bytes(tiny_story(8))
    message = error_of(f"textworld:file={story.name}")
    assert f"The data of the TextWorld game '{story.name}', 'h.json', does not exist ({data})" in message
    assert "TextWorld writes it beside the story file" in message
    data.write_text("{")
    assert "'h.json' is not JSON" in error_of(f"textworld:file={story.name}")
    data.write_text("[1]")
    assert "it has no 'world' and no 'quests' and no 'infos' and no 'KB'" in error_of(f"textworld:file={story.name}")
    data.write_text('{"world": [], "quests": [], "KB": {}}')
    assert "it has no 'infos'. It must be the file that TextWorld wrote" in error_of(f"textworld:file={story.name}")


def test_resolve_game_compiles_a_glulx_story_once(folder, monkeypatch):
    shutil.copy(folder / "g.json", folder / "h.json")
    (folder / "h.ulx").write_bytes(b"Glul")
    compiled = []

    def compile_game(data, output):
        compiled.append(data.name)
        output.parent.mkdir()
        output.write_bytes(tiny_story(8))
        shutil.copy(data, output.with_suffix(".json"))

    monkeypatch.setattr(textworld_own, "run_compiler", compile_game)
    spec = resolve_game("textworld:file=h.ulx")
    assert spec.path.name == "h.z8" and spec.path.is_relative_to(folder / "cache") and spec.name == "textworld-h"
    assert resolve_game("textworld:file=h.ulx") == spec and compiled == ["h.json"]
    (folder / "h.json").write_text(json.dumps({"world": [1], "quests": [], "infos": [], "KB": {}}))
    assert resolve_game("textworld:file=h.ulx").path != spec.path  # another game


@pytest.fixture
def generated(tmp_path, tmp_path_factory, monkeypatch):
    """A folder with the files of two generated games: coin.z8 and simple.z8."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(session_cache(tmp_path_factory)))
    for name, env_id in {
        "coin": "textworld:coin-collector?level=5&seed=1",
        "simple": "textworld:simple?seed=7",
    }.items():
        story = resolve_game(env_id).path
        for suffix in (".z8", ".json"):
            shutil.copy(story.with_suffix(suffix), tmp_path / f"{name}{suffix}")
    return tmp_path


@pytest.mark.slow
def test_own_game_is_won_by_its_solution(generated):
    (generated / "glulx.ulx").write_bytes(b"Glul")
    shutil.copy(generated / "coin.json", generated / "glulx.json")
    specs = resolve_games(f"textworld:file={generated}/coin.z8")
    compiled = resolve_game(f"textworld:file={generated}/glulx.ulx")
    assert compiled.md5 == specs[0].md5  # the data describes the whole game
    for spec in (*specs, compiled):
        game = make_game(spec, **ARGUMENTS)
        state = game.reset()
        for command in json.loads((generated / "coin.json").read_text())["metadata"]["walkthrough"]:
            state, _ = game.step(command)
        assert state.won


@pytest.mark.slow
def test_own_game_with_the_data_of_another_game_is_refused(generated):
    shutil.copy(generated / "coin.json", generated / "simple.json")
    game = make_game(resolve_game(f"textworld:file={generated}/simple.z8"), **ARGUMENTS)
    with pytest.raises(
        UserError, match=r"simple\.json' do not belong together: the story does not state the objective"
    ):
        game.reset()


@pytest.mark.slow
def test_own_game_that_cannot_be_compiled_says_what_textworld_says(folder):
    (folder / "g.ulx").write_bytes(b"Glul")
    message = error_of("textworld:file=g.ulx")
    assert "TextWorld failed to generate" in message and "g.json (exit code 1)" in message
    assert "Generate the game again with tw-make" in message and "Error" in message
