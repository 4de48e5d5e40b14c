"""Tests of both Gymnasium adapters: games as environments, and environments as games."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv

import priorzero
from priorzero.envs import check_game, make_game, registry, resolve_game
from priorzero.envs.gymnasium_env import ENV_ID, TextGameEnv
from priorzero.types import UserError
from tests.helpers import registered

SWITCHES = "gymnasium:tests.helpers.text_env:tests/Switches-v0"
ARGUMENTS = {
    "seed": 5,
    "max_episode_steps": 9,
    "look_and_inventory": False,
    "drop_inert_commands": True,
    "valid_actions": "exact",
}


@pytest.fixture(autouse=True)
def counting(monkeypatch):
    """The game ``counting:N`` is registered."""
    monkeypatch.setattr(registry, "_registered", {})
    priorzero.register_game("counting", registered.make_counter)


def open_game(env_id: str, **changes):
    return make_game(resolve_game(env_id), **{**ARGUMENTS, **changes})


# games as environments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("actions", ["text", "index"])
def test_text_game_env_passes_gymnasiums_check(actions):
    env = gymnasium.make(f"priorzero.envs.gymnasium_env:{ENV_ID}", game="counting:9", actions=actions).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env, skip_render_check=True)
    env.close()


def test_text_game_env_plays_commands_and_lists_the_valid_actions():
    env = TextGameEnv("counting:2")
    observation, info = env.reset(seed=1)
    assert observation == "The number is 0." and observation in env.observation_space
    assert info["valid_actions"] == ["add one", "stop", "wait"]
    assert {key: info[key] for key in ("score", "max_score", "moves", "won", "invalid_action")} == {
        **{"score": 0.0, "max_score": 2.0, "moves": 0},
        **{"won": False, "invalid_action": False},
    }
    assert env.step("add one")[1:4] == (1.0, False, False)
    observation, reward, terminated, truncated, info = env.step("add one")
    assert (observation, reward, terminated, truncated) == ("The number is 2.", 1.0, True, False)
    assert info["won"] and info["valid_actions"] == []
    with pytest.raises(UserError, match="call reset"):
        env.step("add one")


def test_text_game_env_does_not_pass_invalid_commands_to_the_game_but_counts_them():
    env = TextGameEnv("counting:9", max_commands=3)
    env.reset()
    observation, reward, terminated, truncated, info = env.step("sing")
    assert observation.startswith("sing is not a valid action.\nThe number is 0.")
    assert (reward, terminated, truncated, info["invalid_action"], info["moves"]) == (0.0, False, False, True, 1)
    assert env.step("add one")[3] is False
    *_, truncated, info = env.step("sing")
    assert truncated and info["valid_actions"] == []


def test_text_game_env_takes_positions_of_valid_actions():
    env = TextGameEnv("counting:2", actions="index", max_actions=2)
    _, info = env.reset()
    assert info["valid_actions"] == ["add one", "stop"]
    np.testing.assert_array_equal(info["action_mask"], [1, 1])
    assert env.step(np.int64(0))[1] == 1.0
    *_, info = env.step(0)
    np.testing.assert_array_equal(info["action_mask"], [0, 0])
    wide = TextGameEnv("counting:2", actions="index", max_actions=5)
    _, info = wide.reset()
    np.testing.assert_array_equal(info["action_mask"], [1, 1, 1, 0, 0])
    wide.action_space.seed(0)
    assert {int(wide.action_space.sample(info["action_mask"])) for _ in range(50)} == {0, 1, 2}
    assert wide.step(4)[4]["invalid_action"]


def test_text_game_env_samples_valid_commands_and_works_in_a_vector():
    envs = SyncVectorEnv([lambda: TextGameEnv("counting:9")] * 2)
    _, infos = envs.reset(seed=3)
    assert infos["score"].tolist() == [0.0, 0.0]
    env = TextGameEnv("counting:9")
    env.reset()
    assert {env.action_space.sample() for _ in range(50)} == {"add one", "stop", "wait"}
    _, rewards, *_ = envs.step(("add one", "wait"))
    assert rewards.tolist() == [1.0, 0.0]
    envs.close()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"game": "countin:9"}, "Did you mean 'counting:'"),
        ({"actions": "letters"}, "must be one of text, index"),
        ({"render_mode": "human"}, "must be 'ansi' or None"),
        ({"max_commands": 0}, "must be at least 1"),
    ],
)
def test_text_game_env_explains_wrong_arguments(arguments, hint):
    with pytest.raises(UserError, match=hint):
        TextGameEnv(**{"game": "counting:9", **arguments})


# environments as games ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["?seed=3", "?key=valid_actions", "?key=verbs&commands=verbs", "?discrete=true"])
def test_gymnasium_game_keeps_the_protocol(options):
    check_game(SWITCHES + options)


def test_gymnasium_game_is_won_by_its_commands():
    game = open_game(f"{SWITCHES}?size=2&max_score=2&seed=1")
    state = game.reset()
    assert state.valid_actions == ("turn on switch 0", "turn on switch 1", "wait")
    assert (state.feedback, state.goal, state.max_score) == ("Hello. 0 are on.", "Turn all on.", 2.0)
    assert game.step("wait")[1] == 0.0
    assert game.step("turn on switch 1")[1] == 1.0
    state, reward = game.step("turn on switch 0")
    assert (reward, state.score, state.done, state.won, state.truncated) == (1.0, 2.0, True, True, False)


@pytest.mark.parametrize("seed", range(4))
def test_gymnasium_game_sends_the_position_of_a_command_to_a_discrete_environment(seed):
    game = open_game(f"{SWITCHES}?discrete=true&seed={seed}")  # the environment lists the commands in another order
    game.reset()
    replies = [game.step(command)[0].feedback for command in ("turn on switch 1", "wait", "turn on switch 0")]
    assert replies == ["You turn on switch 1. 1 are on.", "You wait. 1 are on.", "You turn on switch 0. 2 are on."]


@pytest.mark.parametrize(("maximum", "max_score"), [("4", 4.0), ("2.5", 2.5), ("none", 0.0)])
def test_gymnasium_game_reads_the_maximum_score_from_info(maximum, max_score):
    assert open_game(f"{SWITCHES}?maximum={maximum}").reset().max_score == max_score


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("-0.5", -0.5), ("True", True), ("nan", "nan"), ("infinity", "infinity"), ("1_000", "1_000")],
)
def test_gymnasium_game_passes_values_of_parameters(text, value):
    assert open_game(f"{SWITCHES}?label={text}").reset().feedback == f"Hello {value!r}. 0 are on."


@pytest.mark.parametrize(("name", "limit"), [("tests/Switches-v0", 9), ("tests/ShortSwitches-v0", 2)])
def test_gymnasium_game_is_truncated_by_the_shorter_limit(name, limit):
    game = open_game(f"gymnasium:tests.helpers.text_env:{name}")
    state = game.reset()
    while not state.done:
        state, _ = game.step("wait")
    assert (state.moves, state.max_moves, state.truncated) == (limit, limit, True)


def test_gymnasium_game_plays_a_game_of_this_package_through_both_adapters():
    game = open_game(f"gymnasium:priorzero.envs.gymnasium_env:{ENV_ID}?game=counting%3A2")
    assert (game.reset().max_score, game.step("add one")[1]) == (2.0, 1.0)
    state, _ = game.step("add one")
    assert state.won and state.done


@pytest.mark.parametrize(
    ("env_id", "hint"),
    [
        ("gymnasium:", "the environment is missing"),
        ("gymnasium:Nothing-v0", "there is no Gymnasium environment 'Nothing-v0'"),
        ("gymnasium:no_such_module:Nothing-v0", "No module named 'no_such_module'"),
        ("gymnasium:CartPole-v1", "the observation is a ndarray, not a text"),
        (f"{SWITCHES}?colour=red", "raised TypeError: .* unexpected keyword argument 'colour'"),
        (f"{SWITCHES}?seed=-1", "must be at least 0"),
        (f"{SWITCHES}?key=verbs", "info has no 'valid_actions' or 'admissible_commands'.*It has: 'verbs', 'won'"),
        (f"{SWITCHES}?commands=verbs", "info has no 'verbs'"),
        (f"{SWITCHES}?flaw=empty", "is empty, although"),
        (f"{SWITCHES}?flaw=numbers", r"is \[1, 2\]. Allowed is a list of texts"),
        (f"{SWITCHES}?maximum=high", r"info\['max_score'\] is 'high'. Allowed is a number, or None"),
        (f"{SWITCHES}?max_score=nan", "max_score='nan' is not allowed. Allowed: a number"),
        (f"{SWITCHES}?flaw=pixels", "the observation is a ndarray"),
    ],
)
def test_gymnasium_game_explains_what_cannot_be_played(env_id, hint):
    with pytest.raises(UserError, match=hint):
        open_game(env_id).reset()
