"""Episodes that tests play by hand with an exploration strategy."""

from __future__ import annotations

import numpy as np

from priorzero.play.exploration import Exploration, RootNoise
from priorzero.types import GameState, HistoryStep


def steps(*decisions: tuple[str, float, str, float]) -> list[HistoryStep]:
    """A history of ``(place, score, action, reward)``. The room is the place's first letter."""
    return [HistoryStep("", action, reward, (place,), place[0], score) for place, score, action, reward in decisions]


def at(place: str, score: float, actions: tuple[str, ...] = ("wait",)) -> GameState:
    """A state whose place and room are both called ``place``."""
    return GameState(feedback=place, valid_actions=actions, score=score, max_score=99.0, moves=0)


class ScriptedEpisode:
    """An episode in one environment. The test chooses the actions and says what they lead to.

    Attributes:
        state: the present state.
        noise: the strategy's noise for the present decision; None after the end of the episode.
    """

    def __init__(
        self,
        strategy: Exploration,
        state: GameState,
        *,
        env: int = 0,
        rng: np.random.Generator | None = None,
    ) -> None:
        self.strategy, self.state, self.env = strategy, state, env
        self.rng = rng if rng is not None else np.random.default_rng(0)
        self.history: list[HistoryStep] = []
        strategy.begin_episode(env, state, rng=self.rng)
        self.noise: RootNoise | None = None
        self.ask()

    def ask(self, prior_probs: np.ndarray | None = None) -> RootNoise:
        """The strategy's noise for the present decision, sampled anew."""
        self.noise = self.strategy.root_noise(self.env, self.state, prior_probs, rng=self.rng)
        return self.noise

    def take(self, action: str, after: GameState, reward: float = 0.0) -> None:
        """Take an action. If ``after`` is done, the episode ends."""
        before = self.state
        self.history.append(HistoryStep(before.feedback, action, reward, before.place, before.room, before.score))
        self.strategy.observe(self.env, position=before.valid_actions.index(action), after=after, history=self.history)
        self.state, self.noise = after, None
        if after.done:
            self.strategy.end_episode(self.env, after, self.history)
        else:
            self.ask()
