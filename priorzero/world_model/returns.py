"""Discounted returns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def returns_to_go(
    rewards: Sequence[float] | np.ndarray, *, discount: float, bootstrap_value: float = 0.0
) -> np.ndarray:
    """The discounted sum of the rewards of n consecutive steps from each step on, ``[n]``.

    ``bootstrap_value`` is the value after the last step; 0 if the episode ended there.
    """
    returns = np.zeros(len(rewards), dtype=np.float64)
    running = bootstrap_value
    for t in range(len(rewards) - 1, -1, -1):
        running = rewards[t] + discount * running
        returns[t] = running
    return returns
