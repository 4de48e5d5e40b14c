"""Tests of the states and commands of walkthroughs."""

from __future__ import annotations

import dataclasses

import pytest

from priorzero.envs import resolve_game
from priorzero.envs.walkthrough_steps import WalkthroughStep, read_steps, write_steps
from priorzero.envs.walkthroughs import collect_walkthrough, evenly, spread, write_out
from priorzero.types import UserError
from tests.helpers.game_files import story

STEP = WalkthroughStep(
    game="zork1",
    step=3,
    goal="",
    feedback="Taken.",
    look="Kitchen\nA table.",
    inventory="A lamp – lit.",
    score=10.0,
    max_score=350.0,
    moves=3,
    reward=5.0,
    command="x lamp",
    action="examine lamp",
    valid_actions=("north", "take lamp"),
)


@pytest.mark.parametrize(
    ("command", "want"),
    [
        ("N", "north"),
        ("x lamp", "examine lamp"),
        ("GET  LAMP", "take lamp"),
        ("get in boat", "get in boat"),
        ("pick up the lamp", "take the lamp"),
        ("z", "wait"),
        ("l under rug", "look under rug"),
        ("Turn bolt with wrench", "turn bolt with wrench"),
        ("", ""),
    ],
)
def test_write_out_replaces_abbreviations(command, want):
    assert write_out(command) == want


def test_evenly_and_spread_cover_the_walkthrough():
    assert evenly(10, count=2) == [2, 7] and evenly(2, count=5) == [0, 1] and evenly(0, count=3) == []
    assert spread(1) == [0] and spread(5) == [0, 4, 2, 1, 3]
    assert sorted(spread(100)) == list(range(100))
    assert all(min(abs(a - b) for b in spread(100)[:8]) <= 16 for a in range(100))


def test_write_steps_and_read_steps_are_inverse(tmp_path):
    steps = [STEP, dataclasses.replace(STEP, valid_actions=None), dataclasses.replace(STEP, correct=1)]
    write_steps(tmp_path / "zork1.jsonl", steps)
    assert list(read_steps(tmp_path / "zork1.jsonl")) == steps
    assert [file.name for file in tmp_path.iterdir()] == ["zork1.jsonl"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"valid_actions": 3}', '{"game": "zork1"}'])
def test_read_steps_names_a_damaged_file(tmp_path, text):
    (tmp_path / "zork1.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"zork1\.jsonl: is not a file of walkthrough steps.*delete it"):
        list(read_steps(tmp_path / "zork1.jsonl"))


def test_state_and_history_step_are_what_an_agent_sees():
    state, decision = STEP.state(), STEP.history_step()
    assert state.valid_actions == ("north", "take lamp") and state.room == "Kitchen"
    assert (decision.action, decision.reward, decision.place) == ("examine lamp", 5.0, state.place)
    assert dataclasses.replace(STEP, valid_actions=None).state().valid_actions == ("examine lamp",)


def test_collect_walkthrough_of_a_generated_game_wins_it():
    steps = collect_walkthrough(resolve_game("textworld:simple?seed=7"))
    assert sum(step.reward for step in steps) == steps[0].max_score
    assert all(step.valid_actions[step.correct] == step.action == step.command for step in steps)
    assert steps[0].goal and steps[0].look and [step.step for step in steps] == list(range(len(steps)))


@pytest.mark.slow
def test_collect_walkthrough_finds_the_action_with_the_effect_of_the_command():
    spec = resolve_game(story("detective.z5"))
    steps = collect_walkthrough(spec, max_states=10)
    searched = [step for step in steps if step.valid_actions is not None]
    assert len(steps) == 51 and len(searched) == 10
    assert all(step.action == step.valid_actions[step.correct] for step in searched if step.correct is not None)
    assert sum(step.correct is not None for step in searched) >= 9
    first = next(step for step in searched if step.command == "DROP PAPER")
    assert first.action == "put paper down"  # Jericho's valid actions do not have "drop paper"
    assert steps[-1].score + steps[-1].reward == 360
    assert {step.action for step in steps} >= {"north", "west", "take gun"}


@pytest.mark.slow
def test_collect_walkthrough_without_time_keeps_all_commands():
    steps = collect_walkthrough(resolve_game(story("detective.z5")), seconds=0)
    assert len(steps) == 51 and all(step.valid_actions is None for step in steps[1:])
