"""The root's logits, and the steps of a search on hand-made trees; the expected values are computed by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from priorzero.search.mcts import Edge, backward, expand, search, select, simulate
from priorzero.search.root import LOGIT_FLOOR, floored_probs, mix_root_logits, root_probs
from priorzero.search.tree import MinMaxStats, Node, Tree
from priorzero.settings import SearchSettings

# With one visit, PUCT's factor is log(3) + 1.25; with three visits it is log(5) + 1.25.
CFG = SearchSettings(pb_c_base=1, pb_c_init=1.25, discount_factor=0.5, num_simulations=3)
RNG = random.Random(0)
LOGITS, PRIOR = np.log(np.array([0.5, 0.25, 0.25])), np.log(np.array([0.1, 0.1, 0.8]))


class RecordingRandom(random.Random):
    """Remembers what it was to choose from, and chooses the first."""

    def choice(self, seq):
        self.choices = list(seq)
        return seq[0]


def make_node(*prior, visit_count=0, value_sum=0.0, reward=0.0, index=0):
    """A node with these prior probabilities; its actions have the vocabulary indices 10, 11, ..."""
    actions = 10 + np.arange(len(prior))
    return Node(np.array(prior), actions, index=index, reward=reward, visit_count=visit_count, value_sum=value_sum)


def attach(parent, position, child):
    parent.children[position] = child
    parent.child_visits[position] = child.visit_count
    return child


def test_mix_root_logits_by_hand():
    mixed = mix_root_logits(LOGITS + 7, PRIOR, combine="mix", alpha=0.25, floor=0.0)
    assert np.exp(mixed) == pytest.approx([0.4, 0.2125, 0.3875])
    assert np.exp(mix_root_logits(LOGITS, PRIOR, combine="replace", alpha=0.25, floor=0.0)) == pytest.approx(
        np.exp(PRIOR)
    )
    assert np.exp(mix_root_logits(LOGITS, None, combine="mix", alpha=0.25, floor=0.5)) == pytest.approx(np.exp(LOGITS))
    floored = mix_root_logits(LOGITS, PRIOR, combine="replace", alpha=0.25, floor=0.3)
    assert np.exp(floored) == pytest.approx(0.7 * np.exp(PRIOR) + 0.1)


def test_mix_root_logits_has_a_lower_bound():
    prior = np.array([0.0, -1e9, -np.inf])
    mixed = mix_root_logits(np.zeros(3), prior, combine="replace", alpha=1.0, floor=0.0)
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
        ([], [-1.0, 0.4, 1.7], [0.0, 0.4, 1.0]),  # without two different values it only clips
        ([0.2], [-1.0, 0.4, 1.7], [0.0, 0.4, 1.0]),
        ([3.0, 2.0, 4.0], [1.0, 2.0, 2.5, 4.0, 9.0], [0.0, 0.0, 0.25, 1.0, 1.0]),
        ([1.0, 1.002], [1.002], [0.2]),  # a range below 0.01 is not stretched
    ],
)
def test_min_max_stats_map_the_known_range_to_zero_and_one(known, values, expected):
    stats = MinMaxStats()
    for value in known:
        stats.update(value)
    assert [stats.normalise(value) for value in values] == pytest.approx(expected)


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
    node = make_node(*prior, visit_count=3)
    attach(node, 0, make_node(1.0, visit_count=2, value_sum=4.0, reward=1.0))
    stats = MinMaxStats(minimum=0.0, maximum=4.0)
    mean_q = 2.0 if is_root else 3.0
    assert select(node, stats, parent_q=4.0, is_root=is_root, cfg=CFG, rng=RNG) == (chosen, mean_q)


def test_select_breaks_ties_among_the_best_action_and_later_ones_within_the_tolerance():
    # The scores are (log(3) + 1.25) * prior = 2.349 * prior. As in LightZero, an earlier action is no tie.
    rng = RecordingRandom()
    node = make_node(0.2, 0.2 + 2e-7, 0.2, 0.2 - 1e-6, visit_count=1)
    assert select(node, MinMaxStats(), parent_q=0.0, is_root=True, cfg=CFG, rng=rng)[0] == 1
    assert rng.choices == [1, 2]


def test_simulate_ends_at_the_first_action_without_a_visit():
    root = make_node(0.1, 0.9, visit_count=2)
    child = attach(root, 1, make_node(0.2, 0.2, 0.6, visit_count=1, index=1))
    path = simulate(Tree(root), cfg=CFG, rng=RNG)
    assert [(edge.node is node, edge.position) for edge, node in zip(path, (root, child), strict=True)] == [
        (True, 1), (True, 2),
    ]  # fmt: skip
    assert [edge.action_index for edge in path] == [11, 12]


def test_expand_adds_a_node_with_the_softmax_of_its_logits():
    tree = Tree(make_node(0.5, 0.5, visit_count=1))
    logits = np.log(np.array([1.0, 3.0, 4.0], dtype=np.float32))
    leaf = expand(tree, Edge(tree.root, 1), actions=np.arange(3), policy_logits=logits, reward=2.5)
    assert tree.root.children == {1: leaf} and tree.num_nodes == 2
    assert (leaf.index, leaf.reward, leaf.visit_count) == (1, 2.5, 0)
    assert leaf.prior == pytest.approx([0.125, 0.375, 0.5])
    assert leaf.child_visits.tolist() == [0, 0, 0]


def test_backward_adds_discounted_returns_along_the_path():
    tree = Tree(make_node(0.5, 0.5, visit_count=1))
    child = attach(tree.root, 0, make_node(0.5, 0.5, reward=1.0))
    leaf = attach(child, 1, make_node(1.0, reward=2.0))
    backward(tree, [Edge(tree.root, 0), Edge(child, 1)], leaf, value=4.0, discount=0.5)
    # Leaf: 4. Child: 2 + 0.5 * 4 = 4. Root: 1 + 0.5 * 4 = 3.
    assert [(node.value_sum, node.visit_count) for node in (leaf, child, tree.root)] == [(4.0, 1), (4.0, 1), (3.0, 2)]
    assert tree.root.child_visits.tolist() == [1, 0] and child.child_visits.tolist() == [0, 1]
    # Q-values: leaf 2 + 0.5 * 4 = 4, child 1 + 0.5 * 4 = 3, root 0 + 0.5 * 3 / 2 = 0.75.
    assert (tree.stats.minimum, tree.stats.maximum) == (0.75, 4.0)
    assert tree.visit_counts.tolist() == [1, 0]


class RewardModel:
    """All values are 0. The first step of a search gets ``reward`` for action 1; nothing else does."""

    def __init__(self, reward, *, num_actions):
        self.reward, self.num_actions = reward, num_actions

    def root_contexts(self, roots):
        return [torch.zeros(1, 1) for _ in roots]

    def predict(self, contexts):
        return np.zeros((len(contexts), self.num_actions), dtype=np.float32), np.zeros(len(contexts), dtype=np.float32)

    def step(self, contexts, actions):
        rewards = [self.reward if a == 1 and len(c) == 1 else 0.0 for c, a in zip(contexts, actions, strict=True)]
        return [torch.cat([c, torch.zeros(1, 1)]) for c in contexts], np.array(rewards)


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
    [tree] = run(RewardModel(1.0, num_actions=2), legal=[(0, 1)], cfg=CFG, priors=[np.array([0.4, 0.6])])
    assert tree.visit_counts.tolist() == [1, 2] and tree.num_nodes == 4
    assert tree.root.value == pytest.approx((1 + 0 + 1) / 4)  # the root has one visit before the first simulation
    assert (tree.stats.minimum, tree.stats.maximum) == (0.0, 1.0)
    assert tree.root.children[1].children.keys() <= {0, 1} and tree.root.children[0].children == {}


def test_search_keeps_visit_counts_and_values_of_nodes_and_actions_consistent():
    """A node has one visit more than its actions have together: the visit that created it."""
    [tree] = run(RewardModel(5.0, num_actions=3), legal=[(0, 1, 2)], cfg=SearchSettings(num_simulations=40))
    nodes = [tree.root]
    for node in nodes:
        assert node.visit_count == node.child_visits.sum() + 1
        assert all(node.child_visits[k] == child.visit_count for k, child in node.children.items())
        nodes += node.children.values()
    assert sorted(node.index for node in nodes) == list(range(41))
    assert math.isclose(tree.root.value_sum, sum(
        (child.reward + 0.97 * child.value) * child.visit_count for child in tree.root.children.values()
    ))  # fmt: skip


def test_tree_action_values_are_reward_plus_discounted_value():
    root = make_node(0.5, 0.25, 0.25, visit_count=4)
    attach(root, 2, make_node(1.0, visit_count=2, value_sum=6.0, reward=1.0))
    attach(root, 0, make_node(1.0, visit_count=1, value_sum=-4.0, reward=0.0))
    values = Tree(root).action_values(discount=0.5)
    assert values[0] == -2.0 and math.isnan(values[1]) and values[2] == 2.5  # 0 + 0.5 * -4, and 1 + 0.5 * 3
