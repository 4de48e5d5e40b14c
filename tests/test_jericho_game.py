import json
import os
import random
import subprocess
import sys

import pytest

from priorzero.envs.frotz import state_digest
from priorzero.envs.jericho_game import FALLBACK_ACTIONS, JerichoGame
from priorzero.types import GameState, UserError
from tests.helpers.game_files import story

TO_THE_HOUSE = ["s", "e", "open window", "w", "w", "take lamp", "take sword"]
TO_THE_TROLL = [*TO_THE_HOUSE, "move rug", "open trapdoor", "turn on lamp", "d", "n"]


def open_game(name: str = "zork1.z5", **changes) -> JerichoGame:
    arguments = {"seed": 0, "max_episode_steps": 1000, "look_and_inventory": True, "drop_inert_commands": True}
    return JerichoGame(story(name), **{**arguments, **changes})


def play(game: JerichoGame, *, choices: int, steps: int) -> list[GameState]:
    """The states of a random game; ``choices`` seeds the player."""
    player = random.Random(choices)
    states = [game.reset()]
    while len(states) <= steps and not states[-1].done:
        states.append(game.step(player.choice(states[-1].valid_actions))[0])
    return states


def test_first_state_of_zork1():
    state = open_game().reset()
    assert "West of House" in state.feedback
    assert state.look.startswith("West of House\n")
    assert state.inventory == "You are empty-handed."
    assert {"open mailbox", "north", "south", "west"} <= set(state.valid_actions)
    assert list(state.valid_actions) == sorted(set(state.valid_actions))
    assert (state.score, state.max_score, state.moves, state.goal) == (0.0, 350.0, 0, "")
    assert not (state.done or state.won or state.truncated or state.actions_are_fallback)


def test_reward_is_the_change_of_the_score():
    game = open_game(look_and_inventory=False)
    state = game.reset()
    rewards = {}
    for action in ("north", "north", "up", "take egg", "down"):
        assert action in state.valid_actions
        state, rewards[action] = game.step(action)
    assert rewards == {"north": 0.0, "up": 0.0, "take egg": 5.0, "down": 0.0}  # the egg is worth five points
    assert (state.score, state.moves) == (5.0, 5)
    assert state.feedback.startswith("Forest Path")
    assert (state.look, state.inventory) == ("", "")


def test_walkthrough_of_detective_reaches_its_maximum():
    game = open_game("detective.z5", look_and_inventory=False)
    game._valid_actions = lambda: ("wait",)  # not asked for here, and slow
    state = game.reset()
    total = state.score
    assert total == 10.0  # detective gives ten points for beginning
    for command in game.walkthrough():
        if state.done:
            break
        state, reward = game.step_unchecked(command)  # not every command of the walkthrough is among the valid actions
        total += reward
    assert (total, state.score, state.max_score) == (360.0, 360.0, 360.0)
    assert state.done
    assert state.won
    assert not state.truncated
    assert state.valid_actions == ()


def test_death_ends_the_episode():
    game = open_game(look_and_inventory=True, seed=3)
    first = game.reset()
    game._valid_actions = lambda: ("wait",)  # not asked for here, and slow
    state = first
    for command in [*TO_THE_TROLL, *["wait"] * 20]:  # who waits beside the troll is killed
        state, _ = game.step_unchecked(command)
        if state.done:
            break
    assert state.done
    assert not state.won
    assert not state.truncated
    assert (state.valid_actions, state.look, state.inventory) == ((), "", "")
    with pytest.raises(ValueError, match="reset"):
        game.step("wait")
    del game._valid_actions
    assert game.reset() == first


def test_reset_starts_the_same_game_again():
    game = open_game()
    first = play(game, choices=1, steps=25)
    assert play(game, choices=1, steps=25) == first
    assert play(open_game(), choices=1, steps=25) == first


def random_texts(*, peek: bool, ask: bool, seed: int) -> list[str]:
    """What zork1 prints on the way to the troll and in the fight, where each blow is random.

    ``peek`` takes look and inventory at every step, ``ask`` lets Jericho look for valid actions at every step.
    """
    game = open_game(look_and_inventory=peek, seed=seed)
    if not ask:
        game._valid_actions = lambda: ("wait",)  # type: ignore[method-assign]
    texts = [game.reset().feedback]
    for command in TO_THE_TROLL:
        texts.append(game.step_unchecked(command)[0].feedback)
    for _ in range(12):
        state, _ = game.step_unchecked("kill troll with sword")
        texts.append(f"{state.feedback} {state.score} {state.done}")
        if state.done:
            break
    return texts


def test_taking_look_and_inventory_and_valid_actions_changes_nothing():
    plain = random_texts(peek=False, ask=False, seed=3)
    assert any("troll" in text for text in plain)
    assert random_texts(peek=False, ask=False, seed=5) != plain  # the fight is indeed random
    assert random_texts(peek=True, ask=False, seed=3) == plain
    assert random_texts(peek=True, ask=True, seed=3) == plain


def test_remembered_valid_actions_are_those_that_would_be_found():
    game = open_game(look_and_inventory=False)
    first = play(game, choices=2, steps=15)
    known = len(game._known_actions)
    assert play(game, choices=2, steps=15) == first
    assert len(game._known_actions) == known  # the second time, everything was remembered
    play(game, choices=4, steps=15)
    assert len(game._known_actions) > known
    player = random.Random(2)
    game.reset()
    for state in first[:-1]:
        game._known_actions.clear()
        assert game._valid_actions() == state.valid_actions
        game.step(player.choice(state.valid_actions))


def test_key_of_a_state():
    game = open_game(look_and_inventory=False)
    game.reset()
    ram, stack, program_counter, stack_pointer, *rest = game._env.get_state()
    key = state_digest((ram, stack, program_counter, stack_pointer, *rest))

    def changed(array, index):
        other = array.copy()
        other[index] += 1
        return other

    assert state_digest((changed(ram, 100), stack, program_counter, stack_pointer, *rest)) != key
    assert state_digest((ram, changed(stack, -1), program_counter, stack_pointer, *rest)) != key
    assert state_digest((ram, stack, program_counter + 1, stack_pointer, *rest)) != key
    random_numbers = rest.index(next(value for value in rest if isinstance(value, tuple)))
    rest[random_numbers] = (7, 0, 0)
    assert state_digest((ram, stack, program_counter, stack_pointer, *rest)) != key


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("priorzero.envs.jericho_game.MAX_KNOWN_STATES", 3)
    game = open_game(look_and_inventory=False)
    play(game, choices=0, steps=6)
    assert len(game._known_actions) == 3


def test_move_limit():
    game = open_game(max_episode_steps=2)
    game.reset()
    state, _ = game.step("open mailbox")
    assert not state.done
    state, _ = game.step("take leaflet")
    assert state.done
    assert state.truncated
    assert not state.won
    assert state.valid_actions == ()
    assert "leaflet" in state.inventory  # still shown: the value of this state is estimated
    with pytest.raises(ValueError, match="reset"):
        game.step("north")


def test_wrong_use():
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


def test_fallback_actions():
    game = open_game()
    game._env.get_valid_actions = lambda **_: []
    state = game.reset()
    assert state.actions_are_fallback
    assert state.valid_actions == FALLBACK_ACTIONS
    state, reward = game.step("wait")
    assert state.feedback == "Time passes..."
    assert reward == 0.0


def test_unsupported_story():
    with pytest.warns(UserWarning, match="not fully supported"), pytest.raises(UserError, match="does not support"):
        open_game("zork1.z3")


SHOW = """
import json, sys
sys.modules["torch"] = None  # spaCy would import it
from priorzero.envs.jericho_game import JerichoGame
game = JerichoGame(sys.argv[1], seed=0, max_episode_steps=99, look_and_inventory=False, drop_inert_commands=True)
states = [game.reset()] + [game.step_unchecked(command)[0] for command in game.walkthrough()[:13]]
print(json.dumps([state.valid_actions for state in states]))
"""


@pytest.mark.slow
def test_valid_actions_do_not_depend_on_the_hash_seed():
    command = [sys.executable, "-c", SHOW, str(story("zork1.z5"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(command, env={**environment, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True)
        for seed in ("1", "2")
    ]
    found = [json.loads(process.communicate(timeout=100)[0]) for process in processes]
    assert found[0] == found[1]
    # Things to combine are at hand, so several commands have the same effect and ties occur.
    assert any(action.startswith("open egg with ") for action in found[0][-1])
