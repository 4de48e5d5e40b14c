"""Decisions: what the search is given, and how an action is chosen from its result."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from loguru import logger

from priorzero.play.exploration import RootNoise
from priorzero.search.base import SearchResult
from priorzero.types import ActionChoice
from tests.helpers.collecting import FIRST_ROOM, make_player, state_of

STATE = state_of(0, FIRST_ROOM, moves=0, length=9)  # three valid actions; the engine's prior is 0.05, 0.05, 0.9


class FixedSearch:
    """A policy whose search always has the same visit counts.

    Attributes:
        roots: all roots that it was given.
    """

    def __init__(self, *visits: int) -> None:
        self.visits = np.array(visits, dtype=np.int64)
        self.roots = []

    def search(self, roots, *, num_actions):
        self.roots += roots
        zeros, uniform = np.zeros(3), np.full(3, 1 / 3)
        return [SearchResult(self.visits, 0.0, 0.0, zeros, 0.5, zeros, uniform, zeros) for _ in roots]


class FixedNoise:
    """An exploration strategy that always gives the same noise."""

    def __init__(self, *probs: float, only: Sequence[bool] | None = None) -> None:
        self.noise = RootNoise(np.array(probs), only=None if only is None else np.array(only))

    def root_noise(self, env, state, prior_probs, *, rng):
        return self.noise


def decide(player, *, times=1, state=STATE, **arguments):
    """Decisions in one state, each in an episode of its own."""
    episodes = [player.new_episode(e, state, game="counting", rng=np.random.default_rng(e)) for e in range(times)]
    return asyncio.run(player.decide(episodes, **arguments))


def with_search(*visits, **changes):
    player = make_player(**changes)
    player.policy = FixedSearch(*visits)
    return player


def test_player_roots_hold_the_prior_and_the_noise():
    player = with_search(1, 2, 3)
    exploration = FixedNoise(0.2, 0.3, 0.5)
    (explored,) = decide(player, exploration=exploration, sample=True)
    decide(player)
    decide(player, use_prior=False)
    noisy, plain, without_prior = player.policy.roots
    assert noisy.noise.tolist() == [0.2, 0.3, 0.5] and noisy.seed != 0
    assert plain.noise is None and plain.seed == 0
    assert noisy.prior_logprobs is explored.prior.logprobs
    assert plain.prior_logprobs.argmax() == 2 and without_prior.prior_logprobs is None
    assert noisy.legal_actions.tolist() == player.indexer.indices(STATE.valid_actions).tolist()


def test_player_roots_hold_the_latest_observations():
    """With context_length=4 these are two observations and the action between them."""
    player = with_search(1, 2, 3)
    episode = player.new_episode(0, STATE, game="counting", rng=np.random.default_rng(0))
    for moves in (1, 2, 3):
        state = state_of(0, FIRST_ROOM, moves=moves, length=9)
        indices = player.indexer.indices(STATE.valid_actions)
        choice = ActionChoice(state=STATE, action_indices=indices, prior=None, chosen=moves - 1)
        episode.advance(choice, reward=1.0, state=state, features=player.features([state])[0])
    asyncio.run(player.decide([episode]))
    (root,) = player.policy.roots
    assert root.features[:, 1].tolist() == [2.0, 3.0] and root.actions.tolist() == [indices[2]]
    assert episode.total_reward == 3.0 and len(episode.history) == 3


@pytest.mark.parametrize(
    ("visits", "only", "expected"),
    [
        ((1, 4, 0), None, (1 / 3, 2 / 3, 0)),  # temperature 2: square roots
        ((1, 4, 9), (True, True, False), (1 / 3, 2 / 3, 0)),
        ((1, 4, 9), (True, False, False), (1, 0, 0)),
        ((0, 4, 0), (True, False, True), (2 / 7, 0, 5 / 7)),  # none of them was visited: the noise
    ],
)
def test_player_samples_in_proportion_to_visits_to_the_inverse_temperature(visits, only, expected):
    player = with_search(*visits, search={"temperature": 2.0})
    decisions = decide(player, times=2000, exploration=FixedNoise(0.2, 0.3, 0.5, only=only), sample=True)
    counts = Counter(d.chosen for d in decisions)
    assert [counts[k] / 2000 for k in range(3)] == pytest.approx(expected, abs=0.03)
    assert all(d.behaviour_prob == pytest.approx(expected[d.chosen]) for d in decisions)


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ({}, 1),
        ({"use_search": False}, 2),
        ({"use_search": False, "use_prior": False}, 0),
        ({"exploration": FixedNoise(0.2, 0.3, 0.5), "sample": True}, 1),  # at a small temperature
    ],
)
def test_player_takes_the_best_action_without_sampling(arguments, chosen):
    """By the visits, by the prior without a search, or the first action without either."""
    decisions = decide(with_search(19, 20, 1, search={"temperature": 1e-4}), times=9, **arguments)
    assert {(d.chosen, d.behaviour_prob) for d in decisions} == {(chosen, 1.0)}
    assert {d.action_text for d in decisions} == {f"act {FIRST_ROOM} {chosen}"}


@pytest.mark.parametrize(("use_prior", "expected"), [(True, [0.05, 0.05, 0.9]), (False, [1 / 3] * 3)])
def test_player_samples_from_the_prior_or_uniformly_without_a_search(use_prior, expected):
    decisions = decide(make_player(), times=2000, sample=True, use_search=False, use_prior=use_prior)
    counts = Counter(d.chosen for d in decisions)
    assert [counts[k] / 2000 for k in range(3)] == pytest.approx(expected, abs=0.03)
    assert all(d.behaviour_prob == pytest.approx(expected[d.chosen]) for d in decisions)
    assert all(d.result is None and (d.prior is not None) == use_prior for d in decisions)


def test_player_considers_only_actions_that_have_an_index():
    player = make_player(env={"action_space_size": 2})
    (decision,) = decide(player, use_search=False)
    assert decision.state.valid_actions == STATE.valid_actions[:2] and len(decision.action_indices) == 2
    assert decision.prior.logprobs.shape == (2,) and player.indexer.num_overflows == 1


def test_player_warns_once_of_prompts_that_are_too_long():
    player, messages = make_player(llm={"prompt_max_len": 64}), []
    long = dataclasses.replace(STATE, feedback="word " * 100)
    handler = logger.add(messages.append, level="WARNING")
    for _ in range(2):
        (decision,) = decide(player, state=long, use_search=False)
        assert decision.prompt.over_length
    logger.remove(handler)
    assert len(messages) == 1 and "llm.prompt_max_len=64" in messages[0]
