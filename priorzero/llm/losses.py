"""Losses of the language model, and the returns and advantages that they use.

Losses return ``(loss_sum, num_tokens)``; the caller divides once per optimiser step, so that cutting a batch into
micro-batches leaves the gradient as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


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


# Log-ratios beyond this are as good as infinite; the exponential of more would be so in fact.
LOG_RATIO_LIMIT = 10.0


def rft_loss(
    token_logprobs: Tensor,
    completion_mask: Tensor,
    advantages: Tensor,
    *,
    rollout_logprobs: Tensor | None = None,
    clip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Policy gradient on what was done.

    Without ``clip`` it is REINFORCE (Williams 1992), :math:`-\sum_r A_r \sum_t \log p(y_{r,t} \mid x_r, y_{r,<t})`.
    With it, PPO's clipped surrogate (Schulman et al. 2017, eq. 7) with one ratio a completion, the geometric mean over
    its tokens (GSPO, Zheng et al. 2025, eq. 7): :math:`-\sum_r T_r \min(\rho_r A_r,
    \mathrm{clip}(\rho_r, 1-\epsilon, 1+\epsilon) A_r)`. At :math:`\rho = 1` both have the same gradient.

    Args:
        token_logprobs: ``[R, T]`` of the completions that were played.
        completion_mask: ``[R, T]``, True where a completion has a token.
        advantages: ``[R]``, constants.
        rollout_logprobs: ``[R]``, of the whole completions when they were played; needed with ``clip``.
        clip: :math:`\epsilon`; 0 for REINFORCE.

    Returns:
        The summed loss and the number of tokens in it.
    """
    mask = completion_mask.to(token_logprobs.dtype)
    advantages = advantages.detach()
    if clip == 0.0:
        return -(advantages[:, None] * token_logprobs * mask).sum(), mask.sum()
    assert rollout_logprobs is not None
    lengths = mask.sum(dim=1)
    log_ratio = ((token_logprobs * mask).sum(dim=1) - rollout_logprobs.detach()) / lengths
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages)
    return -(lengths * surrogate).sum(), mask.sum()


def action_logprobs(
    token_logprobs: Tensor, completion_mask: Tensor, sizes: Sequence[int], *, temperature: float
) -> Tensor:
    r"""What the prior makes of the completions: a log-distribution over those of each prompt.

    :math:`\log \mathrm{softmax}_k(s_k / \tau)` with :math:`s_k` the mean of a completion's token log-probabilities,
    as :func:`priorzero.llm.priors.prior_from_scores` has it.

    Args:
        token_logprobs: ``[R, T]``, the completions of all prompts one after another.
        completion_mask: ``[R, T]``, True where a completion has a token.
        sizes: completions of each prompt; they sum to R.
        temperature: :math:`\tau`.

    Returns:
        ``[R]`` float32.
    """
    mask = completion_mask.to(token_logprobs.dtype)
    scores = (token_logprobs * mask).sum(dim=1) / mask.sum(dim=1)  # (R,)
    return torch.cat([torch.log_softmax(of_one / temperature, dim=0) for of_one in scores.split(list(sizes))])


def kl_loss(token_logprobs: Tensor, reference_logprobs: Tensor, completion_mask: Tensor) -> tuple[Tensor, Tensor]:
    r"""How far the model has moved from its reference on some tokens: :math:`\sum e^{d} - d - 1` with
    :math:`d = \log p_\mathrm{ref} - \log p` (Schulman, "Approximating KL divergence", 2020, estimator k3).

    It is never negative. Tokens that the model itself has drawn make it an unbiased estimate of the KL divergence;
    those of a command that the search has chosen make it a penalty on moving where the agent acts.

    Args:
        token_logprobs: ``[R, T]``.
        reference_logprobs: ``[R, T]``, constants.
        completion_mask: ``[R, T]``, True where a completion has a token.

    Returns:
        The summed loss and the number of tokens in it.
    """
    mask = completion_mask.to(token_logprobs.dtype)
    difference = (reference_logprobs.detach() - token_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return ((difference.exp() - difference - 1.0) * mask).sum(), mask.sum()


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
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
