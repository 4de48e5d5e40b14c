"""Dirichlet noise at the root."""

from __future__ import annotations

import numpy as np

from priorzero.play.exploration.base import Exploration, RootNoise
from priorzero.types import GameState


class Dirichlet(Exploration):
    """Dirichlet noise at the root (AlphaZero, Silver et al. 2018, "Methods"); ``search.exploration=dirichlet``.

    Args:
        alpha: concentration of the noise, ``search.root_dirichlet_alpha``.
    """

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def root_noise(
        self, env: int, state: GameState, prior_probs: np.ndarray | None, *, rng: np.random.Generator
    ) -> RootNoise:
        return RootNoise(rng.dirichlet(np.full(len(state.valid_actions), self._alpha)))
