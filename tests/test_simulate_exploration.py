"""The simulation of how many attempts the exploration needs (``scripts/simulate_exploration.py``)."""

from __future__ import annotations

import numpy as np
import pytest
import simulate_exploration
from simulate_exploration import FINDS, attempts, means

from priorzero.pretraining.evaluation import Outcome


def simulate(probs, correct, *, power, repeats=1) -> list[float]:
    rng = np.random.default_rng(0)
    return attempts(np.array(probs), correct, power=power, repeats=repeats, rng=rng).tolist()


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_attempts_match_the_sum_over_misses_of_two_equal_actions(power):
    """After i misses, the other action has the weight (1 + i)^(-2 power), and the right one has 1."""
    expected, missed = 0.0, 1.0
    for i in range(50):
        expected += missed
        missed *= 1.0 / (1.0 + (1.0 + i) ** (2.0 * power))
    assert simulate([0.5, 0.5], 0, power=power, repeats=4000)[0] == pytest.approx(expected, abs=0.05)


def test_attempts_follow_the_order_of_the_prior_if_the_power_is_large():
    """Weights by count: 0.5, 0.125; 0.3, 0.075; 0.2, 0.05, 0.022. So the order is 0 1 2 0 1 0 2 ..."""
    assert simulate([0.5, 0.3, 0.2], 0, power=60.0)[:2] == [1, 4]
    assert simulate([0.5, 0.3, 0.2], 1, power=60.0)[:2] == [2, 5]
    assert simulate([0.5, 0.3, 0.2], 2, power=60.0)[:2] == [3, 7]


def test_attempts_of_a_single_action():
    assert simulate([1.0], 0, power=1.0) == list(range(1, FINDS + 1))


def test_means_are_over_the_states_of_a_game_then_over_the_games(monkeypatch):
    """Games with 1 and 4 attempts in two states, and with 2 in one: (2.5 + 2) / 2 and (sqrt(1 * 4) + 2) / 2."""
    needed = {0: 1.0, 1: 4.0, 2: 2.0}

    def fixed(probs, correct, **_) -> np.ndarray:
        assert probs.tolist() == pytest.approx([0.75 * 0.8 + 0.25 / 3, 0.75 * 0.1 + 0.25 / 3, 0.75 * 0.1 + 0.25 / 3])
        return np.full(FINDS, needed[correct])

    monkeypatch.setattr(simulate_exploration, "attempts", fixed)
    logprobs = np.log(np.array([0.8, 0.1, 0.1]))
    outcomes = [Outcome("a", logprobs, 0), Outcome("a", logprobs, 1), Outcome("b", logprobs, 2)]
    arithmetic, geometric = means(outcomes, weight=0.75, power=1, repeats=1, rng=np.random.default_rng(0))
    assert arithmetic == pytest.approx(np.full(FINDS, 2.25)) and geometric == pytest.approx(np.full(FINDS, 2.0))
