"""Dirichlet noise at the root."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from priorzero.play.exploration.base import RootNoise
from priorzero.types import ActionPrior, GameState, HistoryStep, Plain


class Dirichlet:
    """Dirichlet noise at the root (AlphaZero, Silver et al. 2018, "Methods"); ``search.exploration=dirichlet``.

    Args:
        alpha: concentration of the noise, ``search.root_dirichlet_alpha``.
    """

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def begin_episode(self, env: int, state: GameState, *, rng: np.random.Generator) -> None: ...

    def root_noise(
        self, env: int, state: GameState, prior: ActionPrior | None, *, rng: np.random.Generator
    ) -> RootNoise:
        return RootNoise(rng.dirichlet(np.full(len(state.valid_actions), self._alpha)))

    def observe(
        self,
        env: int,
        *,
        before: GameState,
        position: int,
        reward: float,
        after: GameState,
        history: Sequence[HistoryStep],
    ) -> None: ...

    def end_episode(self, env: int, state: GameState, history: Sequence[HistoryStep]) -> None: ...

    def scalars(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> Plain:
        return {}

    def load_state_dict(self, state: Plain) -> None: ...
