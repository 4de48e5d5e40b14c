"""BabyAI's levels: names, states, rewards, ends of episodes and valid actions."""

import asyncio
import importlib.metadata
import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from priorzero.envs import babyai_levels
from priorzero.envs.babyai_game import ACTIONS, BabyAIGame
from priorzero.envs.babyai_levels import level_ids, max_moves
from priorzero.envs.games import check_names, make_game, resolve_game
from priorzero.envs.limits import episode_steps, resolve_limits
from priorzero.envs.worker import make_worker
from priorzero.settings import EnvSettings
from priorzero.types import UserError
from tests.helpers.playing import play_some

pytest.importorskip("minigrid")

ARGUMENTS = {"max_episode_steps": 100, "look_and_inventory": True, "drop_inert_commands": True}
# GoToLocal with the seed 3, as minigrid prints it: A ball, B box, K key; R red, G green or grey, P purple; W wall.
PICTURE = """\
WGWGWGWGWGWGWGWG
WG>>  BGAG    WG
WG  BR        WG
WG      KR    WG
WG    BR  AR  WG
WGKG          WG
WG        AP  WG
WGWGWGWGWGWGWGWG"""
SOLUTION = ("turn right", "go forward", "go forward", "turn left", "go forward", "go forward")


def open_level(level="GoToLocal", *, layout=3, seed=0, **changes):
    return BabyAIGame(level_ids()[level], layout=layout, seed=seed, **{**ARGUMENTS, **changes})


def place(game, position, direction):
    """Move the agent of a game. Directions: 0 right, 1 down, 2 left, 3 up."""
    game._env.agent_pos, game._env.agent_dir = position, direction
    return game._observe(moves=0, score=0.0)


# states ---------------------------------------------------------------------------------------------------------------


def test_babyai_game_first_state():
    game = open_level()
    state = game.reset()
    assert game._env.pprint_grid() == PICTURE
    assert state.feedback == (
        "You see a wall 1 step left, You see a grey ball 3 steps forward, You see a green box 2 steps forward, "
        "You see a red box 1 step right and 1 step forward, You see a red key 2 steps right and 3 steps forward, "
        "You see a red ball 3 steps right and 4 steps forward, You see a red box 3 steps right and 2 steps forward\n"
        "go to the red key"
    )
    assert state.look == state.feedback == state.raw_obs_text and state.inventory == ""
    assert state.goal == "go to the red key"
    assert state.room == state.feedback.split("\n")[0]
    assert state.valid_actions == ("turn left", "turn right", "go forward")
    assert (state.score, state.max_score, state.moves, state.max_moves) == (0.0, 1.0, 0, 64)
    assert not (state.done or state.won or state.truncated or state.actions_are_fallback)


def test_babyai_game_says_that_nothing_is_seen():
    game = open_level("OneRoomS20")
    game.reset()
    for x, y in np.ndindex(18, 18):
        game._env.grid.set(x + 1, y + 1, None)
    assert place(game, (10, 10), 0).feedback == "You see nothing\npick up the ball"


def test_babyai_game_carries_objects():
    game = open_level()
    game.reset()
    assert place(game, (2, 1), 0).valid_actions == ("turn left", "turn right", "pick up", "toggle")
    game._state = place(game, (2, 1), 0)
    state, reward = game.step("pick up")
    assert reward == 0.0 and state.inventory == "You carry a green box"
    assert state.feedback.startswith("You carry a green box, You see a wall 1 step left, You see a grey ball 2 steps ")
    assert "carry" not in state.look and state.raw_obs_text.count("You carry") == 1
    assert state.valid_actions == ("turn left", "turn right", "go forward", "drop")
    state, _ = game.step("drop")
    assert state.inventory == "" and "You see a green box 1 step forward" in state.feedback
    state, _ = game.step("toggle")  # opens the box, which is empty
    assert "green box" not in state.feedback


def test_babyai_game_without_look_has_the_same_feedback():
    plain, full = open_level(look_and_inventory=False).reset(), open_level().reset()
    assert (plain.look, plain.inventory) == ("", "")
    assert plain.feedback == full.feedback and plain.room == full.room and plain.place == (plain.feedback,)


# rewards and ends -----------------------------------------------------------------------------------------------------


def test_babyai_game_is_won_by_a_solution():
    game = open_level()
    state, rewards = game.reset(), []
    for action in SOLUTION:
        assert not state.done
        state, reward = game.step(action)
        rewards.append(reward)
    assert rewards == [0.0] * 5 + [pytest.approx(1 - 0.9 * 6 / 64)]  # minigrid's reward
    assert state.done and state.won and not state.truncated and state.valid_actions == ()
    assert state.score == sum(rewards) and state.terminated
    with pytest.raises(ValueError, match="reset"):
        game.step("turn left")


def test_babyai_game_is_lost_where_the_wrong_object_ends_the_level():
    game = open_level("PickupDistDebug", layout=0)
    game.reset()
    env = game._env
    wrong = [
        (x, y)
        for x, y in np.ndindex(env.width, env.height)
        if (cell := env.grid.get(x, y)) and cell.type != "wall" and cell not in env.instrs.desc.obj_set
    ]
    x, y = next((x, y) for x, y in wrong if env.grid.get(x - 1, y) is None)
    game._state = place(game, (x - 1, y), 0)
    state, reward = game.step("pick up")
    assert state.done and not state.won and not state.truncated and reward == state.score == 0.0


@pytest.mark.parametrize(("given", "limit"), [(2, 2), (100, 64)])
def test_babyai_game_truncates_episodes(given, limit):
    game = open_level(max_episode_steps=given)
    state = game.reset()
    while not state.done:
        state, _ = game.step(("turn left", "turn right")[state.moves % 2])
    assert (state.moves, state.max_moves) == (limit, limit)
    assert state.truncated and not state.won and not state.terminated and state.feedback


def test_babyai_game_refuses_wrong_use():
    game = open_level()
    with pytest.raises(ValueError, match="call reset"):
        game.step("turn left")
    game.reset()
    with pytest.raises(ValueError, match="'drop' is not among the valid actions"):
        game.step("drop")
    with pytest.raises(ValueError, match="at least 0"):
        open_level(seed=-1)
    with pytest.raises(ValueError, match="'BabyAI-Nowhere-v0' is not a level"):
        BabyAIGame("BabyAI-Nowhere-v0", seed=0, **ARGUMENTS)


# valid actions --------------------------------------------------------------------------------------------------------


def test_babyai_game_offers_all_commands_without_drop_inert_commands():
    game = open_level(drop_inert_commands=False)
    state = game.reset()
    assert state.valid_actions == tuple(ACTIONS)
    assert game.step("drop")[0].feedback == state.feedback


def test_babyai_game_trying_commands_does_not_change_the_game():
    with_trials, without = open_level(), open_level(drop_inert_commands=False)
    with_trials.reset(), without.reset()
    for action in SOLUTION:
        one, other = with_trials.step(action)[0], without.step(action)[0]
        assert (one.feedback, one.score, one.moves, one.done) == (other.feedback, other.score, other.moves, other.done)


def test_babyai_game_offers_a_command_that_only_ends_the_level():
    game = open_level()
    game.reset()
    state = place(game, (3, 3), 0)  # in front of the red key, to which the agent is to go
    assert state.valid_actions == tuple(ACTIONS)  # "drop" changes nothing, but minigrid checks the place after it
    game._state = state
    state, reward = game.step("drop")
    assert state.won and reward == pytest.approx(1 - 0.9 / 64)


def test_babyai_game_offers_a_command_that_only_advances_the_mission():
    from minigrid.envs.babyai.core.verifier import BeforeInstr, GoToInstr, ObjDesc

    game = open_level()
    game.reset()
    parts = GoToInstr(ObjDesc("key", "red")), GoToInstr(ObjDesc("ball", "purple"))
    game._env.instrs = BeforeInstr(*parts)
    game._env.instrs.reset_verifier(game._env)
    game._state = place(game, (3, 3), 0)
    assert "go forward" in game._state.valid_actions
    state, _ = game.step("go forward")
    assert not state.done and "go forward" not in state.valid_actions  # the first part is done


# layouts --------------------------------------------------------------------------------------------------------------


def test_babyai_game_layouts():
    def play(game):
        return play_some(game, steps=8)

    game = open_level()
    first = play(game)
    assert play(game) == first  # each episode has the same layout
    assert play(open_level(seed=5)) == first  # the name's seed decides
    assert play(open_level(layout=None, seed=3)) == first  # without it, the game's seed
    assert play(open_level(layout=None, seed=4)) != first


@pytest.mark.slow
def test_babyai_game_layout_does_not_depend_on_the_hash_seed():
    code = (
        "from priorzero.envs.babyai_game import make_env, reset_env\n"
        "for level in ('BabyAI-BossLevel-v0', 'BabyAI-KeyInBox-v0', 'BabyAI-GoToObjMaze-v0'):\n"
        "    env = make_env(level)\n    reset_env(env, 5)\n    print(env.mission, env.max_steps, env.hash())\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1 and "pygame" not in answers.pop()


@pytest.mark.slow
def test_babyai_game_plays_all_levels():
    assert len(level_ids()) == 96
    rng = np.random.default_rng(0)
    for level in level_ids():
        game = open_level(level, layout=1)
        state = first = game.reset()
        assert state.goal and state.feedback.endswith(f"\n{state.goal}")
        for _ in range(5):
            if not state.done:
                state, _ = game.step(state.valid_actions[rng.integers(len(state.valid_actions))])
                assert state.done or state.valid_actions
        assert game.reset() == first


# names ----------------------------------------------------------------------------------------------------------------


def test_resolve_game_knows_levels_by_name():
    spec = resolve_game("babyai:GoToLocal?seed=3")
    assert (spec.kind, spec.name, spec.path) == ("registered", "babyai-GoToLocal-seed3", None)
    assert spec.request.game.version == importlib.metadata.version("minigrid")  # part of the MD5
    arguments = {**ARGUMENTS, "seed": 9, "valid_actions": "fast"}
    assert make_game(spec, **arguments).reset() == open_level().reset()
    assert resolve_game("babyai:GoToLocal").md5 != spec.md5
    assert make_game(resolve_game("babyai:GoToLocal"), **arguments).reset() == open_level(layout=9).reset()
    assert list(check_names("babyai:GoToLocal?seed=3,babyai:GoToLocal?seed=4").values()) == [
        "babyai:GoToLocal?seed=3",
        "babyai:GoToLocal?seed=4",
    ]


@pytest.mark.parametrize(
    ("env_id", "hints"),
    [
        ("babyai:gotolocal", ["Did you mean 'GoToLocal'?", "minigrid has: GoToRedBallGrey"]),
        ("babyai:BabyAI-GoToLocal-v0", ["Did you mean 'GoToLocal'?"]),
        ("babyai:", ["Unknown BabyAI level ''", "'babyai:GoToLocal?seed=1'"]),
        ("babyai:Maze", ["Unknown BabyAI level 'Maze'. A level is"]),
        ("babyai:GoToLocal?size=5", ["Unknown parameter 'size'", "seed"]),
        ("babyai:GoToLocal?seed=-1", ["seed='-1'", "from 0 to 4294967295"]),
        ("babyai:GoToLocal?seed=4294967296", ["from 0 to 4294967295"]),
        ("babyai:GoToLocal?seed=", ["seed=''"]),
        ("babyai:GoToLocal?seed=1&seed=2", ["twice"]),
    ],
)
def test_resolve_game_explains_bad_levels(env_id, hints):
    with pytest.raises(UserError) as caught:
        resolve_game(env_id)
    for hint in [*hints, env_id]:
        assert hint in str(caught.value)


def test_resolve_game_says_how_to_install_minigrid(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "minigrid" else find(name))
    babyai_levels.level_ids.cache_clear()
    with pytest.raises(UserError, match=r"minigrid, which is not installed\. Type: pip install minigrid==3\.2\.0 "):
        resolve_game("babyai:GoToLocal")


def test_episode_steps_of_a_level_is_its_own_limit():
    assert max_moves("GoToLocal", {"seed": "3"}) == 64  # a room of 8 x 8 cells
    assert episode_steps(EnvSettings(), resolve_game("babyai:GoToLocal?seed=3")) == 64
    assert episode_steps(EnvSettings(), resolve_game("babyai:GoToLocalS5N2")) == 25
    assert episode_steps(EnvSettings(), resolve_game("babyai:GoTo")) == 500  # instead of 9 rooms of 64 cells
    assert episode_steps(EnvSettings(max_episode_steps=30), resolve_game("babyai:GoTo")) == 30
    env = EnvSettings()
    resolve_limits(env, [resolve_game("babyai:GoToLocal?seed=3")])
    assert env.max_episode_steps == "babyai-GoToLocal-seed3=64" and env.action_space_size == 256


async def _play_in_worker():
    arguments = {**ARGUMENTS, "valid_actions": "fast"}
    worker = make_worker(resolve_game("babyai:GoToLocal?seed=3"), seed=0, timeout_s=60.0, **arguments)
    try:
        await worker.reset()
        return [await worker.step(action) for action in SOLUTION]
    finally:
        await worker.close()


@pytest.mark.slow
def test_babyai_game_runs_in_a_worker_process():
    state, reward = asyncio.run(_play_in_worker())[-1]
    assert state.won and reward == pytest.approx(0.915625)
