"""Exploration strategies: what collection adds to the root of a search, and which actions it takes.

Evaluation uses none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from priorzero.types import GameState, HistoryStep, Plain


@dataclass(frozen=True)
class RootNoise:
    """Exploration at one root.

    Attributes:
        probs: distribution over the valid actions that is mixed into the root's prior with the weight
            ``search.root_noise_weight``, ``[K]``.
        only: True for the actions that may be taken, ``[K]`` bool; at least one. The action is sampled from their visit
            counts, and from ``probs`` if none of them was visited, so one of them has a positive probability. None: all
            actions.
    """

    probs: np.ndarray
    only: np.ndarray | None = None


class Exploration:
    """An exploration strategy for all environments of a run. All methods except ``root_noise`` do nothing by default.

    To add a strategy, derive a class from this one, add its name to ``search.exploration`` in
    :mod:`priorzero.settings`, and construct it in :func:`priorzero.play.exploration.make_exploration`.

    The methods are called in this order for each environment: ``begin_episode``, then ``root_noise`` and ``observe``
    for each decision, then ``end_episode``. If the game crashes, the next call is ``begin_episode``.
    """

    def begin_episode(self, env: int, state: GameState, *, rng: np.random.Generator) -> None:
        """A new episode begins in environment ``env``."""

    def root_noise(
        self, env: int, state: GameState, prior_probs: np.ndarray | None, *, rng: np.random.Generator
    ) -> RootNoise:
        """Exploration for the next decision.

        Args:
            env: index of the environment.
            state: its state, with the K valid actions that the search considers.
            prior_probs: the LLM's prior over them, a distribution ``[K]`` without zeros (if ``prior.floor`` is
                positive); None without an LLM.
            rng: the environment's generator.
        """
        raise NotImplementedError

    def observe(self, env: int, *, position: int, after: GameState, history: Sequence[HistoryStep]) -> None:
        """The outcome of the decision.

        Args:
            env: index of the environment.
            position: position of the chosen action in the valid actions that ``root_noise`` was given.
            after: the state after the action.
            history: all decisions of the episode; the last one is this decision, with its reward.
        """

    def end_episode(self, env: int, state: GameState, history: Sequence[HistoryStep]) -> None:
        """The episode has ended in ``state`` after the decisions in ``history``."""

    def scalars(self) -> dict[str, float]:
        """Metrics under ``collector_iter/``."""
        return {}

    def state_dict(self) -> Plain:
        """Everything that later decisions depend on, including the episodes in progress."""
        return {}

    def load_state_dict(self, state: Plain) -> None:
        """The inverse of :meth:`state_dict`."""
