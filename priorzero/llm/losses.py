"""Losses of the language model.

Each loss returns ``(loss_sum, num_tokens)``. The caller divides once per optimiser step, so that the gradient does not
depend on how a batch is split into micro-batches. R completions of one or more prompts have at most T tokens each;
``completion_mask`` ``[R, T]`` is True where a completion has a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def sft_loss(token_logprobs: Tensor, completion_mask: Tensor, target_probs: Tensor) -> tuple[Tensor, Tensor]:
    r"""Cross-entropy between the search's visit distribution and the completions.

    .. math:: -\sum_r \pi_r \sum_t \log p(y_{r,t} \mid x_r, y_{r,<t})

    This is the policy loss of AlphaZero (Silver et al. 2018, eq. 1) with the LLM's text as the policy.

    ``token_logprobs`` are ``[R, T]``. ``target_probs`` ``[R]`` are the shares of the visits of each completion's
    action, which sum to one within a prompt. In ``num_tokens`` the tokens of a completion count with its share.
    """
    mask = completion_mask.to(token_logprobs.dtype)
    loss_sum = -(target_probs[:, None] * token_logprobs * mask).sum()
    return loss_sum, (target_probs[:, None] * mask).sum()


# Log-ratios are clamped to this range, because the exponential of a larger one would overflow.
LOG_RATIO_LIMIT = 10.0


def rft_loss(
    token_logprobs: Tensor,
    completion_mask: Tensor,
    advantages: Tensor,
    *,
    rollout_logprobs: Tensor | None = None,
    clip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Policy gradient on the completions of the actions that were taken.

    With ``clip=0`` it is REINFORCE (Williams 1992): :math:`-\sum_r A_r \sum_t \log p(y_{r,t} \mid x_r, y_{r,<t})`.
    Otherwise it is PPO's clipped surrogate (Schulman et al. 2017, eq. 7) with one ratio for each completion, the
    geometric mean over its tokens (GSPO, Zheng et al. 2025, eq. 7): :math:`-\sum_r T_r \min(\rho_r A_r,
    \mathrm{clip}(\rho_r, 1-\epsilon, 1+\epsilon) A_r)`. Both have the same gradient at :math:`\rho = 1`.

    Args:
        token_logprobs: ``[R, T]`` of the completions of the actions that were taken.
        completion_mask: ``[R, T]``.
        advantages: ``[R]``, constants.
        rollout_logprobs: ``[R]``, log-probabilities of the whole completions when the actions were taken; required if
            ``clip`` is not 0.
        clip: :math:`\epsilon`; 0 for REINFORCE.
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
    token_logprobs: Tensor, completion_mask: Tensor, num_completions: Sequence[int], *, temperature: float
) -> Tensor:
    r"""The prior's log-probabilities ``[R]``, float32: a distribution over the completions of each prompt.

    :math:`\log \mathrm{softmax}_k(s_k / \tau)`, where :math:`\tau` is the temperature and :math:`s_k` the mean of a
    completion's token log-probabilities. It is the differentiable form of
    :func:`priorzero.llm.priors.prior_from_scores`. The rows of ``token_logprobs`` ``[R, T]`` are ordered by prompt;
    ``num_completions`` of each prompt sum to R.
    """
    mask = completion_mask.to(token_logprobs.dtype)
    scores = (token_logprobs * mask).sum(dim=1) / mask.sum(dim=1)  # (R,)
    return torch.cat(
        [torch.log_softmax(of_prompt / temperature, 0) for of_prompt in scores.split(list(num_completions))]
    )


def kl_loss(
    token_logprobs: Tensor, reference_logprobs: Tensor, completion_mask: Tensor, *, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""KL penalty towards a reference model: :math:`\sum e^{d} - d - 1` with
    :math:`d = \log p_\mathrm{ref} - \log p` (Schulman, "Approximating KL divergence", 2020, estimator k3).

    It is never negative. It is an unbiased estimate of the KL divergence if the model itself sampled the tokens. The
    search chose the actions here, so it is only a penalty on moving away from the reference on those actions.

    The first three arguments are ``[R, T]``; ``reference_logprobs`` are constants. ``weights`` ``[R]`` are importance
    weights; None: all are 1.
    """
    mask = completion_mask.to(token_logprobs.dtype)
    if weights is not None:
        mask = weights[:, None] * mask
    difference = (reference_logprobs.detach() - token_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return ((difference.exp() - difference - 1.0) * mask).sum(), mask.sum()


def normalised_advantages(returns: np.ndarray, baselines: np.ndarray) -> np.ndarray:
    """``returns - baselines``, shifted and scaled to mean 0 and standard deviation 1 over the whole batch.

    The result is zero if all differences are equal. The arguments and the result are ``[n]``.
    """
    differences = np.asarray(returns, dtype=np.float64) - np.asarray(baselines, dtype=np.float64)
    centred = differences - differences.mean()
    deviation = centred.std()
    return np.zeros_like(centred) if deviation < 1e-6 else centred / deviation


def gradient_norm(parameters: Sequence[torch.nn.Parameter], *, max_norm: float) -> float:
    """Clip the gradients to ``max_norm`` and return their norm before the clipping."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
