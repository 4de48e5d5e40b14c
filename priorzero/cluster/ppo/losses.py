"""Losses and advantages of PPO."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from priorzero.world_model.returns import returns_to_go


def generalised_advantages(rewards: np.ndarray, values: np.ndarray, *, discount: float, lam: float) -> np.ndarray:
    r"""Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    :math:`\hat A_t = \sum_l (\gamma\lambda)^l \delta_{t+l}` with
    :math:`\delta_t = r_t + \gamma V(s_{t+1}) - V(s_t)`. :math:`\hat A_t + V(s_t)` is the :math:`\lambda`-return.

    Args:
        rewards: rewards of n consecutive steps, ``[n]``.
        values: values of the states before each step and of the state after the last one, ``[n + 1]``. The last value
            is 0 if the episode ended.
        discount: :math:`\gamma`.
        lam: :math:`\lambda`; 1 gives returns minus values, 0 one-step errors.

    Returns:
        Advantages, ``[n]``.
    """
    deltas = rewards + discount * values[1:] - values[:-1]
    return returns_to_go(deltas, discount=discount * lam)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> tuple[Tensor, Tensor]:
    r"""Half the squared error of the value or of the clipped value, whichever is larger.

    :math:`\sum \tfrac12 \max((V - R)^2, (V_\mathrm{old} + \mathrm{clip}(V - V_\mathrm{old}, \pm\epsilon) - R)^2)`, as
    in OpenAI's baselines (Engstrom et al. 2020, "Implementation Matters", section 3).

    Args:
        values: ``[n]``.
        old_values: the values before the first update on this batch, ``[n]``. They have no gradient.
        returns: ``[n]``. They have no gradient.
        clip: :math:`\epsilon`; 0 gives the plain squared error.

    Returns:
        The summed loss, and n.
    """
    returns, old_values = returns.detach(), old_values.detach()
    error = (values - returns) ** 2
    if clip > 0:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * error.sum(), torch.tensor(float(len(values)))
