"""The root's logits, and the steps of a search on hand-made trees; the expected values are computed by hand."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest

from priorzero.search.base import SearchNode
from priorzero.search.mcts import random_words, root_statistics, search, search_tree
from priorzero.search.root import LOGIT_FLOOR, floored_probs, mix_root_logits, root_probs
from priorzero.search.tree import (
    NO_NODE,
    NO_WORDS,
    Puct,
    add_leaves,
    backward,
    choose,
    expand,
    make_trees,
    normalise,
    select,
    simulate,
    simulate_all,
)
from priorzero.settings import SearchSettings

# With one visit, PUCT's factor is log(3) + 1.25; with three visits it is log(5) + 1.25.
CFG = SearchSettings(pb_c_base=1, pb_c_init=1.25, discount_factor=0.5, num_simulations=3)
PUCT = Puct(1.0, 1.25, 0.5)
LOGITS, PRIOR = np.log(np.array([0.5, 0.25, 0.25])), np.log(np.array([0.1, 0.1, 0.8]))


def make_tree(*prior, visit_count=1, num_actions=3):
    """One tree of at most five nodes whose root has these prior probabilities."""
    trees = make_trees([np.array(prior)], num_simulations=4, num_actions=num_actions)
    trees.visit_counts[0, 0] = visit_count
    return trees


def attach(trees, parent, position, child, *, prior=(1.0,), visit_count=0, value_sum=0.0, reward=0.0):
    """Add the node ``child`` to the only tree."""
    trees.children[0, parent, position] = child
    trees.children[0, child] = NO_NODE
    trees.num_actions[0, child] = len(prior)
    trees.prior[0, child, : len(prior)] = prior
    trees.visit_counts[0, child], trees.value_sums[0, child], trees.rewards[0, child] = visit_count, value_sum, reward


def set_path(trees, *nodes, position):
    """Let a simulation end in the last of ``nodes``, at an action."""
    trees.paths[0, : len(nodes)] = nodes
    trees.path_lengths[0], trees.positions[0] = len(nodes), position


def test_mix_root_logits_by_hand():
    mixed = mix_root_logits(LOGITS + 7, PRIOR, alpha=0.25, floor=0.0)
    assert np.exp(mixed) == pytest.approx([0.4, 0.2125, 0.3875])
    assert np.exp(mix_root_logits(LOGITS, PRIOR, alpha=1.0, floor=0.0)) == pytest.approx(np.exp(PRIOR))
    assert np.exp(mix_root_logits(LOGITS, None, alpha=0.25, floor=0.5)) == pytest.approx(np.exp(LOGITS))
    floored = mix_root_logits(LOGITS, PRIOR, alpha=1.0, floor=0.3)
    assert np.exp(floored) == pytest.approx(0.7 * np.exp(PRIOR) + 0.1)


def test_mix_root_logits_has_a_lower_bound():
    prior = np.array([0.0, -1e9, -np.inf])
    mixed = mix_root_logits(np.zeros(3), prior, alpha=1.0, floor=0.0)
    assert mixed.tolist() == [0.0, LOGIT_FLOOR, LOGIT_FLOOR]


def test_floored_probs_by_hand():
    assert floored_probs(PRIOR, floor=0.3) == pytest.approx([0.17, 0.17, 0.66])
    assert floored_probs(PRIOR, floor=0.0) == pytest.approx([0.1, 0.1, 0.8])


def test_root_probs_mixes_in_noise():
    logits = LOGITS.astype(np.float32)
    assert root_probs(logits, None, noise_weight=0.4) == pytest.approx([0.5, 0.25, 0.25])
    noise = np.array([0.0, 1.0, 0.0])
    assert root_probs(logits, noise, noise_weight=0.4) == pytest.approx([0.3, 0.55, 0.15])


@pytest.mark.parametrize(
    ("known", "values", "expected"),
    [
        ((math.inf, -math.inf), [-1.0, 0.4, 1.7], [0.0, 0.4, 1.0]),  # without two different values it only clips
        ((0.2, 0.2), [-1.0, 0.4, 1.7], [0.0, 0.4, 1.0]),
        ((2.0, 4.0), [1.0, 2.0, 2.5, 4.0, 9.0], [0.0, 0.0, 0.25, 1.0, 1.0]),
        ((1.0, 1.002), [1.002], [0.2]),  # a range below 0.01 is not stretched
    ],
)
def test_normalise_maps_the_known_range_to_zero_and_one(known, values, expected):
    trees = make_tree(1.0)
    assert trees.value_ranges.tolist() == [[math.inf, -math.inf]]
    trees.value_ranges[0] = known
    assert [normalise(trees, 0, value) for value in values] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prior", "is_root", "chosen"),
    [
        # Action 0: Q = 1 + 0.5 * 2 = 2, normalised 0.5. Action 1 has no visits and gets the mean of the Q-values:
        # at the root 2, normalised 0.5; below it (4 + 2) / 2 = 3, normalised 0.75.
        # Score of action 1 minus score of action 0: 2.859 * sqrt(3) * (p1 - p0 / 3) + 0 or 0.25.
        ((0.80, 0.20), True, 0),  # 4.953 * -0.0667 = -0.33
        ((0.80, 0.20), False, 0),  # -0.33 + 0.25
        ((0.77, 0.23), True, 0),  # 4.953 * -0.0267 = -0.13
        ((0.77, 0.23), False, 1),  # -0.13 + 0.25
        ((0.70, 0.30), True, 1),  # 4.953 * 0.0667 = 0.33
    ],
)
def test_select_weighs_prior_against_value_by_puct(prior, is_root, chosen):
    trees = make_tree(*prior, visit_count=3)
    node = 0
    if not is_root:
        node = 1
        attach(trees, 0, 0, node, prior=prior, visit_count=3)
    attach(trees, node, 0, 2, visit_count=2, value_sum=4.0, reward=1.0)
    trees.value_ranges[0] = 0.0, 4.0
    mean_q = 2.0 if is_root else 3.0
    assert select(trees, 0, node, 4.0, PUCT, NO_WORDS, 0) == (chosen, mean_q, 0)


def test_select_breaks_ties_among_the_best_action_and_later_ones_within_the_tolerance():
    # The scores are (log(3) + 1.25) * prior = 2.349 * prior. As in LightZero, an earlier action is no tie.
    trees = make_tree(0.2, 0.2 + 2e-7, 0.2, 0.2 - 1e-6, num_actions=4)
    assert select(trees, 0, 0, 0.0, PUCT, NO_WORDS, 0) == (-1, 0.0, 0)  # it needs a random number
    chosen = [select(trees, 0, 0, 0.0, PUCT, random_words(seed, count=64), 0)[0] for seed in range(40)]
    assert chosen == [random.Random(seed).choice([1, 2]) for seed in range(40)]
    assert set(chosen) == {1, 2}


def test_choose_draws_as_pythons_generator_does():
    rng, words, used = random.Random(5), random_words(5, count=400), 0
    for count in [1, 2, 3, 7, 8, 9, 1000, 1, 1, 5] * 5:
        number, used = choose(count, words, used)
        assert number == rng.choice(range(count))
    assert used > 50


def test_simulate_ends_at_the_first_action_without_a_visit():
    trees = make_tree(0.1, 0.9, visit_count=2)
    attach(trees, 0, 1, 1, prior=(0.2, 0.2, 0.6), visit_count=1)
    assert simulate(trees, 0, PUCT, NO_WORDS)
    assert (trees.paths[0, :2].tolist(), trees.path_lengths[0], trees.positions[0]) == ([0, 1], 2, 2)


def test_simulate_all_stops_at_ties_only():
    trees = make_trees([np.array([0.5, 0.5]), np.array([0.4, 0.6])], num_simulations=1, num_actions=2)
    assert simulate_all(trees, PUCT).tolist() == [False, True]
    assert trees.positions[1] == 1


def test_expand_adds_a_node():
    trees = make_tree(0.5, 0.5)
    set_path(trees, 0, position=1)
    expand(trees, 0, 1, np.array([0.125, 0.375, 0.5]), 2.5)
    assert trees.children[0, 0, :2].tolist() == [NO_NODE, 1]
    assert (trees.rewards[0, 1], trees.visit_counts[0, 1], trees.num_actions[0, 1]) == (2.5, 0, 3)
    assert trees.prior[0, 1].tolist() == [0.125, 0.375, 0.5]
    assert trees.children[0, 1].tolist() == [NO_NODE] * 3


def test_backward_adds_discounted_returns_along_the_path():
    trees = make_tree(0.5, 0.5)
    attach(trees, 0, 0, 1, prior=(0.5, 0.5), reward=1.0)
    attach(trees, 1, 1, 2, reward=2.0)
    set_path(trees, 0, 1, position=1)
    backward(trees, 0, 2, 4.0, 0.5)
    # Leaf: 4. Child: 2 + 0.5 * 4 = 4. Root: 1 + 0.5 * 4 = 3.
    assert trees.value_sums[0, :3].tolist() == [3.0, 4.0, 4.0]
    assert trees.visit_counts[0, :3].tolist() == [2, 1, 1]
    # Q-values: leaf 2 + 0.5 * 4 = 4, child 1 + 0.5 * 4 = 3, root 0 + 0.5 * 3 / 2 = 0.75.
    assert trees.value_ranges[0].tolist() == [0.75, 4.0]


def test_add_leaves_adds_one_node_to_each_tree():
    trees = make_trees([np.array([1.0]), np.array([0.5, 0.5])], num_simulations=1, num_actions=2)
    trees.path_lengths[:] = 1
    trees.positions[:] = 0, 1
    priors = np.array([[0.5, 0.5], [0.25, 0.75]])
    add_leaves(trees, 1, priors, np.array([1.0, 2.0]), np.array([3.0, 4.0]), 0.5)
    assert trees.children[:, 0].tolist() == [[1, NO_NODE], [NO_NODE, 1]]
    assert np.array_equal(trees.prior[:, 1], priors)
    assert trees.value_sums.tolist() == [[2.5, 3.0], [4.0, 4.0]]


class RewardModel:
    """All values are 0. The first step of a search gets ``reward`` for action 1; nothing else does.

    A context is the number of steps since the root.
    """

    def __init__(self, reward, *, num_actions):
        self.reward, self.num_actions = reward, num_actions

    def root_contexts(self, roots):
        return [0 for _ in roots]

    def predict(self, contexts):
        return np.zeros((len(contexts), self.num_actions), dtype=np.float32), np.zeros(len(contexts), dtype=np.float32)

    def step(self, contexts, actions):
        rewards = [self.reward if a == 1 and c == 0 else 0.0 for c, a in zip(contexts, actions, strict=True)]
        return [c + 1 for c in contexts], np.array(rewards)


def run(model, *, legal, cfg, priors=None):
    priors = priors or [np.full(len(actions), 1 / len(actions)) for actions in legal]
    return search(
        model, model.root_contexts(legal), legal_actions=[np.array(actions) for actions in legal], priors=priors,
        seeds=range(len(legal)), cfg=cfg, num_actions=model.num_actions,
    )  # fmt: skip


def test_search_of_three_simulations_by_hand():
    # 1. Action 1 has the larger prior. Its reward is 1, so the root has 0.5 * 1 / 2 = 0.25.
    # 2. Both actions have Q = 1, and sqrt(2) * 0.4 > sqrt(2) * 0.6 / 2: action 0, without a reward.
    # 3. Action 1: larger in Q and in prior. The path continues below it without further reward.
    trees = run(RewardModel(1.0, num_actions=2), legal=[(0, 1)], cfg=CFG, priors=[np.array([0.4, 0.6])])
    [root] = root_statistics(trees, discount=0.5)
    assert root.visit_counts.tolist() == [1, 2]
    assert root.value == pytest.approx((1 + 0 + 1) / 4)  # the root has one visit before the first simulation
    assert root.action_values.tolist() == [0.0, 1.0]
    assert trees.value_ranges[0].tolist() == [0.0, 1.0]
    below = [trees.children[0, child].tolist() for child in trees.children[0, 0]]
    assert below[0] == [NO_NODE, NO_NODE] and sorted(below[1]) == [NO_NODE, 3]


def test_search_keeps_visit_counts_and_values_of_nodes_and_actions_consistent():
    """A node has one visit more than its actions have together: the visit that created it."""
    trees = run(RewardModel(5.0, num_actions=3), legal=[(0, 1, 2)], cfg=SearchSettings(num_simulations=40))
    children, visits = trees.children[0], trees.visit_counts[0]
    for node in range(41):
        own = children[node][children[node] != NO_NODE]
        assert visits[node] == visits[own].sum() + 1
    assert sorted(children[children != NO_NODE]) == list(range(1, 41))
    [root] = root_statistics(trees, discount=0.97)
    assert math.isclose(trees.value_sums[0, 0], (root.action_values * root.visit_counts).sum())


def test_root_statistics_are_reward_plus_discounted_value():
    trees = make_tree(0.5, 0.25, 0.25, visit_count=4)
    trees.value_sums[0, 0] = 6.0
    attach(trees, 0, 2, 1, visit_count=2, value_sum=6.0, reward=1.0)
    attach(trees, 0, 0, 2, visit_count=1, value_sum=-4.0, reward=0.0)
    [root] = root_statistics(trees, discount=0.5)
    assert root.visit_counts.tolist() == [1, 0, 2] and root.value == 1.5
    values = root.action_values
    assert values[0] == -2.0 and math.isnan(values[1]) and values[2] == 2.5  # 0 + 0.5 * -4, and 1 + 0.5 * 3


def test_search_tree_by_hand():
    trees = make_tree(0.5, 0.25, 0.25, visit_count=5)
    attach(trees, 0, 2, 1, prior=(0.75, 0.25), visit_count=3, value_sum=6.0, reward=1.0)
    attach(trees, 0, 0, 2, visit_count=1, value_sum=4.0, reward=0.0)
    attach(trees, 1, 1, 3, visit_count=2, value_sum=2.0, reward=0.5)
    attach(trees, 3, 0, 4, visit_count=1, value_sum=8.0, reward=0.25)
    # The root's actions have other indices than positions; Q is the reward plus 0.5 times the mean value.
    third = SearchNode(action=0, prior=1.0, visit_count=1, reward=0.25, action_value=4.25)
    second = SearchNode(action=1, prior=0.25, visit_count=2, reward=0.5, action_value=1.0, children=(third,))
    first = SearchNode(action=9, prior=0.25, visit_count=3, reward=1.0, action_value=2.0, children=(second,))
    other = SearchNode(action=4, prior=0.5, visit_count=1, reward=0.0, action_value=2.0)
    legal = np.array([4, 7, 9])
    assert search_tree(trees, 0, legal_actions=legal, discount=0.5) == (other, first)
    cut = dataclasses.replace(first, children=(dataclasses.replace(second, children=()),))
    assert search_tree(trees, 0, legal_actions=legal, discount=0.5, depth=2) == (other, cut)
