"""An episode that is being played, and the summary of one that has ended."""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from priorzero.play.memory import GameMemory
from priorzero.play.transcript import TranscriptStep
from priorzero.types import ActionChoice, GameState, HistoryStep, Plain


@dataclass
class Episode:
    """An episode that is being played: its present state and what the next decision needs of the past.

    Attributes:
        env: index of its environment.
        game: name of the game.
        number: unique among the collected episodes of a run; 0 in an evaluation.
        state: the present state.
        features: features of the latest observations, ``[F]`` each, the present one last.
        actions: indices of the actions between them.
        rng: generator of this environment's exploration and sampling. Environments do not share one, so that they do
            not influence each other.
        history: all earlier decisions.
        total_reward: undiscounted return so far.
        memory: what episodes of this game that ended before taught; None if prompts do not contain it.
        recording: its decisions so far, with their search trees; None if the episode is not recorded.
    """

    env: int
    game: str
    number: int
    state: GameState
    features: deque[np.ndarray]
    actions: deque[int]
    rng: np.random.Generator
    history: list[HistoryStep] = field(default_factory=list)
    total_reward: float = 0.0
    memory: GameMemory | None = None
    recording: list[TranscriptStep] | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether searches return their trees, for :attr:`recording`."""
        return self.recording is not None

    def advance(self, choice: ActionChoice, *, reward: float, state: GameState, features: np.ndarray) -> None:
        """Append the outcome of an action: the points that it gained, the new state and its features ``[F]``."""
        old, action = self.state, choice.action_text
        self.history.append(HistoryStep(old.feedback, action, reward, old.place, old.room, old.score))
        self.actions.append(choice.action_index)
        self.features.append(features)
        self.total_reward += reward
        self.state = state

    def state_dict(self) -> Plain:
        """Everything except ``env``, ``game`` and ``rng``, which outlive the episode."""
        return {
            "number": self.number,
            "state": dataclasses.astuple(self.state),
            "features": [torch.from_numpy(features.copy()) for features in self.features],
            "actions": list(self.actions),
            "history": [dataclasses.astuple(step) for step in self.history],
            "total_reward": self.total_reward,
            "memory": self.memory and self.memory.outcomes,
            "recording": self.recording,
        }

    def load_state_dict(self, state: Plain) -> None:
        """The inverse of :meth:`state_dict`, into an episode at its beginning."""
        self.number = state["number"]
        self.state = GameState(*state["state"])
        self.features.clear()
        self.features.extend(features.numpy() for features in state["features"])
        self.actions.extend(state["actions"])
        self.history = [HistoryStep(*step) for step in state["history"]]
        self.total_reward = state["total_reward"]
        if self.memory is not None:
            self.memory = GameMemory(state["memory"])
        self.recording = state["recording"]


@dataclass(frozen=True)
class EpisodeResult:
    """An episode that has ended."""

    total_reward: float  # undiscounted return
    score: float  # the game's score at the end
    steps: int
    won: bool
    env_step: int  # environment steps of the run when it ended
    game: str  # its name
