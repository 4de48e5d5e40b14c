"""The learned weight of the LLM's prior at the root (``prior.alpha=auto``)."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch

from priorzero.play.player import Decision
from priorzero.play.prior_weights import BOUNDS, PriorWeights
from priorzero.search.base import SearchResult
from priorzero.search.root import NUM_BINS, entropy_bin
from priorzero.types import ActionPrior, GameState
from tests.helpers.collecting import CountingGame, collect, evaluate, make_collector

CERTAIN, UNCERTAIN = 0, NUM_BINS - 1


def decision(
    *, prior, policy, weight=0.5, visits=None, noise=None, noise_weight=0.0, chosen=0, behaviour_prob=1.0
) -> Decision:
    """A decision whose root mixes ``prior`` and ``policy``; its visits follow the root's probabilities by default."""
    prior, policy = np.array(prior), np.array(policy)
    mixture = weight * prior + (1 - weight) * policy
    noisy = mixture if noise is None else (1 - noise_weight) * mixture + noise_weight * np.array(noise)
    result = SearchResult(
        visit_counts=np.array(1000 * noisy if visits is None else visits),
        root_value=0.0,
        predicted_value=0.0,
        policy_logits=np.log(policy),
        prior_weight=weight,
        root_logits=np.log(mixture),
        root_probs=noisy,
        action_values=np.zeros(len(prior)),
    )
    return Decision(
        state=GameState("A hall.", tuple(f"act {k}" for k in range(len(prior))), 0.0, 9.0, 0),
        action_indices=np.arange(len(prior)),
        prior=ActionPrior(np.log(prior).astype(np.float32), "score", 0),
        chosen=chosen,
        behaviour_prob=behaviour_prob,
        prompt=None,
        result=result,
    )


def learned(floor: float = 0.0) -> PriorWeights:
    return PriorWeights("auto", floor=floor)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [([0.25] * 4, 3), ([0.97, 0.01, 0.01, 0.01], 0), ([0.5, 0.5 - 2e-9, 1e-9, 1e-9], 2), ([1.0], 0), ([0.5, 0.5], 3)],
)
def test_entropy_bin_by_hand(policy, expected):
    """The third policy has half of the entropy of a uniform one, or hardly more."""
    assert entropy_bin(np.log(np.array(policy))) == expected
    assert entropy_bin(np.log(np.array(policy)) + 7.0) == expected


def test_prior_weights_first_step_by_hand():
    """All visits on action 0: r = 0.5 * 0.6 / (0.5 * 0.6 + 0.5 * 0.2) = 0.75; the step is 1 / 21."""
    weights = learned()
    weights.observe(0, "game", decision(prior=[0.6, 0.4], policy=[0.2, 0.8], visits=[16, 0]), reward=0.0)
    expected = 0.5 + (0.75 - 0.5) / 21
    own = entropy_bin(np.log([0.2, 0.8]))
    assert weights.of_game("game")[own] == pytest.approx(expected, abs=1e-6)
    assert np.delete(weights.of_game("game"), own).tolist() == [0.5] * (NUM_BINS - 1)


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_prior_weights_maximise_the_likelihood_of_the_targets(share):
    """This share of the targets is drawn from the prior, the rest from the policy."""
    rng, weights = np.random.default_rng(0), learned()
    for _ in range(6000):
        prior, policy = rng.dirichlet(np.ones(5)), np.full(5, 0.2)
        target = rng.choice(5, p=prior if rng.random() < share else policy)
        alpha = weights.of_game("game")[UNCERTAIN]
        searched = decision(prior=prior, policy=policy, weight=alpha, visits=16 * np.eye(5)[target])
        weights.observe(0, "game", searched, reward=0.0)
    assert weights.of_game("game")[UNCERTAIN] == pytest.approx(share, abs=0.08)


@pytest.mark.parametrize("noise_weight", [0.0, 0.4])
def test_prior_weights_stay_if_the_search_prefers_no_action(noise_weight):
    """Visits that follow the root's probabilities, noise included, say nothing about the prior."""
    rng, weights = np.random.default_rng(1), learned()
    for _ in range(200):
        prior, policy = rng.dirichlet(np.full(6, 0.3)) * 0.99 + 0.01 / 6, rng.dirichlet(np.ones(6))
        noise = np.eye(6)[rng.choice(6, p=prior)]  # the prior's own suggestion
        weights.observe(
            0, "game", decision(prior=prior, policy=policy, noise=noise, noise_weight=noise_weight), reward=0.0
        )
    assert weights.of_game("game") == pytest.approx(np.full(NUM_BINS, 0.5), abs=1e-6)


def test_prior_weights_do_not_learn_from_visits_that_follow_the_noise_alone():
    """With search.root_noise_weight=1, the other actions have the probability 0."""
    weights, noise = learned(), [0.0, 1.0]
    searched = decision(prior=[0.3, 0.7], policy=[0.5, 0.5], noise=noise, noise_weight=1.0, visits=[2, 14])
    weights.observe(0, "game", searched, reward=0.0)
    assert weights.of_game("game").tolist() == [0.5] * NUM_BINS
    weights.observe(0, "game", searched, reward=1.0)
    assert 0.0 < weights.of_game("game")[UNCERTAIN] < 0.5  # from the points of action 0


def test_prior_weights_do_not_learn_from_the_uniform_prior_of_a_failed_request():
    weights = learned()
    searched = decision(prior=[0.5, 0.5], policy=[0.4, 0.6], visits=[16, 0])
    failed = dataclasses.replace(searched, prior=dataclasses.replace(searched.prior, source="uniform"))
    weights.observe(0, "game", failed, reward=1.0)
    assert weights.of_game("game").tolist() == [0.5] * NUM_BINS
    weights.observe(0, "game", searched, reward=0.0)
    assert weights.of_game("game")[UNCERTAIN] > 0.5


def test_prior_weights_are_bounded():
    good, bad = learned(), learned()
    for _ in range(3000):
        good.observe(0, "game", decision(prior=[0.999, 0.001], policy=[0.5, 0.5], visits=[9, 0]), reward=0.0)
        bad.observe(0, "game", decision(prior=[0.001, 0.999], policy=[0.5, 0.5], visits=[9, 0]), reward=0.0)
    assert good.of_game("game")[UNCERTAIN] > 0.9 and good.of_game("game")[UNCERTAIN] <= BOUNDS[1]
    assert bad.of_game("game")[UNCERTAIN] == BOUNDS[0]


def test_prior_weights_learn_from_commands_before_points():
    """The visits say nothing here. A command counts ten times 0.9 to the power of its distance from the points."""
    early, late = (decision(prior=[0.9, 0.1], policy=[0.5, 0.5], chosen=k, behaviour_prob=0.5) for k in (1, 0))
    weights = learned()
    weights.observe(0, "game", early, reward=0.0)
    weights.observe(1, "game", early, reward=0.0)  # another environment: no points
    assert weights.of_game("game")[UNCERTAIN] == pytest.approx(0.5)
    weights.observe(0, "game", late, reward=1.0)
    # Responsibilities: 0.45 / 0.7 for action 0, 0.05 / 0.3 for action 1; importance weights 1 and 0.3 / 0.5.
    # Counts: 3 decisions with a target of the search, then one more for each command.
    count, expected = 20.0 + 3, 0.5
    for excess, weight in ((0.45 / 0.7 - 0.5, 1.0), (0.05 / 0.3 - 0.5, 0.6 * 0.9)):
        count += 10 * weight
        expected += min(0.3, 10 * weight / count) * excess
    assert weights.of_game("game")[UNCERTAIN] == pytest.approx(expected, abs=1e-6)
    after = weights.of_game("game")[UNCERTAIN]
    weights.observe(0, "game", late, reward=0.0)
    weights.begin_episode(0)  # forgets the command
    weights.observe(0, "game", decision(prior=[0.5, 0.5], policy=[0.5, 0.5]), reward=1.0)
    assert weights.of_game("game")[UNCERTAIN] == pytest.approx(after, abs=1e-6)


def test_prior_weights_ignore_decisions_without_a_choice():
    weights = learned()
    weights.observe(0, "game", decision(prior=[1.0], policy=[1.0]), reward=1.0)
    assert weights.of_game("game").tolist() == [0.5] * NUM_BINS


def test_prior_weights_of_other_games():
    """A game that was not trained on has the mean of the games that were."""
    weights = learned()
    assert weights.of_game("new").tolist() == [0.5] * NUM_BINS
    for game, visits in (("a", [9, 0]), ("b", [0, 9])):
        for _ in range(50):
            weights.observe(0, game, decision(prior=[0.9, 0.1], policy=[0.5, 0.5], visits=visits), reward=0.0)
    a, b = weights.of_game("a")[UNCERTAIN], weights.of_game("b")[UNCERTAIN]
    assert b < 0.4 < 0.6 < a and weights.of_game("new")[UNCERTAIN] == pytest.approx((a + b) / 2)


def test_prior_weights_guide_the_exploration():
    """The exploration mixes the prior with a uniform distribution if the weight is learned."""
    prior = ActionPrior(np.log(np.array([0.8, 0.2], dtype=np.float32)), "score", 0)
    assert PriorWeights(0.25, floor=0.1).exploration_probs("game", prior) == pytest.approx([0.77, 0.23])
    assert learned(floor=0.1).exploration_probs("game", prior) == pytest.approx([0.5 * 0.77 + 0.25, 0.5 * 0.23 + 0.25])


def test_prior_weights_are_constant_if_a_number_is_given():
    weights = PriorWeights(0.25, floor=0.0)
    weights.observe(0, "game", decision(prior=[0.6, 0.4], policy=[0.2, 0.8], visits=[16, 0]), reward=3.0)
    assert weights.of_game("game").tolist() == [0.25] * NUM_BINS


def test_prior_weights_state_dict_restores_everything():
    original, restored = learned(), learned()
    first = decision(prior=[0.9, 0.1], policy=[0.5, 0.5], visits=[9, 1])
    for _ in range(5):
        original.observe(2, "game", first, reward=0.0)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for weights in (original, restored):
        weights.observe(2, "game", first, reward=1.0)
    assert restored.of_game("game").tolist() == original.of_game("game").tolist() != [0.5] * NUM_BINS
    assert restored.state_dict() == original.state_dict()


def test_prior_weights_learn_while_collecting_and_not_while_evaluating():
    """The prior favours the last action. All actions but one gain points, so points say little."""
    collector, _, player = make_collector()
    collected = collect(collector, 60)
    after = player.prior_weights.of_game("counting 0").copy()
    assert (after != 0.5).any() and ((after >= BOUNDS[0]) & (after <= BOUNDS[1])).all()
    assert collector.scalars(collected)["prior/weight_mean"] == pytest.approx(np.mean(collected.prior_weights))
    assert len(collected.prior_weights) == 60 and len(set(collected.prior_weights)) > 10
    state = player.prior_weights.state_dict()
    evaluate(player, "world_model_with_prior", games=[CountingGame(0, length=3)], episodes=1)
    assert player.prior_weights.state_dict() == state
    fixed, _, _ = make_collector(prior={"alpha": 0.25})
    assert set(collect(fixed, 12).prior_weights) == {0.25}
