"""The search over the world model: what determines its result, and LightZero's trees as the reference."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from priorzero.runtime.quiet import quiet
from tests.helpers.lightzero_search import lightzero_search
from tests.helpers.world_models import make_root, make_search_policy, zero_heads

with quiet():
    from lzero.mcts.ctree.ctree_muzero import mz_tree

NUM_ACTIONS = 12


@pytest.fixture(scope="module")
def policy():
    """Shared by tests that leave it as it is."""
    return make_search_policy()


def assert_same(a, b):
    assert a.visit_counts.tolist() == b.visit_counts.tolist()
    assert a.root_value == pytest.approx(b.root_value, abs=1e-5)
    assert a.predicted_value == pytest.approx(b.predicted_value, abs=1e-5)
    assert a.root_logits == pytest.approx(b.root_logits, abs=1e-5)


def test_search_of_a_root_does_not_depend_on_other_roots(policy):
    roots = [make_root(s, length=1 + s % 4, legal=range(2 + s), noise=s % 2 == 0) for s in range(6)]
    together = policy.search(roots, num_actions=NUM_ACTIONS)
    for i in (5, 0, 3, 1):
        assert_same(policy.search([roots[i]], num_actions=NUM_ACTIONS)[0], together[i])
    reverse = policy.search(roots[::-1], num_actions=NUM_ACTIONS)
    for a, b in zip(together, reverse[::-1], strict=True):
        assert_same(a, b)
    assert len({tuple(r.visit_counts) for r in together}) > 1


def test_search_does_not_depend_on_earlier_searches_or_parameters():
    policy = make_search_policy()
    root = make_root(1, length=3)
    first = policy.search([root], num_actions=NUM_ACTIONS)[0]
    state = {name: tensor.clone() for name, tensor in policy.world_model_state().items()}
    for s in range(5):
        policy.search([make_root(s, length=2)], num_actions=NUM_ACTIONS)
    with torch.no_grad():
        for p in policy.network.parameters():
            p += 0.5
    random.seed(123)
    other = policy.search([root], num_actions=NUM_ACTIONS)[0]
    policy.load_world_model_state(state)
    again = policy.search([root], num_actions=NUM_ACTIONS)[0]
    assert_same(first, again)
    assert first.root_value != pytest.approx(other.root_value, abs=1e-3)


def test_search_breaks_ties_by_the_seed_of_the_root():
    policy = make_search_policy()
    zero_heads(policy, "policy", "value", "rewards")  # every choice is a tie
    root = make_root(7, legal=range(10))
    roots = (root, root, dataclasses.replace(root, seed=8))
    runs = [policy.search([r], num_actions=NUM_ACTIONS)[0].visit_counts.tolist() for r in roots]
    assert runs[0] == runs[1] != runs[2]


def test_search_leaves_the_global_generator_alone(policy):
    random.seed(5)
    expected = random.Random(5).random()
    policy.search([make_root()], num_actions=NUM_ACTIONS)
    assert random.random() == expected


def test_search_takes_only_actions_of_the_vocabulary_below_the_root(policy, monkeypatch):
    taken = []
    step = policy.inference.step

    def recording_step(contexts, actions):
        taken.extend(actions.tolist())
        return step(contexts, actions)

    monkeypatch.setattr(policy.inference, "step", recording_step)
    policy.search([make_root(s, legal=(0, 1, 2)) for s in range(4)], num_actions=6)
    assert len(taken) == 4 * 16 and set(taken) <= set(range(6)) and max(taken) > 2


@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
def test_search_visits_the_action_that_the_prior_favours(prior_weight):
    policy = make_search_policy(num_simulations=32)
    zero_heads(policy, "value", "rewards")  # the visits follow the root logits
    for favourite in range(4):
        prior = np.full(4, 0.01)
        prior[favourite] = 0.97
        root = make_root(prior=prior, prior_weight=prior_weight)
        result = policy.search([root], num_actions=NUM_ACTIONS)[0]
        assert result.visit_counts.argmax() == favourite and result.prior_weight == prior_weight
        if prior_weight == 1.0:
            assert np.exp(result.root_logits) == pytest.approx(prior, rel=1e-3)
            assert result.visit_counts[favourite] > 25


def test_search_gives_each_valid_action_its_own_prior_whatever_its_index():
    policy = make_search_policy()
    prior = [0.1, 0.2, 0.3, 0.4]
    for legal in ((0, 3, 5, 9), (9, 5, 3, 0), (11, 0, 10, 1)):
        result = policy.search([make_root(legal=legal, prior=prior, prior_weight=1.0)], num_actions=NUM_ACTIONS)[0]
        assert np.exp(result.root_logits) == pytest.approx(prior, rel=1e-3)


@pytest.mark.parametrize("ties", [False, True])
def test_search_equals_lightzeros_python_tree_in_every_digit(ties):
    policy = make_search_policy(num_simulations=40)
    if ties:
        zero_heads(policy, "policy", "value", "rewards")
    rng, results = np.random.default_rng(0), set()
    for seed in range(10):
        root = make_root(
            seed,
            length=1 + seed % 4,
            legal=range(11 - seed, -1, -1),
            prior=None if ties or seed % 3 == 0 else rng.dirichlet(np.ones(12 - seed)),
            noise=seed % 2 == 0,
        )
        [ours] = policy.search([root], num_actions=NUM_ACTIONS)
        result = ours.visit_counts.tolist(), ours.root_value
        assert result == lightzero_search(policy, root, num_actions=NUM_ACTIONS)
        results.add(tuple(result[0]))
    assert len(results) == 10


def test_lightzeros_cpp_tree_still_ignores_the_prior_at_the_first_visit_of_a_node():
    """Its PUCT score multiplies the prior by the square root of the earlier visits, which is 0 there."""
    actions = set()
    for _ in range(60):
        roots, stats = mz_tree.Roots(1, [[0, 1, 2, 3]]), mz_tree.MinMaxStatsList(1)
        roots.prepare_no_noise([0.0], [np.log([0.97, 0.01, 0.01, 0.01]).tolist()], [-1])
        _, _, [action], _ = mz_tree.batch_traverse(roots, 19652, 1.25, 0.97, stats, mz_tree.ResultsWrapper(num=1), [-1])
        actions.add(action)
    assert len(actions) > 1


def test_search_returns_its_tree_only_if_the_root_asks(policy, monkeypatch):
    root = make_root(2, length=2)
    asking = dataclasses.replace(root, with_tree=True)
    result, other = policy.search([asking, root], num_actions=NUM_ACTIONS)
    assert_same(result, other)
    assert other.tree is None
    by_action = {node.action: node for node in result.tree}
    for k, action in enumerate(root.legal_actions.tolist()):
        count = result.visit_counts[k]
        assert (action in by_action) == (count > 0)
        if count:
            node = by_action[action]
            assert (node.visit_count, node.action_value) == (count, pytest.approx(result.action_values[k]))
            assert node.prior == pytest.approx(result.root_probs[k])
            # One simulation created the node; each of the others went through one of its children.
            assert sum(child.visit_count for child in node.children) == count - 1
    depths = [len(result.tree[0].children), *(len(child.children) for node in result.tree for child in node.children)]
    assert sum(depths) > 0
    monkeypatch.setattr("priorzero.search.mcts.search_tree", None)  # it costs nothing otherwise
    assert_same(policy.search([root], num_actions=NUM_ACTIONS)[0], other)
