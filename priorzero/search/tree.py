"""The search tree of one root, as arrays over the actions of each node."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

# LightZero's value_delta_max: a range of values below it is not stretched to [0, 1].
MIN_VALUE_RANGE = 0.01


@dataclass
class MinMaxStats:
    """The smallest and the largest value in a tree, to normalise values to [0, 1] (MuZero, appendix B, eq. 5)."""

    minimum: float = math.inf
    maximum: float = -math.inf

    def update(self, value: float) -> None:
        self.minimum = min(self.minimum, value)
        self.maximum = max(self.maximum, value)

    def normalise(self, value: float) -> float:
        """``value`` normalised and clipped to [0, 1]; only clipped while there are no two different values."""
        if self.maximum > self.minimum:
            value = (value - self.minimum) / max(self.maximum - self.minimum, MIN_VALUE_RANGE)
        return min(max(value, 0.0), 1.0)


@dataclass
class Node:
    """A node with k actions. Only actions that have been visited have a child.

    Attributes:
        prior: probabilities of the actions, ``[k]``.
        actions: vocabulary indices of the actions, ``[k]``.
        index: number of the node in its tree; the root is 0.
        reward: predicted reward of the step to this node.
        child_visits: visit counts of the actions, ``[k]``.
        children: position of an action to the node that it leads to.
    """

    prior: np.ndarray
    actions: np.ndarray
    index: int = 0
    reward: float = 0.0
    visit_count: int = 0
    value_sum: float = 0.0
    child_visits: np.ndarray = field(init=False)
    children: dict[int, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.child_visits = np.zeros(len(self.prior))

    @property
    def value(self) -> float:
        """Mean value of the simulations through this node."""
        return self.value_sum / self.visit_count if self.visit_count else 0.0


@dataclass
class Tree:
    """The search tree of one root and the statistics of its values."""

    root: Node
    stats: MinMaxStats = field(default_factory=MinMaxStats)
    num_nodes: int = 1

    @property
    def visit_counts(self) -> np.ndarray:
        """Visit counts of the root's actions, ``[K]`` int64."""
        return self.root.child_visits.astype(np.int64)

    def action_values(self, *, discount: float) -> np.ndarray:
        """Q-values of the root's actions, reward + discount * value, ``[K]``; NaN for actions without visits."""
        values = np.full(len(self.root.prior), np.nan)
        for position, child in self.root.children.items():
            values[position] = child.reward + discount * child.value
        return values
