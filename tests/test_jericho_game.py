"""Tests of Jericho games: states, rewards, ends of episodes, and reproducible valid actions."""

import json
import os
import random
import subprocess
import sys

import pytest

from priorzero.envs.frotz import EmulatorState
from priorzero.envs.jericho_game import FALLBACK_ACTIONS, JerichoGame
from priorzero.types import GameState, UserError
from tests.helpers.game_files import story

TO_THE_HOUSE = ["s", "e", "open window", "w", "w", "take lamp", "take sword"]
TO_THE_TROLL = [*TO_THE_HOUSE, "move rug", "open trapdoor", "turn on lamp", "d", "n"]


def open_game(name: str = "zork1.z5", **changes) -> JerichoGame:
    arguments = {"seed": 0, "max_episode_steps": 1000, "look_and_inventory": True, "drop_inert_commands": True}
    return JerichoGame(story(name), **{**arguments, **changes})


def play(game: JerichoGame, *, choices: int, steps: int) -> list[GameState]:
    """The states of an episode with random actions, which the seed ``choices`` determines."""
    player = random.Random(choices)
    states = [game.reset()]
    while len(states) <= steps and not states[-1].done:
        states.append(game.step(player.choice(states[-1].valid_actions))[0])
    return states


def test_jericho_game_first_state():
    state = open_game().reset()
    assert "West of House" in state.feedback
    assert state.look.startswith("West of House\n")
    assert state.inventory == "You are empty-handed."
    assert {"open mailbox", "north", "south", "west"} <= set(state.valid_actions)
    assert list(state.valid_actions) == sorted(set(state.valid_actions))
    assert (state.score, state.max_score, state.moves, state.goal) == (0.0, 350.0, 0, "")
    assert not (state.done or state.won or state.truncated or state.actions_are_fallback)


def test_jericho_game_rewards_changes_of_the_score():
    game = open_game(look_and_inventory=False)
    state = game.reset()
    rewards = {}
    for action in ("north", "north", "up", "take egg", "down"):
        assert action in state.valid_actions
        state, rewards[action] = game.step(action)
    assert rewards == {"north": 0.0, "up": 0.0, "take egg": 5.0, "down": 0.0}
    assert (state.score, state.moves) == (5.0, 5)
    assert state.feedback.startswith("Forest Path")
    assert (state.look, state.inventory) == ("", "")


def test_jericho_game_is_won_by_the_walkthrough():
    game = open_game("detective.z5", look_and_inventory=False)
    game._valid_actions = lambda state: ("wait",)  # a search would be slow and is not needed here
    state = game.reset()
    total = state.score
    assert total == 10.0  # the game begins with ten points
    for command in game.walkthrough():
        if state.done:
            break
        state, reward = game.step_unchecked(command)  # some of the commands are not valid actions
        total += reward
    assert (total, state.score, state.max_score) == (360.0, 360.0, 360.0)
    assert state.done and state.won and not state.truncated and state.valid_actions == ()


def test_jericho_game_ends_when_the_player_dies():
    game = open_game(look_and_inventory=True, seed=3)
    first = game.reset()
    game._valid_actions = lambda state: ("wait",)  # a search would be slow and is not needed here
    state = first
    for command in [*TO_THE_TROLL, *["wait"] * 20]:  # the troll kills a player who waits
        state, _ = game.step_unchecked(command)
        if state.done:
            break
    assert state.done and not state.won and not state.truncated
    assert (state.valid_actions, state.look, state.inventory) == ((), "", "")
    with pytest.raises(ValueError, match="reset"):
        game.step("wait")
    del game._valid_actions
    assert game.reset() == first


def test_jericho_game_reset_repeats_the_game():
    game = open_game()
    first = play(game, choices=1, steps=15)
    assert play(game, choices=1, steps=15) == first
    assert play(open_game(), choices=1, steps=15) == first


def random_texts(*, observe: bool, search: bool, seed: int) -> list[str]:
    """The texts of zork1 up to the end of the fight with the troll, in which every blow is random.

    Args:
        observe: observe look and inventory at every step.
        search: search valid actions at every step.
        seed: the game's seed.
    """
    game = open_game(look_and_inventory=observe, seed=seed)
    if not search:
        game._valid_actions = lambda state: ("wait",)  # type: ignore[method-assign]
    texts = [game.reset().feedback]
    for command in TO_THE_TROLL:
        texts.append(game.step_unchecked(command)[0].feedback)
    for _ in range(12):
        state, _ = game.step_unchecked("kill troll with sword")
        texts.append(f"{state.feedback} {state.score} {state.done}")
        if state.done:
            break
    return texts


def test_jericho_game_is_not_changed_by_observations_and_searches():
    plain = random_texts(observe=False, search=False, seed=3)
    assert any("troll" in text for text in plain)
    assert random_texts(observe=False, search=False, seed=5) != plain  # the fight is random
    assert random_texts(observe=True, search=False, seed=3) == plain
    assert random_texts(observe=True, search=True, seed=3) == plain


def test_jericho_game_caches_the_actions_that_a_search_finds():
    game = open_game(look_and_inventory=False)
    first = play(game, choices=2, steps=8)
    known = len(game._known_actions)
    play(game, choices=2, steps=8)
    assert len(game._known_actions) == known  # everything was cached
    player = random.Random(2)
    game.reset()
    for state in first[:-1]:
        game._known_actions.clear()
        assert game._valid_actions(game._env.full_state()) == state.valid_actions
        game.step(player.choice(state.valid_actions))


def test_emulator_state_digest_depends_on_memory_stack_registers_random_numbers_and_keys():
    game = open_game(look_and_inventory=False)
    game.reset()
    (ram, stack, program_counter, stack_pointer, *rest), unread_keys = game._env.full_state()
    assert unread_keys == b""

    def changed(array, index):
        other = array.copy()
        other[index] += 1
        return other

    random_numbers = next(n for n, value in enumerate(rest) if isinstance(value, tuple))
    other_numbers = [*rest[:random_numbers], (7, 0, 0), *rest[random_numbers + 1 :]]
    states = [
        (ram, stack, program_counter, stack_pointer, *rest),
        (changed(ram, 100), stack, program_counter, stack_pointer, *rest),
        (changed(ram, -1), stack, program_counter, stack_pointer, *rest),
        (ram, changed(stack, -1), program_counter, stack_pointer, *rest),
        (ram, stack, program_counter + 1, stack_pointer, *rest),
        (ram, stack, program_counter, stack_pointer, *other_numbers),
    ]
    digests = {EmulatorState(state, keys).digest() for state in states for keys in (b"", b"y")}
    assert len(digests) == 2 * len(states)


def test_jericho_game_limits_the_cache_in_memory(monkeypatch):
    monkeypatch.setattr("priorzero.envs.jericho_game.MAX_KNOWN_STATES", 3)
    game = open_game(look_and_inventory=False)
    play(game, choices=0, steps=6)
    assert len(game._known_actions) == 3


def test_jericho_game_truncates_episodes():
    game = open_game(max_episode_steps=2)
    game.reset()
    state, _ = game.step("open mailbox")
    assert not state.done
    state, _ = game.step("take leaflet")
    assert state.done and state.truncated and not state.won and state.valid_actions == ()
    assert "leaflet" in state.inventory  # still observed, because the value of this state is estimated
    with pytest.raises(ValueError, match="reset"):
        game.step("north")


def test_jericho_game_refuses_wrong_use():
    game = open_game()
    with pytest.raises(ValueError, match="reset"):
        game.step("north")
    game.reset()
    with pytest.raises(ValueError, match="'dance' is not among"):
        game.step("dance")
    with pytest.raises(ValueError, match="seed=-1"):
        open_game(seed=-1)
    with pytest.raises(ValueError, match="max_episode_steps=0"):
        open_game(max_episode_steps=0)
    game.close()
    with pytest.raises(ValueError, match="reset"):
        game.step("north")


def test_jericho_game_offers_fallback_actions():
    game = open_game()
    game._env.get_valid_actions = lambda **_: []
    state = game.reset()
    assert state.actions_are_fallback
    assert state.valid_actions == FALLBACK_ACTIONS
    state, reward = game.step("wait")
    assert state.feedback == "Time passes..."
    assert reward == 0.0


def test_jericho_game_refuses_an_unsupported_story():
    with pytest.warns(UserWarning, match="not fully supported"), pytest.raises(UserError, match="does not support"):
        open_game("zork1.z3")


PROGRAM = """
import json, sys
sys.modules["torch"] = None  # otherwise spaCy imports it
from priorzero.envs.jericho_game import JerichoGame
game = JerichoGame(sys.argv[1], seed=0, max_episode_steps=99, look_and_inventory=False, drop_inert_commands=True)
states = [game.reset()] + [game.step_unchecked(command)[0] for command in game.walkthrough()[:13]]
print(json.dumps([state.valid_actions for state in states]))
"""


@pytest.mark.slow
def test_jericho_game_valid_actions_do_not_depend_on_the_hash_seed():
    command = [sys.executable, "-c", PROGRAM, str(story("zork1.z5"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(command, env={**environment, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True)
        for seed in ("1", "2")
    ]
    found = [json.loads(process.communicate(timeout=100)[0]) for process in processes]
    assert found[0] == found[1]
    # Ties occurred: several commands with different objects have the same effect.
    assert any(action.startswith("open egg with ") for action in found[0][-1])
