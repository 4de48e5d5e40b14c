"""An episode that is being played, and the summary of one that has ended."""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from priorzero.types import GameState, HistoryStep, Plain


@dataclass
class Episode:
    """An episode that is being played: its present state and what the next decision needs of the past.

    Attributes:
        env: index of its environment.
        state: the present state.
        features: features of the latest observations, ``[F]`` each, the present one last.
        actions: indices of the actions between them.
        rng: generator of this environment's exploration and sampling. Environments do not share one, so that they do
            not influence each other.
        history: all earlier decisions.
        total_reward: undiscounted return so far.
    """

    env: int
    state: GameState
    features: deque[np.ndarray]
    actions: deque[int]
    rng: np.random.Generator
    history: list[HistoryStep] = field(default_factory=list)
    total_reward: float = 0.0

    def advance(
        self, *, action_text: str, action_index: int, reward: float, state: GameState, features: np.ndarray
    ) -> None:
        """Append the outcome of an action.

        Args:
            action_text: the action.
            action_index: its index in the vocabulary.
            reward: points that it gained.
            state: the new state.
            features: features of the new state, ``[F]``.
        """
        before = self.state
        self.history.append(HistoryStep(before.feedback, action_text, reward, before.place, before.room, before.score))
        self.actions.append(action_index)
        self.features.append(features)
        self.total_reward += reward
        self.state = state

    def state_dict(self) -> Plain:
        """Everything except ``env`` and ``rng``, which outlive the episode."""
        return {
            "state": dataclasses.astuple(self.state),
            "features": [torch.from_numpy(features.copy()) for features in self.features],
            "actions": list(self.actions),
            "history": [dataclasses.astuple(step) for step in self.history],
            "total_reward": self.total_reward,
        }

    def load_state_dict(self, state: Plain) -> None:
        """The inverse of :meth:`state_dict`, into an episode at its beginning."""
        self.state = GameState(*state["state"])
        self.features.clear()
        self.features.extend(features.numpy() for features in state["features"])
        self.actions.extend(state["actions"])
        self.history = [HistoryStep(*step) for step in state["history"]]
        self.total_reward = state["total_reward"]


@dataclass(frozen=True)
class EpisodeResult:
    """An episode that has ended.

    Attributes:
        total_reward: undiscounted return.
        score: the game's score at the end.
        steps: number of actions.
        won: the game was won.
        env_step: environment steps of the run when it ended.
    """

    total_reward: float
    score: float
    steps: int
    won: bool
    env_step: int
