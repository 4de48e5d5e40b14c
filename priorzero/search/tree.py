"""The search trees of B roots, as arrays. Numba compiles the functions that run in each simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from loguru import logger
from numba import njit

from priorzero.runtime.compiling import cached_njit, compile_now

# LightZero's value_delta_max: a range of values below it is not stretched to [0, 1].
MIN_VALUE_RANGE = 0.01
TIE_TOLERANCE = 1e-6  # scores closer than this are a tie
NO_NODE = -1
NO_WORDS = np.zeros(0, np.uint32)


class Puct(NamedTuple):
    """The constants of the search: MuZero's c_2 and c_1, and the discount factor."""

    pb_c_base: float
    pb_c_init: float
    discount: float


class Trees(NamedTuple):
    """B trees of at most N nodes with at most W actions each. Node 0 is the root; simulation s adds node s + 1.

    The arrays of a node are only valid once it has been added.

    Attributes:
        num_actions: number of actions of each node, ``[B, N]`` int64.
        prior: probabilities of the actions, ``[B, N, W]``.
        children: the node that an action leads to, or :data:`NO_NODE` if it has not been visited, ``[B, N, W]`` int32.
        rewards: predicted reward of the step to each node, ``[B, N]``.
        visit_counts: ``[B, N]`` int64.
        value_sums: sum of the values of the simulations through each node, ``[B, N]``.
        value_ranges: the smallest and the largest value in each tree, to normalise values to [0, 1] (MuZero, appendix
            B, eq. 5), ``[B, 2]``.
        paths: the nodes of the present simulation, from the root, ``[B, N]`` int32.
        path_lengths: their number, ``[B]`` int64.
        positions: the action that was selected in the last node of the path, ``[B]`` int64.
        scores: work space of :func:`select`, ``[W]``.
    """

    num_actions: np.ndarray
    prior: np.ndarray
    children: np.ndarray
    rewards: np.ndarray
    visit_counts: np.ndarray
    value_sums: np.ndarray
    value_ranges: np.ndarray
    paths: np.ndarray
    path_lengths: np.ndarray
    positions: np.ndarray
    scores: np.ndarray


def make_trees(root_priors: Sequence[np.ndarray], *, num_simulations: int, num_actions: int) -> Trees:
    """Trees that contain only their roots.

    Args:
        root_priors: probabilities of each root's actions, ``[K]`` each.
        num_simulations: the largest number of nodes that will be added to each tree.
        num_actions: number of actions of the other nodes.
    """
    size, nodes = len(root_priors), num_simulations + 1
    width = max(num_actions, *(len(prior) for prior in root_priors))
    trees = Trees(
        num_actions=np.full((size, nodes), num_actions),
        prior=np.empty((size, nodes, width)),
        children=np.empty((size, nodes, width), np.int32),
        rewards=np.zeros((size, nodes)),
        visit_counts=np.zeros((size, nodes), np.int64),
        value_sums=np.zeros((size, nodes)),
        value_ranges=np.tile([math.inf, -math.inf], (size, 1)),
        paths=np.zeros((size, nodes), np.int32),
        path_lengths=np.zeros(size, np.int64),
        positions=np.zeros(size, np.int64),
        scores=np.empty(width),
    )
    trees.visit_counts[:, 0] = 1
    trees.children[:, 0] = NO_NODE
    for b, prior in enumerate(root_priors):
        trees.num_actions[b, 0] = len(prior)
        trees.prior[b, 0, : len(prior)] = prior
    return trees


@cached_njit
def simulate(trees: Trees, b: int, puct: Puct, words: np.ndarray) -> bool:
    """Select actions by PUCT from root ``b`` down to one that has not been visited yet, and store this path.

    Args:
        words: random numbers that break the ties, uint32. If there are none, the simulation ends at the first tie.

    Returns:
        False if it ended at a tie.
    """
    node, parent_q, used, depth = 0, 0.0, 0, 0
    while True:
        position, parent_q, used = select(trees, b, node, parent_q, puct, words, used)
        if position < 0:
            return False
        trees.paths[b, depth] = node
        depth += 1
        child = trees.children[b, node, position]
        if child == NO_NODE:
            trees.path_lengths[b] = depth
            trees.positions[b] = position
            return True
        node = child


@njit(nogil=True)
def select(
    trees: Trees, b: int, node: int, parent_q: float, puct: Puct, words: np.ndarray, used: int
) -> tuple[int, float, int]:
    """The action with the best PUCT score (MuZero, appendix B, eq. 2), ties broken at random.

    An action that has not been visited gets the mean value of the visited ones; below the root this mean includes
    ``parent_q``, the mean of the parent node (EfficientZero, Ye et al. 2021, appendix A).

    Args:
        words: as in :func:`simulate`. ``used`` of them were used before.

    Returns:
        The position of the action, or -1 if there is a tie and no random number; the mean value used for actions
        without visits; the number of used words.
    """
    count, children = trees.num_actions[b, node], trees.children[b, node]
    total, visited = 0.0, 0
    for k in range(count):  # summed in the order of the actions, since the last digits depend on it
        if children[k] != NO_NODE:
            total += q_value(trees, b, children[k], puct.discount)
            visited += 1
    if node == 0 and visited > 0:
        mean_q = total / visited
    else:
        mean_q = (parent_q + total) / (visited + 1)
    visits = trees.visit_counts[b, node]
    pb_c = math.log((visits + puct.pb_c_base + 1) / puct.pb_c_base) + puct.pb_c_init
    unvisited, default = math.sqrt(visits), normalise(trees, b, mean_q)
    best = 0
    for k in range(count):
        exploration, value = unvisited, default
        if children[k] != NO_NODE:
            exploration = unvisited / (trees.visit_counts[b, children[k]] + 1)
            value = normalise(trees, b, q_value(trees, b, children[k], puct.discount))
        trees.scores[k] = pb_c * exploration * trees.prior[b, node, k] + value
        if trees.scores[k] > trees.scores[best]:
            best = k
    ties = 1
    for k in range(best + 1, count):
        ties += trees.scores[k] >= trees.scores[best] - TIE_TOLERANCE
    if len(words) == 0:
        return (best if ties == 1 else -1), mean_q, used
    rank, used = choose(ties, words, used)
    position = best
    while rank > 0:
        position += 1
        rank -= trees.scores[position] >= trees.scores[best] - TIE_TOLERANCE
    return position, mean_q, used


@njit(nogil=True)
def choose(count: int, words: np.ndarray, used: int) -> tuple[int, int]:
    """A number below ``count``, as Python's ``random.choice`` draws it from its generator's 32-bit ``words``.

    Returns the number, and how many words were used in total.
    """
    bits = 0
    while count >> bits:
        bits += 1
    while True:
        number = words[used] >> (32 - bits)
        used += 1
        if number < count:
            return number, used


@njit(nogil=True)
def q_value(trees: Trees, b: int, node: int, discount: float) -> float:
    """Predicted reward of the step to a visited node, plus its discounted mean value."""
    return trees.rewards[b, node] + discount * (trees.value_sums[b, node] / trees.visit_counts[b, node])


@njit(nogil=True)
def normalise(trees: Trees, b: int, value: float) -> float:
    """``value`` normalised and clipped to [0, 1]; only clipped while there are no two different values."""
    smallest, largest = trees.value_ranges[b]
    if largest > smallest:
        value = (value - smallest) / max(largest - smallest, MIN_VALUE_RANGE)
    return min(max(value, 0.0), 1.0)


@njit(nogil=True)
def expand(trees: Trees, b: int, node: int, prior: np.ndarray, reward: float) -> None:
    """Add a node at the end of the present path, with its ``prior`` ``[num_actions]`` and the reward of the step."""
    parent = trees.paths[b, trees.path_lengths[b] - 1]
    trees.children[b, parent, trees.positions[b]] = node
    trees.children[b, node] = NO_NODE
    trees.prior[b, node, : len(prior)] = prior
    trees.rewards[b, node] = reward


@njit(nogil=True)
def backward(trees: Trees, b: int, leaf: int, value: float, discount: float) -> None:
    """Add the value of the new node to all nodes of the path, discounted and with the rewards on the way."""
    for depth in range(trees.path_lengths[b], -1, -1):
        node = leaf if depth == trees.path_lengths[b] else trees.paths[b, depth]
        trees.value_sums[b, node] += value
        trees.visit_counts[b, node] += 1
        mean = q_value(trees, b, node, discount)
        trees.value_ranges[b, 0] = min(trees.value_ranges[b, 0], mean)
        trees.value_ranges[b, 1] = max(trees.value_ranges[b, 1], mean)
        value = trees.rewards[b, node] + discount * value


@cached_njit
def simulate_all(trees: Trees, puct: Puct) -> np.ndarray:
    """:func:`simulate` for all trees, without random numbers. Returns which of them reached a new action, ``[B]``."""
    done = np.zeros(len(trees.positions), np.bool_)
    for b in range(len(done)):
        done[b] = simulate(trees, b, puct, NO_WORDS)
    return done


@cached_njit
def add_leaves(
    trees: Trees, node: int, priors: np.ndarray, rewards: np.ndarray, values: np.ndarray, discount: float
) -> None:
    """:func:`expand` and :func:`backward` for all trees: ``priors`` ``[B, num_actions]``, the others ``[B]``."""
    for b in range(len(values)):
        expand(trees, b, node, priors[b], rewards[b])
        backward(trees, b, node, values[b], discount)


def compile_functions() -> None:
    """Compile the functions, or load them from disk. Takes a few seconds the first time; later calls take no time."""
    trees = make_trees([np.ones(1)], num_simulations=2, num_actions=1)
    puct, words, one = Puct(1.0, 1.0, 1.0), np.zeros(8, np.uint32), np.ones(1)
    reasons = [
        compile_now(simulate_all, trees, puct),
        compile_now(simulate, trees, 0, puct, words),
        compile_now(add_leaves, trees, 1, np.ones((1, 1)), one, one, 1.0),
    ]
    reason = next(filter(None, reasons), None)
    if reason is not None:
        logger.warning(
            f"the compiled search cannot be kept on disk ({reason}), so each process compiles it, which takes some "
            "seconds. NUMBA_CACHE_DIR=FOLDER selects another folder."
        )
