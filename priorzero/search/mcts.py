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

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from priorzero.search.base import SearchModel
from priorzero.search.tree import MinMaxStats, Node, Tree
from priorzero.settings import SearchSettings

TIE_TOLERANCE = 1e-6  # scores closer than this are a tie


@torch.no_grad()
def search(
    model: SearchModel,
    contexts: Sequence[Tensor],
    *,
    legal_actions: Sequence[np.ndarray],
    priors: Sequence[np.ndarray],
    seeds: Sequence[int],
    cfg: SearchSettings,
    num_actions: int,
) -> list[Tree]:
    """Run ``cfg.num_simulations`` simulations from each of B roots. The model sees all roots in one batch.

    Args:
        model: in eval mode.
        contexts: those of the B roots.
        legal_actions: indices of each root's valid actions, ``[K]`` each.
        priors: probabilities of these actions, ``[K]`` each.
        seeds: each root's seed for breaking ties.
        num_actions: actions with indices below this are expanded below the root.
    """
    trees = [Tree(Node(prior, actions, visit_count=1)) for prior, actions in zip(priors, legal_actions, strict=True)]
    node_contexts = [[context] for context in contexts]  # for each tree, by node index
    all_actions = np.arange(num_actions)
    for simulation in range(cfg.num_simulations):
        rngs = [random.Random(seed * cfg.num_simulations + simulation) for seed in seeds]
        paths = [simulate(tree, cfg=cfg, rng=rng) for tree, rng in zip(trees, rngs, strict=True)]
        parents = [own[path[-1].node.index] for own, path in zip(node_contexts, paths, strict=True)]
        children, rewards = model.step(parents, np.array([path[-1].action_index for path in paths]))
        policy_logits, values = model.predict(children)
        for b, (tree, path) in enumerate(zip(trees, paths, strict=True)):
            node_contexts[b].append(children[b])
            leaf = expand(
                tree, path[-1], actions=all_actions, policy_logits=policy_logits[b, :num_actions], reward=rewards[b]
            )
            backward(tree, path, leaf, value=float(values[b]), discount=cfg.discount_factor)
    return trees


@dataclass(frozen=True, slots=True)
class Edge:
    """An action of a node, by its position among the node's actions."""

    node: Node
    position: int

    @property
    def action_index(self) -> int:
        """Index of the action in the vocabulary."""
        return int(self.node.actions[self.position])


def simulate(tree: Tree, *, cfg: SearchSettings, rng: random.Random) -> list[Edge]:
    """Select actions by PUCT from the root down to one that has not been visited yet; returns this path."""
    path: list[Edge] = []
    node, parent_q = tree.root, 0.0
    while True:
        position, parent_q = select(node, tree.stats, parent_q=parent_q, is_root=node is tree.root, cfg=cfg, rng=rng)
        path.append(Edge(node, position))
        if position not in node.children:
            return path
        node = node.children[position]


def select(
    node: Node, stats: MinMaxStats, *, parent_q: float, is_root: bool, cfg: SearchSettings, rng: random.Random
) -> tuple[int, float]:
    """The action with the best PUCT score (MuZero, appendix B, eq. 2), ties broken at random.

    An action that has not been visited gets the mean value of the visited ones; below the root this mean includes
    ``parent_q``, the mean of the parent node (EfficientZero, Ye et al. 2021, appendix A).

    Returns:
        The position of the action, and the mean value used for actions without visits.
    """
    # Summed in the order of the actions, since the last digits depend on it.
    q_values = {
        k: node.children[k].reward + cfg.discount_factor * node.children[k].value for k in sorted(node.children)
    }
    total = 0.0
    for q in q_values.values():
        total += q
    mean_q = total / len(q_values) if is_root and q_values else (parent_q + total) / (len(q_values) + 1)
    pb_c = math.log((node.visit_count + cfg.pb_c_base + 1) / cfg.pb_c_base) + cfg.pb_c_init
    scores = pb_c * (math.sqrt(node.visit_count) / (node.child_visits + 1)) * node.prior
    values = np.full(len(scores), stats.normalise(mean_q))
    for k, q in q_values.items():
        values[k] = stats.normalise(q)
    scores += values
    best = int(scores.argmax())
    ties = [best, *(best + 1 + np.flatnonzero(scores[best + 1 :] >= scores[best] - TIE_TOLERANCE)).tolist()]
    return rng.choice(ties), mean_q


def expand(tree: Tree, edge: Edge, *, actions: np.ndarray, policy_logits: np.ndarray, reward: float) -> Node:
    """Add the node that an action without a node leads to, with the predicted reward of the action.

    Args:
        actions: vocabulary indices of the new node's actions, ``[k]``.
        policy_logits: their logits, ``[k]`` float32.
    """
    prior = torch.softmax(torch.from_numpy(policy_logits), dim=0).double().numpy()
    leaf = Node(prior, actions, index=tree.num_nodes, reward=float(reward))
    edge.node.children[edge.position] = leaf
    tree.num_nodes += 1
    return leaf


def backward(tree: Tree, path: Sequence[Edge], leaf: Node, *, value: float, discount: float) -> None:
    """Add the value of the new node to all nodes of the path, discounted and with the rewards on the way."""
    nodes = [*(edge.node for edge in path), leaf]
    for edge in path:
        edge.node.child_visits[edge.position] += 1
    for node in reversed(nodes):
        node.value_sum += value
        node.visit_count += 1
        tree.stats.update(node.reward + discount * node.value)
        value = node.reward + discount * value
