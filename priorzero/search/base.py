"""The inputs and results of a search, and the interface of its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Root:
    """The state that a search starts from.

    Attributes:
        features: features of the last observations of the episode, oldest first, ``[n, F]`` with
            ``1 <= n <= context_length / 2``.
        actions: indices of the actions between them, ``[n - 1]``.
        legal_actions: indices of the valid actions, ``[K]``.
        prior_logprobs: the LLM's log-probabilities of the valid actions, ``[K]``; None without an LLM.
        prior_weights: weight of the prior by :func:`~priorzero.search.root.entropy_bin` of the policy, ``[NUM_BINS]``;
            None without an LLM.
        noise: exploration noise, a distribution over the valid actions, ``[K]``; None for none.
        seed: seed of the generator that breaks ties between actions.
        with_tree: return the first levels of the search tree.
    """

    features: np.ndarray
    actions: np.ndarray
    legal_actions: np.ndarray
    prior_logprobs: np.ndarray | None = None
    prior_weights: np.ndarray | None = None
    noise: np.ndarray | None = None
    seed: int = 0
    with_tree: bool = False


@dataclass(frozen=True)
class SearchNode:
    """An action of a search tree that was visited, and what follows it.

    Attributes:
        action: index of the action in the vocabulary.
        prior: probability with which its parent's search started.
        visit_count: number of simulations through it.
        reward: the predicted reward of the action.
        action_value: Q-value: the reward plus the discounted mean value of the simulations.
        children: the actions after it that were visited, in the order of the parent's actions.
    """

    action: int
    prior: float
    visit_count: int
    reward: float
    action_value: float
    children: tuple[SearchNode, ...] = ()


@dataclass(frozen=True)
class SearchResult:
    """The result for one root, over its K valid actions in their order.

    Attributes:
        visit_counts: ``[K]`` int64; the sum is the number of simulations.
        root_value: value of the root after the search.
        predicted_value: the network's value of the root before the search.
        policy_logits: the world model's, ``[K]``.
        prior_weight: weight of the LLM's prior at the root; 0 without an LLM.
        root_logits: policy and prior combined, before noise, ``[K]``.
        root_probs: the probabilities that the search started from: ``root_logits`` with noise, ``[K]``.
        action_values: mean value of the simulations through each action, with its predicted reward, ``[K]``; NaN for
            actions without visits.
        tree: the root's visited actions and the levels below them; None unless the root asked for it.
    """

    visit_counts: np.ndarray
    root_value: float
    predicted_value: float
    policy_logits: np.ndarray
    prior_weight: float
    root_logits: np.ndarray
    root_probs: np.ndarray
    action_values: np.ndarray
    tree: tuple[SearchNode, ...] | None = None


class SearchModel(Protocol):
    """The model of a search. A context is what the model needs to know of a state; the search only passes it on."""

    def root_contexts(self, roots: Sequence[Root]) -> list[Any]:
        """One context for each root."""

    def predict(self, contexts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Policy logits ``[n, A]`` and values ``[n]`` of n contexts."""

    def step(self, contexts: Sequence[Any], actions: np.ndarray) -> tuple[list[Any], np.ndarray]:
        """The contexts after one action ``[n]`` in each, and the predicted rewards ``[n]``."""
