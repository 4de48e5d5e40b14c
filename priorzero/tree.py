"""The Python search tree: LightZero's arithmetic, digit for digit, on arrays over the actions.

LightZero's own Python tree makes a node for each of the A actions whenever it expands one, and asks each of them for
its score in Python; with 256 actions that is a third to a half of a search. Here only nodes that have been visited
exist, and the scores of all actions are computed at once. A test holds both trees against each other.

The names are those of LightZero's trees, so that :mod:`priorzero.search` can use either; each tree has one root.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch


class Node:
    """A node; of its k actions, those that have been taken lead to nodes, the others are a prior only.

    Attributes:
        actions: what may be done here, ``[k]``; None for all actions.
        place: of this node among its parent's actions.
        number: which simulation made it.
        prior: ``[k]``; None until the node is expanded.
        child_visits: ``[k]``.
        children: place to node.
    """

    def __init__(self, *, place: int = 0, actions: list[int] | None = None) -> None:
        self.actions = actions
        self.place = place
        self.number = 0
        self.prior: np.ndarray | None = None
        self.child_visits = np.zeros(0)
        self.children: dict[int, Node] = {}
        self.reward = 0.0
        self.visit_count = 0
        self.value_sum = 0.0

    @property
    def value(self) -> float:
        return self.value_sum / self.visit_count if self.visit_count else 0.0

    def expand(self, *, number: int, reward: float, policy_logits: list[float]) -> None:
        logits = policy_logits if self.actions is None else [policy_logits[a] for a in self.actions]
        self.number = number
        self.reward = reward
        self.prior = torch.softmax(torch.tensor(logits), dim=0).double().numpy()
        self.child_visits = np.zeros(len(logits))


class Roots:
    """One root (LightZero's class holds several)."""

    def __init__(self, num: int, legal_actions: list[list[int]]) -> None:
        assert num == 1
        self.root = Node(actions=legal_actions[0])

    def prepare_no_noise(self, rewards: list[float], policies: list[list[float]], to_play: list[int]) -> None:
        self.root.expand(number=0, reward=rewards[0], policy_logits=policies[0])
        self.root.visit_count += 1

    def prepare(
        self, noise_weight: float, noises: list[Any], rewards: list[float], policies: list[Any], to_play: list[int]
    ) -> None:
        self.prepare_no_noise(rewards, policies, to_play)
        assert self.root.prior is not None
        self.root.prior = self.root.prior * (1 - noise_weight) + np.array(noises[0]) * noise_weight

    def get_distributions(self) -> list[list[int]]:
        return [self.root.child_visits.astype(np.int64).tolist()]

    def get_values(self) -> list[float]:
        return [self.root.value]


class SearchResults:
    """The path of one simulation, from the root to the new node."""

    def __init__(self, num: int) -> None:
        assert num == 1
        self.path: list[Node] = []


def batch_traverse(
    roots: Roots,
    pb_c_base: float,
    pb_c_init: float,
    discount_factor: float,
    statistics: Any,
    results: SearchResults,
    to_play: list[int],
) -> tuple[list[int], None, list[int], list[int]]:
    """Selection by PUCT, down to an action that has not been taken yet.

    Returns:
        The number of the node it is taken in, None, the action, and ``to_play``.
    """
    normalise = statistics.stats_lst[0].normalize
    node, parent_q = roots.root, 0.0
    path = [node]
    while (prior := node.prior) is not None:
        parent = node
        # In the order of the actions: the sum's last digits depend on it.
        q = {k: parent.children[k].reward + discount_factor * parent.children[k].value for k in sorted(parent.children)}
        total = 0.0
        for value in q.values():
            total += value
        # What an action that was never taken counts for: the mean of the others, below the root with the parent's.
        mean_q = total / len(q) if parent is roots.root and q else (parent_q + total) / (len(q) + 1)
        parent_q = mean_q
        pb_c = math.log((parent.visit_count + pb_c_base + 1) / pb_c_base) + pb_c_init
        scores = pb_c * (math.sqrt(parent.visit_count) / (parent.child_visits + 1)) * prior
        values = np.full(len(scores), min(max(normalise(mean_q), 0.0), 1.0))
        for k, value in q.items():
            values[k] = min(max(normalise(value), 0.0), 1.0)
        scores += values
        best = int(scores.argmax())
        # LightZero's ties: the first of the best, and what comes after it and is as good but for 1e-6.
        ties = [best, *(best + 1 + np.flatnonzero(scores[best + 1 :] >= scores[best] - 1e-6)).tolist()]
        place = random.choice(ties)
        if place not in parent.children:
            parent.children[place] = Node(place=place)
        node = parent.children[place]
        path.append(node)
    results.path = path
    action = place if parent.actions is None else parent.actions[place]
    return [parent.number], None, [action], to_play


def batch_backpropagate(
    number: int,
    discount_factor: float,
    rewards: list[float],
    values: list[float],
    policies: list[list[float]],
    statistics: Any,
    results: SearchResults,
    to_play: list[int],
) -> None:
    """Expand the new node and let its value flow up the path."""
    update = statistics.stats_lst[0].update
    results.path[-1].expand(number=number, reward=rewards[0], policy_logits=policies[0])
    value = values[0]
    for depth in range(len(results.path) - 1, -1, -1):
        node = results.path[depth]
        node.value_sum += value
        node.visit_count += 1
        if depth:
            results.path[depth - 1].child_visits[node.place] += 1
        update(node.reward + discount_factor * node.value)
        value = node.reward + discount_factor * value
