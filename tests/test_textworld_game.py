"""Tests of TextWorld games: texts, rewards, ends of episodes and cleaning of texts."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from priorzero.envs.games import make_game, resolve_game
from priorzero.envs.textworld_game import FALLBACK_ACTIONS, TextWorldGame, clean_text, is_inert
from priorzero.types import UserError
from tests.helpers.game_files import session_cache
from tests.helpers.playing import play_some

pytestmark = pytest.mark.slow  # games are generated


SIMPLE = "textworld:simple?seed=7"
COOKING = "textworld:cooking?recipe=1&take=1&cook=1&open=1&go=6&seed=3"
GATA_1 = "textworld:cooking?recipe=1&take=1&cut=1&open=1&split=train"
# Each game with its largest score; None: any.
MAX_SCORES = {
    SIMPLE: 7.0,
    COOKING: None,
    "textworld:coin-collector?level=5&seed=1": 1.0,
    "textworld:coin-collector?level=105": 1.0,
    "textworld:treasure-hunter?level=3&seed=1": 1.0,
    "textworld:treasure-hunter?level=21": 1.0,
    GATA_1: 4.0,  # as in table 1 of Adhikari et al. 2020
}
GAMES = list(MAX_SCORES)


@pytest.fixture(scope="module")
def games_folder(tmp_path_factory):
    """The session's cache folder with all games. They are generated in parallel to save time."""
    folder = session_cache(tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(max_workers=2) as executor:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        list(executor.map(resolve_game, GAMES))
    return folder


@pytest.fixture
def open_game(games_folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(games_folder))

    def make(env_id: str = SIMPLE, **changes):
        arguments = {
            "seed": 0,
            "max_episode_steps": 100,
            "look_and_inventory": True,
            "drop_inert_commands": False,
            "valid_actions": "exact",
        }
        return make_game(resolve_game(env_id), **{**arguments, **changes})

    return make


def walkthrough(env_id: str) -> list[str]:
    """The solution that the generator provides."""
    return json.loads(resolve_game(env_id).path.with_suffix(".json").read_text())["metadata"]["walkthrough"]


def test_textworld_game_first_state(open_game):
    state = open_game().reset()
    assert state.feedback.startswith("Who's got a virtual machine")  # the ASCII-art title is removed
    assert "$" not in state.feedback
    assert state.goal in state.feedback
    assert state.feedback.endswith("There is a closed wooden door leading east.")
    assert state.look.startswith("-= Bedroom =-\nYou arrive in a bedroom.")
    assert state.look in state.feedback  # so raw_obs_text does not repeat it
    assert state.inventory == "You are carrying nothing."
    assert state.raw_obs_text == f"{state.feedback}\n{state.inventory}"
    assert state.valid_actions == (
        "examine antique trunk",
        "examine chest drawer",
        "examine king-size bed",
        "examine wooden door",
        "inventory",
        "look",
        "open antique trunk",
        "open chest drawer",
    )
    assert (state.score, state.max_score, state.moves) == (0.0, 7.0, 0)
    assert not (state.done or state.won or state.truncated or state.actions_are_fallback)


def test_textworld_game_excludes_inert_commands(open_game):
    game = open_game(drop_inert_commands=True, look_and_inventory=False)
    state = game.reset()
    assert state.valid_actions == ("open antique trunk", "open chest drawer")
    assert (state.look, state.inventory) == ("", "")
    with pytest.raises(ValueError, match="'look' is not among"):
        game.step("look")
    assert game._filter(["look", "examine door"]) == ("examine door", "look")  # there are no other commands
    assert is_inert("examine key") and not is_inert("look for trouble")


@pytest.mark.parametrize(("env_id", "max_score"), list(MAX_SCORES.items()))
def test_textworld_game_is_won_by_the_solution(open_game, env_id, max_score):
    game = open_game(env_id)
    state, rewards = game.reset(), []
    for command in walkthrough(env_id):
        assert not state.done
        assert command in state.valid_actions
        state, reward = game.step(command)
        rewards.append(reward)
    assert state.done and state.won and not state.truncated and state.valid_actions == ()
    assert state.score == state.max_score == sum(rewards)
    assert state.max_score == max_score or (max_score is None and state.max_score > 1)
    assert state.moves == len(rewards)
    assert "RESTART" not in state.feedback and "*** The End ***" in state.feedback
    with pytest.raises(ValueError, match="reset"):
        game.step("look")


def test_textworld_game_rewards_each_command(open_game):
    game = open_game()
    game.reset()
    commands = walkthrough(SIMPLE)
    rewards = {command: game.step(command)[1] for command in commands}
    # With dense rewards, each part of the task earns a point. Opening the refrigerator is not part of it.
    assert rewards == {command: 0.0 if command == "open refrigerator" else 1.0 for command in commands}


def test_textworld_game_reset_repeats_the_game(open_game):
    def play(game):
        return play_some(game, steps=12)

    game = open_game()
    first = play(game)
    assert play(game) == first
    assert play(open_game(seed=5)) == first  # the game is not random
    plain = play(open_game(look_and_inventory=False))
    assert [state.feedback for state in plain] == [state.feedback for state in first]
    assert [state.valid_actions for state in plain] == [state.valid_actions for state in first]


def test_textworld_game_can_be_lost(open_game):
    game = open_game()
    state = game.reset()
    for command in [*walkthrough(SIMPLE)[:7], "eat apple"]:
        state, _ = game.step(command)
    assert state.done and not state.won and "You lost!" in state.feedback


def test_textworld_game_truncates_episodes_and_refuses_wrong_use(open_game):
    game = open_game(max_episode_steps=2)
    with pytest.raises(ValueError, match="reset"):
        game.step("look")
    assert game.reset().max_moves == 2
    with pytest.raises(ValueError, match="'dance' is not among"):
        game.step("dance")
    assert not game.step("look")[0].done
    state, _ = game.step("open chest drawer")
    assert state.done and state.truncated and state.valid_actions == ()
    assert state.inventory  # still observed, because the value of this state is estimated
    with pytest.raises(ValueError, match="reset"):
        game.step("look")
    game.close()
    for change in ({"seed": -1}, {"max_episode_steps": 0}):
        with pytest.raises(ValueError, match="must be at least 0"):
            open_game(**change)


def test_textworld_game_offers_fallback_actions(open_game):
    game = open_game()
    game._filter = lambda _: ()
    state = game.reset()
    assert state.actions_are_fallback
    assert state.valid_actions == FALLBACK_ACTIONS
    assert "Bedroom" in game.step("look")[0].feedback


def test_textworld_game_checks_valid_actions_and_ignores_it(open_game):
    assert open_game(valid_actions="fast").reset() == open_game(valid_actions="exact").reset()
    with pytest.raises(ValueError, match="valid_actions='quick' must be one of exact, fast"):
        open_game(valid_actions="quick")


def test_textworld_game_reports_missing_files(tmp_path):
    arguments = {"seed": 0, "max_episode_steps": 9, "look_and_inventory": True, "drop_inert_commands": True}
    with pytest.raises(UserError, match=r"g\.z8' is missing"):
        TextWorldGame(tmp_path / "g.z8", **arguments)
    (tmp_path / "g.z8").touch()
    with pytest.raises(UserError, match=r"g\.json' is missing"):
        TextWorldGame(tmp_path / "g.z8", **arguments)


def test_clean_text_removes_title_prompt_and_status_line():
    raw = (
        "\n\n   ___  ___ \n  |$$ \\/ $$|\n\nDo this.\n\n\n\n-= Attic =-\nDust. \n\n\n> look\nMore.\n\n>  -= Attic =-0/1"
    )
    assert clean_text(raw) == "Do this.\n\n-= Attic =-\nDust.\n\n> look\nMore."
    end = (
        "Done.\n\n   *** The End ***\n\nWould you like to RESTART, RESTORE a saved game, QUIT or UNDO?\n>   -= A =-1/2"
    )
    assert clean_text(end) == "Done.\n\n*** The End ***"
    assert clean_text("") == ""
