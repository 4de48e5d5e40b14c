"""Tests of story files that Jericho does not support: valid actions, scores, ends, and damaged files."""

import os
import random
import shutil
import signal
from pathlib import Path

import jericho
import pytest

from priorzero import entry
from priorzero.envs import make_game, resolve_game
from priorzero.envs import story_game as module
from priorzero.envs.frotz import ReproducibleFrotzEnv
from priorzero.envs.general_grammar import TEMPLATES, fill_in, known_templates
from priorzero.envs.jericho_game import FALLBACK_ACTIONS
from priorzero.envs.story_env import Effect, StoryFrotzEnv, last_words, one_for_each
from priorzero.envs.story_game import StoryGame, survey_story
from priorzero.types import GameState, UserError
from tests.helpers.game_files import session_cache, story
from tests.helpers.tiny_story import tiny_story

WINNING_SEED = 11  # the emulator then has the seed of Jericho's walkthrough of zork1.z5


def open_game(path: str | Path = "zork1.z3", **changes) -> StoryGame:
    arguments = {"seed": 0, "max_episode_steps": 1000, "look_and_inventory": True, "drop_inert_commands": True}
    return StoryGame(story(path) if isinstance(path, str) else path, **{**arguments, **changes})


def unsupported_copy(name: str, folder: Path) -> Path:
    """A copy of a supported game that Jericho does not recognise, because a byte follows the story."""
    path = folder / name
    path.write_bytes(story(name).read_bytes() + b"\0")
    return path


def without_search(game: StoryGame) -> StoryGame:
    game._valid_actions = lambda state: ("wait",)  # type: ignore[method-assign]
    return game


def play(game: StoryGame, commands: list[str]) -> list[GameState]:
    return [game.reset(), *(game.step_unchecked(command)[0] for command in commands)]


# Valid actions ------------------------------------------------------------------------------------------------------


def test_story_game_first_state():
    state = open_game().reset()
    assert state.feedback.startswith("ZORK I") and state.feedback.endswith("There is a small mailbox here.")
    assert state.look.startswith("West of House\nYou are standing in an open field")
    assert state.inventory == "You are empty-handed."
    assert state.valid_actions == ("north", "open mailbox", "south", "west")
    assert (state.score, state.max_score, state.moves) == (0.0, 350.0, 0)
    assert not (state.done or state.won or state.actions_are_fallback)


def test_story_game_finds_the_commands_that_matter():
    commands = ["open mailbox", "take leaflet", "n", "n", "u", "take egg", "d", "s", "e", "open window", "w", "w"]
    expected = [
        {"open mailbox", "north", "south", "west"},
        {"take leaflet", "close mailbox"},
        {"drop leaflet", "put leaflet in mailbox"},
        {"east", "west", "north"},
        {"up", "east", "south"},
        {"take egg", "down", "take nest"},
        {"drop egg", "put egg in nest"},
        {"up", "south"},
        {"east", "west"},
        {"open window"},
        {"west", "close window"},
        {"take sack", "take bottle", "open sack", "up", "west"},
        {"take lamp", "take sword", "push rug", "open case", "east"},
    ]
    game = open_game(look_and_inventory=False)
    for state, wanted in zip(play(game, commands), expected, strict=True):
        assert wanted <= set(state.valid_actions), state.feedback
        assert len(state.valid_actions) <= 25, state.valid_actions
        assert list(state.valid_actions) == sorted(set(state.valid_actions))


def test_story_game_offers_fallback_actions_on_the_title_screen():
    game = open_game("lgop.z3", look_and_inventory=False)
    assert game.reset().valid_actions in (("wait",), FALLBACK_ACTIONS)
    state, _ = game.step("wait")
    assert state.feedback.startswith("The place: Upper Sandusky")
    state, _ = game.step_unchecked("look")
    assert {"northeast", "northwest", "turn on flashlight"} <= set(state.valid_actions)


@pytest.mark.slow
def test_story_game_finds_the_effects_that_jericho_finds(tmp_path):
    """The same states of one game, once as a supported game and once as an unsupported one."""
    known = ReproducibleFrotzEnv(story("zork1.z5"), seed=0, num_threads=1)
    other = StoryFrotzEnv(unsupported_copy("zork1.z5", tmp_path), seed=0, max_score=0)
    assert known.is_fully_supported and not other.is_fully_supported
    known.reset()
    num_effects = num_found = num_commands = num_right = 0
    for number, command in enumerate(known.get_walkthrough()[:60]):
        state = known.full_state()
        if number % 6 == 0:

            def effect(action: str, state=state) -> tuple[str, int]:
                known.restore(state)
                known.step(action)
                return known.get_world_state_hash(), known.get_score()

            wanted = {effect(action) for action in known.find_actions(state)}
            found = [effect(action) for action in other.find_actions(state)]
            num_effects, num_found = num_effects + len(wanted), num_found + len(wanted & set(found))
            num_commands, num_right = num_commands + len(found), num_right + sum(each in wanted for each in found)
            known.restore(state)
        known.step(command)
    assert num_effects > 60
    assert num_found / num_effects > 0.95
    assert num_right / num_commands > 0.85


def test_story_game_search_does_not_change_the_game():
    def texts(*, search: bool) -> list[str]:
        game = open_game(seed=3, look_and_inventory=search)
        if not search:
            without_search(game)
        player = random.Random(1)
        commands = ["s", "e", "open window", "w", "w", "take lamp", "move rug", "open trap door", "turn on lamp", "d"]
        commands += ["n", *(player.choice(["kill troll", "wait", "kill troll with lamp"]) for _ in range(6))]
        return [f"{state.feedback} {state.score} {state.done}" for state in play(game, commands)]

    plain = texts(search=False)
    assert any("troll" in text for text in plain)
    assert texts(search=True) == plain


def test_story_game_is_reproducible():
    def states(seed: int) -> list[GameState]:
        player, game = random.Random(5), open_game(seed=seed)
        found = [game.reset()]
        while len(found) < 8:
            found.append(game.step(player.choice(found[-1].valid_actions))[0])
        again = game.reset()
        assert again == found[0]
        return found

    assert states(4) == states(4)


def test_story_game_survives_commands_that_crash_the_emulator(caplog):
    game = open_game(look_and_inventory=False)
    parent, execute = os.getpid(), game._env._execute

    def crash(command: str) -> str:
        if command in ("yell", "put door in mailbox", "inventory") and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGSEGV)
        return execute(command)

    game._env._execute = crash
    game._env.templates = ["north", "yell", "open OBJ", "put OBJ in OBJ"]
    found = game.reset().valid_actions
    assert {"north", "open mailbox"} <= set(found) and "yell" not in found
    state, _ = game.step("open mailbox")
    assert "leaflet" in state.feedback and not state.done
    assert len(caplog.messages) == 1 and "crashed Jericho's emulator" in caplog.messages[0]


# Grammar and effects ------------------------------------------------------------------------------------------------


def test_known_templates_keeps_those_whose_words_are_known():
    words = ["north", "get", "open", "mailbo", "with", "put", "lightn"]
    assert known_templates(words, word_length=6) == [
        "north",
        "get OBJ",
        "open OBJ",
        "open OBJ with OBJ",
        "get OBJ with OBJ",
    ]
    assert known_templates(["northeast"], word_length=9) == ["northeast"]
    assert known_templates(["northe"], word_length=6) == ["northeast"]
    assert known_templates([], word_length=6) == []


def test_templates_are_unique_and_have_at_most_two_objects():
    assert len(set(TEMPLATES)) == len(TEMPLATES) > 120
    assert {template.split().count("OBJ") for template in TEMPLATES} == {0, 1, 2}
    assert all(template == " ".join(template.split()) for template in TEMPLATES)


def test_fill_in_names_different_objects():
    assert fill_in("north", ["lamp"]) == ["north"]
    assert fill_in("take OBJ", ["lamp", "egg"]) == ["take lamp", "take egg"]
    assert fill_in("put OBJ in OBJ", ["lamp", "egg"]) == ["put lamp in egg", "put egg in lamp"]


def test_one_for_each_names_the_first_command_and_ignores_variables_of_the_parser():
    moved, pushed = Effect(objects=((1, 5),)), Effect(variables=((7, 1),))
    effects = {"north": moved, "go north": moved, "push button": pushed, "pull button": pushed}
    assert one_for_each(effects) == ["north", "push button"]
    same = {f"{verb} lamp": Effect(variables=((9, 3),)) for verb in ("take", "drop", "eat", "rub")}
    assert one_for_each(effects | same) == ["north", "push button"]
    different = {f"ask {name}": Effect(variables=((9, value),)) for value, name in enumerate(("joe", "sue", "bob"))}
    assert one_for_each(effects | different) == ["north", "push button"]
    assert one_for_each({"take all": Effect(variables=((9, 3),))}) == []


def test_last_words_prefers_nouns_to_what_precedes_them():
    brass, lantern, lamp = (("brass", "NOUN", "LOC"), ("lantern", "NOUN", "LOC"), ("lamp", "NOUN", "LOC"))
    assert last_words([brass, lantern, lamp], "A brass lantern is here. The lamp is on.") == [lantern, lamp]
    assert last_words([brass], "A brass lantern") == [brass]


# Score and end ------------------------------------------------------------------------------------------------------


def test_story_game_rewards_the_score_of_the_status_line():
    game = without_search(open_game(look_and_inventory=False))
    states = play(game, ["n", "n", "u"])
    assert [state.score for state in states] == [0.0] * 4
    state, reward = game.step_unchecked("take egg")
    assert (state.score, reward) == (5.0, 5.0)


def test_story_game_rewards_the_score_that_the_command_tells(tmp_path):
    path = unsupported_copy("detective.z5", tmp_path)
    game = without_search(open_game(path, look_and_inventory=False))
    plain = jericho.FrotzEnv(str(story("detective.z5")), seed=1)
    plain.reset()
    state, total = game.reset(), 0.0
    assert (state.score, state.max_score) == (10.0, 360.0)
    for command in plain.get_walkthrough():
        _, _, done, info = plain.step(command)
        state, reward = game.step_unchecked(command)
        total += reward
        assert (state.score, state.done) == (info["score"], done)
    assert (total, state.won, state.truncated, state.valid_actions) == (350.0, True, False, ())


def test_story_game_is_won_by_the_walkthrough_of_another_release():
    game = without_search(open_game(look_and_inventory=False, seed=WINNING_SEED))
    state = game.reset()
    for command in jericho.FrotzEnv(str(story("zork1.z5")), seed=0).get_walkthrough():
        assert not state.done
        state, _ = game.step_unchecked(command)
    assert state.done and state.won and not state.truncated
    assert (state.score, state.max_score) == (350.0, 350.0)


def test_story_game_ends_when_the_game_asks_what_to_do():
    game = without_search(open_game("lgop.z3", look_and_inventory=False))
    game.reset()
    game._env.frotz_lib.set_narrative_text(b"Would you like to RESTART, RESTORE or QUIT?")
    state = game._observe("You die.", score=0, moves=3)
    assert state.done and not state.won and not state.truncated and state.valid_actions == ()


def test_story_game_truncates_episodes():
    game = open_game(max_episode_steps=1)
    game.reset()
    state, _ = game.step("open mailbox")
    assert state.done and state.truncated and state.inventory == "You are empty-handed."


@pytest.mark.parametrize(
    ("name", "source", "max_score"), [("zork1.z3", "status line", 350), ("lgop.z3", "status line", 0)]
)
def test_survey_story_says_where_the_score_comes_from(name, source, max_score):
    survey = survey_story(story(name))
    assert (survey.score_source, survey.max_score) == (source, max_score)
    assert survey.num_words > 500 and 120 < survey.num_templates <= len(TEMPLATES)


@pytest.mark.parametrize(
    ("name", "source", "max_score"),
    [
        ("hhgg.z3", "status line", 400),  # prints the score after a question
        ("cutthroat.z3", "score command", 250),  # the status line has the time
        ("weapon.z5", None, 0),  # "There is no scoring in this game"
        ("trinity.z4", "score command", 100),  # the first screen waits for a key
    ],
)
def test_survey_story_understands_other_games(tmp_path, name, source, max_score):
    survey = survey_story(unsupported_copy(name, tmp_path))
    assert (survey.score_source, survey.max_score) == (source, max_score)


def test_story_game_uses_the_given_maximum_only_if_the_game_states_none():
    assert without_search(open_game("lgop.z3", max_score=316)).reset().max_score == 316.0
    assert without_search(open_game("zork1.z3", max_score=9)).reset().max_score == 350.0


# Files that are not games -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 7, 8])
def test_story_game_plays_all_versions(tmp_path, version):
    path = tmp_path / f"tiny.z{version}"
    path.write_bytes(tiny_story(version))
    game = open_game(path)
    state = game.reset()
    assert (state.feedback, state.valid_actions, state.actions_are_fallback) == ("tick", FALLBACK_ACTIONS, True)
    state, reward = game.step("wait")
    assert state.feedback == "tick"
    assert (state.score, reward) == ((1.0, 1.0) if version <= 3 else (0.0, 0.0))
    game.close()


def with_code(code: bytes) -> bytes:
    content = bytearray(tiny_story(5))
    content[0x500 : 0x500 + len(code)] = code
    content[0x1C:0x1E] = bytes(2)  # no checksum
    return bytes(content)


@pytest.mark.parametrize(
    "code",
    [
        b"\x8c\xff\xff",  # jumps to itself for ever
        b"\x00\x00\x00",  # an instruction that does not exist
        b"\xe1\x17\xff\xff\x00",  # writes out of bounds
    ],
)
def test_survey_story_refuses_a_story_that_hangs_or_crashes(tmp_path, monkeypatch, code):
    monkeypatch.setattr(module, "SURVEY_TIMEOUT_S", 2.0)
    path = tmp_path / "broken.z5"
    path.write_bytes(with_code(code))
    with pytest.raises(UserError, match="crashed, stopped or hung at the story's beginning"):
        survey_story(path)


@pytest.mark.parametrize(
    ("content", "settings", "reason"),
    [
        (b"This is a text.\n" * 9, [], "is not a Z-machine story"),
        (b"", [], "is empty"),
        (b"\x06" + tiny_story(5)[1:], [], "version 6"),
        (tiny_story(5)[:1000], [], "is truncated"),
        (with_code(b"\x00\x00\x00"), [], "crashed, stopped or hung"),
        (tiny_story(5), ["env.max_score=abc"], "env.max_score=abc must be a whole number between 0 and 1000000"),
        (tiny_story(5), ["env.max_score=-5"], "env.max_score=-5 must be"),
        (tiny_story(5), ["env.max_score=9", "eval.unseen=textworld:simple"], "name several"),
    ],
)
def test_entry_refuses_bad_stories_with_exit_code_2(tmp_path, monkeypatch, capsys, content, settings, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("priorzero.preflight.check_models", lambda settings: None)
    (tmp_path / "x.z5").write_bytes(content)
    arguments = [word for setting in settings for word in ("--set", setting)]
    assert entry.main(["--quick_test", "--env_id", "./x.z5", *arguments]) == 2
    assert reason in capsys.readouterr().err.split("error: ")[1]


@pytest.mark.slow
def test_story_game_plays_a_textworld_game_without_its_json_file(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(session_cache(tmp_path_factory)))
    shutil.copy(resolve_game("textworld:simple?seed=7").path, tmp_path / "home.z8")
    spec = resolve_game(str(tmp_path / "home.z8"))
    assert (spec.kind, spec.name) == ("story", "home.z8")
    game = make_game(spec, seed=0, max_episode_steps=9, look_and_inventory=True, drop_inert_commands=True)
    state = game.reset()
    assert (state.score, state.max_score) == (0.0, 7.0)
    assert {"open trunk", "open drawer"} <= set(state.valid_actions)
