"""Counts of actions and feedback, and the reward shaping that uses them."""

from __future__ import annotations

import dataclasses

import pytest

from priorzero.play.novelty import NoveltyCounts, shaped_reward
from tests.helpers.collecting import collect, make_collector, records_of, state_of
from tests.helpers.models import make_settings

BEFORE, AFTER = state_of(0, 1, moves=8, length=99), state_of(0, 2, moves=9, length=99)


def shape(counts, *, before=BEFORE, action="act 1 0", after=AFTER, **train):
    cfg = make_settings({"train": {"novelty_bonus": 0.5, **train}}).train
    counts.add(before=before, action=action, after=after, with_feedback=cfg.novelty_of == "feedback")
    return shaped_reward(counts, before=before, action=action, after=after, cfg=cfg)


def test_shaped_reward_falls_with_the_square_root_of_the_actions_count():
    counts = NoveltyCounts()
    assert [shape(counts) for _ in range(3)] == pytest.approx([0.5, 0.5 / 2**0.5, 0.5 / 3**0.5])
    assert shape(counts, action="act 1 1") == 0.5  # another action
    assert shape(counts, before=dataclasses.replace(BEFORE, score=7.0)) == 0.5  # the same action with another score
    assert shape(counts, before=dataclasses.replace(BEFORE, feedback="elsewhere")) == 0.5  # in another room


def test_shaped_reward_falls_with_the_square_root_of_the_feedbacks_count():
    counts = NoveltyCounts()
    rewards = [shape(counts, action=f"act 1 {k}", novelty_of="feedback") for k in range(3)]
    assert rewards == pytest.approx([0.5, 0.5 / 2**0.5, 0.5 / 3**0.5])  # other actions, the same feedback
    other = dataclasses.replace(AFTER, feedback="something else")
    assert shape(counts, after=other, novelty_of="feedback") == 0.5


@pytest.mark.parametrize("novelty_of", ["action", "feedback"])
def test_shaped_reward_always_counts_the_action(novelty_of):
    """Go-Explore depends on these counts."""
    counts = NoveltyCounts()
    for action in ("act 1 0", "act 1 1", "act 1 1"):
        shape(counts, action=action, novelty_of=novelty_of)
    assert BEFORE.valid_actions == ("act 1 0", "act 1 1", "act 1 2")
    room, score = BEFORE.room, BEFORE.score
    assert counts.actions == {(room, score, "act 1 0"): 1, (room, score, "act 1 1"): 2}
    shape(counts, before=dataclasses.replace(BEFORE, score=7.0), novelty_of=novelty_of)
    assert counts.actions[room, 7.0, "act 1 0"] == 1 and counts.actions[room, score, "act 1 0"] == 1


@pytest.mark.parametrize(
    ("novelty_of", "end", "reward"),
    [
        ("action", {"won": True}, 0.5),
        ("action", {"truncated": True}, 0.5),
        ("action", {}, 0.5 - 2.0),
        ("feedback", {"won": True}, 0.0),  # there is no bonus for the last feedback of a game
        ("feedback", {"truncated": True}, 0.5),
        ("feedback", {}, -2.0),
    ],
)
def test_shaped_reward_penalises_only_a_lost_game(novelty_of, end, reward):
    counts, after = NoveltyCounts(), dataclasses.replace(AFTER, done=True, **end)
    assert shape(counts, after=after, novelty_of=novelty_of, loss_penalty=2.0) == reward
    assert shape(counts, action="act 1 1", loss_penalty=2.0) == 0.5


def test_collector_stores_the_shaped_reward():
    collector, _, _ = make_collector(num_games=1, length=4, train={"novelty_bonus": 0.5, "loss_penalty": 2.0})
    records, taken = records_of(collect(collector, 60)), {}
    for record in records:  # in this game the score says which room it is, and no episode is won
        key = record.state.score, record.action_text
        taken[key] = taken.get(key, 0) + 1
        assert record.shaping == pytest.approx(0.5 / taken[key] ** 0.5 - (2.0 if record.done else 0.0))
    assert records[0].shaping == 0.5 and max(taken.values()) > 1
    without_bonus, _, _ = make_collector(num_games=1, length=2)
    assert {record.shaping for record in records_of(collect(without_bonus, 10))} == {0.0}
