"""Tests of the removal of loops from a history."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from priorzero.envs.history import without_loops
from priorzero.types import GameState, HistoryStep


def make_history(places, rewards=None):
    """One decision per letter of ``places``; its action is its index."""
    rewards = rewards or [0.0] * len(places)
    return [HistoryStep("", str(t), reward, (p,)) for t, (p, reward) in enumerate(zip(places, rewards, strict=True))]


def state_at(place):
    return GameState(place, ("wait",), 0.0, 10.0, 0)


def kept_actions(history, place):
    return "".join(step.action for step in without_loops(history, now=state_at(place)))


def test_without_loops_removes_decisions_that_led_back():
    assert kept_actions(make_history("abc"), "d") == "012"
    assert kept_actions(make_history("abcb"), "d") == "03"  # decisions 1 and 2 went from b to c and back to b
    assert kept_actions(make_history("abc"), "a") == ""
    assert kept_actions(make_history("aab"), "b") == "1"
    assert kept_actions(make_history("abca"), "b") == "3"  # a loop within a loop


def test_without_loops_keeps_a_loop_that_earned_a_reward():
    assert kept_actions(make_history("abab", [0, 1, 0, 0]), "c") == "0123"


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=12), st.sampled_from("abcd"))
def test_without_loops_keeps_rewards_and_visits_each_place_once_between_them(steps, place):
    history = [HistoryStep("", str(t), float(rewarded), (p,)) for t, (p, rewarded) in enumerate(steps)]
    state = state_at(place)
    kept = without_loops(history, now=state)
    assert kept == [step for step in history if step in kept]
    assert [step for step in kept if step.reward] == [step for step in history if step.reward]
    intervals, places = [], []  # the places between two rewards
    for step in kept:
        places.append(step.place)
        if step.reward:
            intervals.append(places)
            places = []
    for interval in [*intervals, [*places, state.place]]:
        assert len(set(interval)) == len(interval)
    assert without_loops(kept, now=state) == kept
