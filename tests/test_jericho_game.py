"""Tests of Jericho games: states, rewards, ends of episodes, and reproducible valid actions."""

import itertools
import json
import os
import random
import subprocess
import sys

import jericho
import pytest

from priorzero.envs.frotz import EmulatorState
from priorzero.envs.jericho_game import FALLBACK_ACTIONS, JerichoGame
from priorzero.types import GameState, UserError
from tests.helpers.game_files import story, supported_stories

TO_THE_HOUSE = ["s", "e", "open window", "w", "w", "take lamp", "take sword"]
TO_THE_TROLL = [*TO_THE_HOUSE, "move rug", "open trapdoor", "turn on lamp", "d", "n"]


def open_game(name: str = "zork1.z5", **changes) -> JerichoGame:
    arguments = {
        "seed": 0,
        "max_episode_steps": 1000,
        "look_and_inventory": True,
        "drop_inert_commands": True,
        "valid_actions": "exact",
    }
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
    for name, values in {
        "seed": (1.5, "0", None, True),
        "max_episode_steps": (1.5, "9", None),
        "look_and_inventory": ("false", 1, None),
        "drop_inert_commands": ("no", 0),
        "valid_actions": ("quick", True, None),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name}={value!r} must be "):
                open_game(**{name: value})
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


SEARCHES_PER_GAME = 2
CANDIDATES = 40  # commands that a search tries; a complete search tries thousands


def walk(game: JerichoGame, commands: list[str]) -> GameState:
    """The state after these commands. Valid actions are searched in the last state only."""
    game._valid_actions, find = lambda state: ("wait",), game._valid_actions
    game.reset()
    for command in commands[:-1]:
        game.step_unchecked(command)
    game._valid_actions = find
    return game.step_unchecked(commands[-1])[0]


def search_sometimes(game: JerichoGame, *, every: int) -> list[int]:
    """Search valid actions in every ``every``-th state and where the game waits for a key, with a few candidates.

    Returns a list that will have the number of actions that each search has found.
    """
    generate, find, choice = game._env.act_gen.generate_actions, game._valid_actions, random.Random(0)
    found: list[int] = []
    count = itertools.count()

    def generate_few(objects):
        commands = generate(objects)
        return choice.sample(commands, min(CANDIDATES, len(commands)))

    def find_sometimes(state):
        if next(count) % every and not game._env.waits_for_key():
            return ("wait",)
        actions = find(state)
        found.append(len(actions))
        return actions

    game._env.act_gen.generate_actions = generate_few
    game._valid_actions = find_sometimes
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", supported_stories() or ["zork1.z5"])
def test_jericho_game_walkthrough_equals_jericho_with_observations_and_searches(name):
    plain = jericho.FrotzEnv(str(story(name)), seed=0)
    game = open_game(name, max_episode_steps=10_000)  # spirit.z5 takes 1264
    commands = game.walkthrough()
    found = search_sometimes(game, every=len(commands) // SEARCHES_PER_GAME)
    feedback, info = plain.reset()
    state, done = game.reset(), False
    for command in [*commands, None]:
        assert (state.feedback, state.score) == (feedback.strip(), info["score"])
        expected = EmulatorState(plain.get_state(), b"").digest()
        assert EmulatorState(game._env.get_state(), b"").digest() == expected
        assert state.done == done
        if done or command is None:
            break
        feedback, _, done, info = plain.step(command)
        state, _ = game.step_unchecked(command)
    assert done
    assert len(found) >= SEARCHES_PER_GAME
    game.close()


def test_jericho_game_offers_the_keys_that_a_yes_or_no_question_distinguishes():
    game = open_game("sherlock.z5")
    state = walk(game, game.walkthrough()[:8])
    assert state.feedback.endswith("Please press Y or N >")
    assert state.valid_actions == ("press space", "press y", "press n")
    assert not state.actions_are_fallback
    assert (state.look, state.inventory) == ("", "")
    game._valid_actions = lambda state: ("wait",)  # a search would take seconds
    state, _ = game.step("press n")
    assert state.feedback == "n\nSaturday  5:08:00 a.m."
    assert state.look and state.inventory
    with pytest.raises(ValueError, match="'press y' is not among"):
        game.step("press y")  # the game waits for a line now


def test_jericho_game_offers_the_key_that_continues():
    game = open_game("tryst205.z5")
    state = walk(game, game.walkthrough()[:88])
    assert state.feedback.endswith("(Press SPACE to Continue)")
    assert state.valid_actions == ("press space", "press y")  # all other keys have no effect, such as y
    state, reward = game.step("press space")
    assert state.feedback.startswith("Clearing")
    assert reward == 15.0


def test_jericho_game_offers_one_key_while_the_rest_of_a_command_is_read():
    game = open_game("anchor.z8")
    commands = game.walkthrough()
    assert commands[39] == "Look"
    state = walk(game, commands[:40])  # a few screens are waiting for keys; the first one reads "L"
    assert game._env.full_state().unread_keys == b"ook"
    assert state.valid_actions == ("press space",)
    game.step("press space")
    assert game._env.full_state().unread_keys == b"ok"  # as in Jericho, the space was not read


def test_jericho_game_reset_discards_unread_keys():
    game = open_game("tryst205.z5", look_and_inventory=False)
    game._valid_actions = lambda state: ("wait",)
    first, digest = game.reset(), game._env.full_state().digest()
    for command in [*game.walkthrough()[:88], "wait"]:
        game.step_unchecked(command)
    assert game._env.full_state().unread_keys == b"ait"
    assert game.reset() == first  # in Jericho, the first screen of the next episode reads "a"
    assert game._env.full_state().digest() == digest


@pytest.mark.parametrize("keys", [b"", b"y", b"n\\\\o", b"\xe9 \r"])
def test_frotz_full_state_leaves_the_unread_keys(keys):
    game = open_game("partyfoul.z8", look_and_inventory=False)
    game._env.reset()
    game._env._set_unread_keys(keys)
    for _ in range(2):
        assert game._env.full_state().unread_keys == keys


def test_jericho_game_survives_commands_that_crash_the_emulator():
    game = open_game("hollywood.z3")
    # In this state, "look" overflows the stack of the emulator.
    game._env.act_gen.generate_actions = lambda objects: ["wait", "drop pillar", "look", "north", "look", "yell"]
    state = walk(game, game.walkthrough()[:65])
    assert state.feedback == "Taken."
    assert state.look == ""
    assert "pillar" in state.inventory
    assert state.valid_actions == ("drop pillar", "north")
    assert not state.actions_are_fallback
    state, _ = game.step("drop pillar")
    assert state.feedback == "Dropped."


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
