"""Losses of the language model, and the returns and advantages that they use.

Losses return ``(loss_sum, num_tokens)``; the caller divides once per optimiser step, so that cutting a batch into
micro-batches leaves the gradient as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def sft_loss(token_logprobs: Tensor, completion_mask: Tensor, target_probs: Tensor) -> tuple[Tensor, Tensor]:
    r"""Cross-entropy of the completions against the search's visit distribution.

    .. math:: -\sum_r \pi_r \sum_t \log p(y_{r,t} \mid x_r, y_{r,<t})

    which is the policy loss of AlphaZero (Silver et al. 2018, eq. 1) with the LLM's text as the policy.

    Args:
        token_logprobs: ``[R, T]``, R completions of one or more prompts.
        completion_mask: ``[R, T]``, True where a completion has a token.
        target_probs: ``[R]``, share of the visits of each completion's action; sums to one within a prompt.

    Returns:
        The summed loss and the number of tokens in it, each completion's counted by its share.
    """
    mask = completion_mask.to(token_logprobs.dtype)
    loss_sum = -(target_probs[:, None] * token_logprobs * mask).sum()
    return loss_sum, (target_probs[:, None] * mask).sum()


def rft_loss(token_logprobs: Tensor, completion_mask: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    r"""REINFORCE (Williams 1992) on what was done: :math:`-\sum_r A_r \sum_t \log p(y_{r,t} \mid x_r, y_{r,<t})`.

    Args:
        token_logprobs: ``[R, T]`` of the completions that were played.
        completion_mask: ``[R, T]``, True where a completion has a token.
        advantages: ``[R]``, constants.

    Returns:
        The summed loss and the number of tokens in it.
    """
    mask = completion_mask.to(token_logprobs.dtype)
    return -(advantages.detach()[:, None] * token_logprobs * mask).sum(), mask.sum()


def returns_to_go(
    rewards: Sequence[float] | np.ndarray, *, discount: float, bootstrap_value: float = 0.0
) -> np.ndarray:
    """Discounted sums of rewards from each step on, ``[n]``.

    Args:
        rewards: reward of each of n consecutive steps.
        discount: factor a step.
        bootstrap_value: value after the last step; 0 if the episode ended there.
    """
    returns = np.zeros(len(rewards), dtype=np.float64)
    running = bootstrap_value
    for t in range(len(rewards) - 1, -1, -1):
        running = rewards[t] + discount * running
        returns[t] = running
    return returns


def normalised_advantages(returns: np.ndarray, baselines: np.ndarray) -> np.ndarray:
    """``returns - baselines``, brought to mean zero and deviation one over the whole batch.

    Equal differences give zeros rather than noise divided by nothing. Both arguments and the result are ``[n]``.
    """
    differences = np.asarray(returns, dtype=np.float64) - np.asarray(baselines, dtype=np.float64)
    centred = differences - differences.mean()
    deviation = centred.std()
    if deviation < 1e-6:
        return np.zeros_like(centred)
    return centred / deviation


def gradient_norm(parameters: Sequence[torch.nn.Parameter], *, max_norm: float) -> float:
    """Clip the gradients to ``max_norm`` and return their norm before."""
    return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
