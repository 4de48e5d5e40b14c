"""Steps of an episode and size of the action vocabulary by game: the rule, and what a run makes of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import priorzero.envs.limits
from priorzero.config import parse_assignments, read_config_file, resolve_settings
from priorzero.envs import GameSpec, make_game, make_workers, resolve_game
from priorzero.envs.games import supported_games
from priorzero.envs.limits import (
    JERICHO_ACTIONS,
    MIN_ACTIONS,
    check_step_names,
    default_action_space_size,
    default_steps,
    episode_steps,
    resolve_limits,
    walkthrough_length,
)
from priorzero.runs.resume import newest_checkpoint
from priorzero.settings import EnvSettings
from priorzero.types import GameState, UserError
from tests.helpers.models import make_settings
from tests.helpers.runs import NO_LLM, short_settings, train
from tests.helpers.toy_game import toy_games


def jericho(story: str) -> GameSpec:
    """A game that Jericho supports. Its story file is not needed here."""
    return GameSpec(story, "jericho", Path(story), supported_games()[story], story.partition(".")[0])


def textworld(folder: Path, *, commands: int | None) -> GameSpec:
    """A generated game whose solution has this many commands; None: no solution is known."""
    metadata = {} if commands is None else {"walkthrough": ["wait"] * commands}
    (folder / "game.json").write_text(json.dumps({"metadata": metadata}))
    return GameSpec("textworld:simple", "textworld", folder / "game.z8", "0", "textworld-simple-seed0")


@pytest.mark.parametrize(
    ("commands", "steps"),
    [
        (1, 100),
        (80, 100),  # 80 * 1.25 = 100
        (81, 150),  # 101.25
        (120, 150),  # 150
        (121, 200),  # 151.25
        (396, 500),  # zork1: 495
        (336, 450),  # cutthroat: 420
        (1264, 500),  # spirit
    ],
)
def test_default_steps_are_a_quarter_more_than_the_walkthrough_in_fifties(commands, steps):
    assert default_steps(commands) == steps


def test_episode_steps_of_a_jericho_game_follow_its_walkthrough():
    lengths = {"zork1.z5": 396, "detective.z5": 51, "cutthroat.z3": 336, "sherbet.z5": None}
    assert {story: walkthrough_length(jericho(story)) for story in lengths} == lengths
    assert [episode_steps(EnvSettings(), jericho(story)) for story in lengths] == [500, 100, 450, 250]
    unsupported = dataclasses.replace(jericho("zork1.z5"), md5="0")
    assert walkthrough_length(unsupported) is None and episode_steps(EnvSettings(), unsupported) == 250


def test_unknown_steps_are_the_median_of_the_games_with_a_walkthrough():
    known = [n for n in (walkthrough_length(jericho(story)) for story in supported_games()) if n is not None]
    steps = sorted(map(default_steps, known))
    assert len(steps) == 56 and steps[27] == priorzero.envs.limits.UNKNOWN_STEPS == 250


@pytest.mark.parametrize(("commands", "steps"), [(None, 100), (8, 100), (300, 400)])
def test_episode_steps_of_a_generated_game_are_100_unless_its_solution_needs_more(tmp_path, commands, steps):
    assert episode_steps(EnvSettings(), textworld(tmp_path, commands=commands)) == steps


def test_resolve_limits_gives_each_game_its_own_steps(tmp_path):
    games = [jericho("zork1.z5"), textworld(tmp_path, commands=8)]
    env = EnvSettings()
    resolve_limits(env, games)
    assert env.max_episode_steps == "zork1=500, textworld-simple-seed0=100"
    assert (env.longest_episode, env.num_actions) == (500, JERICHO_ACTIONS)
    env = EnvSettings()
    resolve_limits(env, games[1:])
    assert (env.longest_episode, env.num_actions) == (100, MIN_ACTIONS)


@pytest.mark.parametrize(("num_jericho", "actions"), [(0, 256), (1, 2048), (2, 4096), (3, 4096)])
def test_default_action_space_size_grows_with_the_number_of_jericho_games(tmp_path, num_jericho, actions):
    assert default_action_space_size(num_jericho) == actions
    env, games = EnvSettings(), [jericho(story) for story in sorted(supported_games())[:num_jericho]]
    resolve_limits(env, [*games, textworld(tmp_path, commands=8)])
    assert env.num_actions == actions


@pytest.mark.parametrize(
    ("assigned", "resolved", "steps"),
    [
        ("120", 120, [120, 120, 120]),
        ("1e3", 1000, [1000, 1000, 1000]),
        ("auto", "zork1=500, detective=100", [500, 100, 450]),
        ("detective=60", "detective=60, zork1=500", [500, 60, 450]),
        ("detective.z5=60", "detective=60, zork1=500", [500, 60, 450]),
        ("cutthroat=70,zork1=400", "cutthroat=70, zork1=400, detective=100", [400, 100, 70]),
    ],
)
def test_resolve_limits_keeps_what_was_given(assigned, resolved, steps):
    env = resolve_settings(parse_assignments([f"env.max_episode_steps={assigned}", "env.action_space_size=300"])).env
    games, unseen = [jericho("zork1.z5"), jericho("detective.z5")], jericho("cutthroat.z3")
    resolve_limits(env, games, unseen=[unseen])
    assert (env.max_episode_steps, env.action_space_size) == (resolved, 300)
    assert [episode_steps(env, game) for game in (*games, unseen)] == steps
    again = env.model_copy()
    resolve_limits(again, games, unseen=[unseen])
    assert again == env


def test_check_step_names_refuses_games_that_the_run_does_not_have():
    games = [jericho("zork1.z5"), jericho("detective.z5")]
    for allowed in (7, "auto", "zork1=400", "zork1=400,detective=90"):
        check_step_names(EnvSettings(max_episode_steps=allowed), games)
    with pytest.raises(UserError, match="names zrok1, but the games of this run are zork1, detective"):
        check_step_names(EnvSettings(max_episode_steps="zrok1=400"), games)


def test_limits_that_depend_on_the_games_are_needed_as_numbers():
    with pytest.raises(ValueError, match=r"call priorzero\.envs\.limits\.resolve_limits first"):
        EnvSettings().num_actions  # noqa: B018


def test_make_workers_truncates_the_episodes_of_each_game_at_its_own_limit(monkeypatch):
    made = []
    monkeypatch.setattr("priorzero.envs.worker.make_worker", lambda spec, **kw: made.append((spec.name, kw)))
    settings = make_settings({"env": {"max_episode_steps": "auto"}})
    make_workers(settings, [jericho("zork1.z5"), jericho("detective.z5")], count=4, first_seed=0)
    assert [(name, arguments["max_episode_steps"]) for name, arguments in made] == [
        ("zork1", 500), ("detective", 100), ("zork1", 500), ("detective", 100),
    ]  # fmt: skip


AUTO = {"env": {"max_episode_steps": "auto", "action_space_size": "auto", "collector_env_num": 2}}


def test_run_saves_its_limits_and_a_resumed_run_keeps_them(tmp_path, monkeypatch, capfd):
    def run(*layers, checkpoint=None):
        with toy_games():
            return train(short_settings(tmp_path, NO_LLM, AUTO, *layers), checkpoint=checkpoint)

    folder = run({"run": {"env_id": "a,b", "max_iter": 1}}).folder
    saved = read_config_file(folder / "config.yaml")["env"]
    assert (saved["max_episode_steps"], saved["action_space_size"]) == ("a=100, b=100", MIN_ACTIONS)
    assert f"env.max_episode_steps: a=100, b=100; env.action_space_size: {MIN_ACTIONS}" in capfd.readouterr().err
    monkeypatch.setattr(priorzero.envs.limits, "MIN_STEPS", 150)  # as if a later version had another rule
    monkeypatch.setattr(priorzero.envs.limits, "MIN_ACTIONS", 300)
    run({"run": {"env_id": "a,b", "max_iter": 2}}, checkpoint=newest_checkpoint(folder))
    assert read_config_file(folder / "config.yaml")["env"] == saved
    assert newest_checkpoint(folder).folder.name == "iteration_2"


def test_states_say_after_how_many_commands_they_are_truncated():
    try:
        spec = resolve_game("detective.z5")
    except UserError as error:
        pytest.skip(str(error))
    game = make_game(spec, seed=0, max_episode_steps=7, look_and_inventory=False, drop_inert_commands=True)
    game._valid_actions = lambda state: ("wait",)
    assert game.reset().max_moves == 7
    game.close()


def test_states_that_an_earlier_version_saved_equal_those_of_the_game():
    state = GameState("A hall.", ("wait",), 0.0, 7.0, 3, max_moves=500)
    *earlier, limit = dataclasses.astuple(state)
    assert limit == 500 and GameState(*earlier) == state
