"""MCTS with a learned model, as in MuZero (Schrittwieser et al. 2020, appendix B): simulate, expand, backward.

The results are those of LightZero 0.2.0's Python tree, digit for digit; a test compares them. Three things differ from
LightZero's search as a whole:

* A node has its own context, which is passed through the transformer as a whole, so a search depends neither on other
  roots nor on earlier searches. LightZero's key-value caches outlive learning steps and episodes.
* Below the root only the actions that the vocabulary contains are expanded. LightZero expands all A.
* Ties are broken by a generator with the root's seed.

LightZero's C++ tree gives other results: it breaks ties by the clock, and its PUCT score leaves out the visit that
created a node, so that the prior has no effect on the first action that is selected in a node.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from priorzero.search.base import SearchModel, SearchNode
from priorzero.search.tree import NO_NODE, Puct, Trees, add_leaves, make_trees, simulate, simulate_all
from priorzero.settings import SearchSettings

TREE_DEPTH = 3  # levels of actions that search_tree returns


@dataclass(frozen=True)
class RootStatistics:
    """What a search found at one root with K valid actions.

    Attributes:
        visit_counts: ``[K]`` int64.
        value: mean value of the simulations.
        action_values: Q-values, reward + discount * value, ``[K]``; NaN for actions without visits.
    """

    visit_counts: np.ndarray
    value: float
    action_values: np.ndarray


@torch.no_grad()
def search(
    model: SearchModel,
    contexts: Sequence[Any],
    *,
    legal_actions: Sequence[np.ndarray],
    priors: Sequence[np.ndarray],
    seeds: Sequence[int],
    cfg: SearchSettings,
    num_actions: int,
) -> Trees:
    """Run ``cfg.num_simulations`` simulations from each of B roots. The model sees all roots in one batch.

    Args:
        model: in eval mode.
        contexts: those of the B roots.
        legal_actions: indices of each root's valid actions, ``[K]`` each.
        priors: probabilities of these actions, ``[K]`` each.
        seeds: each root's seed for breaking ties.
        num_actions: actions with indices below this are expanded below the root.
    """
    trees = make_trees(priors, num_simulations=cfg.num_simulations, num_actions=num_actions)
    puct = Puct(float(cfg.pb_c_base), float(cfg.pb_c_init), float(cfg.discount_factor))
    node_contexts = [[context] for context in contexts]  # for each tree, by node
    for simulation in range(cfg.num_simulations):
        for b in np.flatnonzero(~simulate_all(trees, puct)).tolist():  # these came to a tie
            words = random_words(seeds[b] * cfg.num_simulations + simulation, count=8 * cfg.num_simulations + 64)
            assert simulate(trees, b, puct, words)
        parents = trees.paths[np.arange(len(contexts)), trees.path_lengths - 1]
        actions = trees.positions.copy()  # below the root, an action's position is its index
        for b in np.flatnonzero(parents == 0).tolist():
            actions[b] = legal_actions[b][actions[b]]
        children, rewards = model.step([own[n] for own, n in zip(node_contexts, parents, strict=True)], actions)
        policy_logits, values = model.predict(children)
        for own, child in zip(node_contexts, children, strict=True):
            own.append(child)
        child_priors = torch.softmax(torch.from_numpy(policy_logits[:, :num_actions]), dim=1).double().numpy()
        add_leaves(
            trees, simulation + 1, child_priors, rewards.astype(np.float64), values.astype(np.float64), puct.discount
        )
    return trees


def random_words(seed: int, *, count: int) -> np.ndarray:
    """The first 32-bit words of Python's generator with this seed, ``[count]`` uint32.

    A selection uses two of them on average, so a simulation practically never needs more than eight for each node.
    """
    number = random.Random(seed).getrandbits(32 * count)
    return np.frombuffer(number.to_bytes(4 * count, "little"), np.dtype("<u4"))


def root_statistics(trees: Trees, *, discount: float) -> list[RootStatistics]:
    """The results at the B roots."""
    statistics = []
    for b, count in enumerate(trees.num_actions[:, 0]):
        children = trees.children[b, 0, :count]
        visited = children != NO_NODE
        visit_counts, action_values = np.zeros(count, np.int64), np.full(count, np.nan)
        nodes = children[visited]
        visit_counts[visited] = trees.visit_counts[b, nodes]
        action_values[visited] = trees.rewards[b, nodes] + discount * (
            trees.value_sums[b, nodes] / trees.visit_counts[b, nodes]
        )
        value = float(trees.value_sums[b, 0] / trees.visit_counts[b, 0])
        statistics.append(RootStatistics(visit_counts, value, action_values))
    return statistics


def search_tree(
    trees: Trees, b: int, *, legal_actions: np.ndarray, discount: float, depth: int = TREE_DEPTH
) -> tuple[SearchNode, ...]:
    """The actions of tree ``b`` that were visited, to ``depth`` levels below the root.

    ``legal_actions`` ``[K]`` are the vocabulary indices of the root's actions. Below the root, an action's position is
    its index.
    """

    def below(parent: int, levels: int) -> tuple[SearchNode, ...]:
        children = trees.children[b, parent, : trees.num_actions[b, parent]]
        nodes = []
        for position in np.flatnonzero(children != NO_NODE):
            node = int(children[position])
            mean_value = trees.value_sums[b, node] / trees.visit_counts[b, node]
            nodes.append(
                SearchNode(
                    action=int(position if parent else legal_actions[position]),
                    prior=float(trees.prior[b, parent, position]),
                    visit_count=int(trees.visit_counts[b, node]),
                    reward=float(trees.rewards[b, node]),
                    action_value=float(trees.rewards[b, node] + discount * mean_value),
                    children=below(node, levels - 1) if levels > 1 else (),
                )
            )
        return tuple(nodes)

    return below(0, depth)
