"""The prior of the root: the world model's policy, the LLM's prior and exploration noise."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import log_softmax

# A finite floor: probabilities below e^-30 do not affect a search, but minus infinity would.
LOGIT_FLOOR = -30.0
NUM_BINS = 4  # of the policy's entropy


def floored_probs(prior_logprobs: np.ndarray, *, floor: float) -> np.ndarray:
    """``(1 - floor) * prior + floor * uniform``, ``[K]`` float64."""
    return (1.0 - floor) * np.exp(prior_logprobs.astype(np.float64)) + floor / len(prior_logprobs)


def entropy_bin(policy_logits: np.ndarray) -> int:
    """The interval of the policy's entropy: 0 (certain) to ``NUM_BINS - 1`` (nearly uniform).

    The entropy over the K actions, ``policy_logits`` ``[K]``, is divided by ``log K``; the intervals are equal.
    """
    num_actions = len(policy_logits)
    if num_actions == 1:
        return 0
    logprobs = log_softmax(policy_logits.astype(np.float64))
    relative = -float(np.exp(logprobs) @ logprobs) / np.log(num_actions)
    return min(NUM_BINS - 1, int(NUM_BINS * relative))


def mix_root_logits(
    policy_logits: np.ndarray, prior_logprobs: np.ndarray | None, *, alpha: float, floor: float
) -> np.ndarray:
    """Combine the world model's policy and the LLM's prior over the valid actions.

    Args:
        policy_logits: the world model's logits of the valid actions, ``[K]``.
        prior_logprobs: the LLM's log-probabilities of the valid actions, ``[K]``; None: the world model alone.
        alpha: weight of the prior: the result is ``alpha * prior + (1 - alpha) * policy``, as probabilities.
        floor: weight of a uniform distribution in the prior, so that no valid action gets probability zero.

    Returns:
        Root logits ``[K]``, float32: log-probabilities, at least :data:`LOGIT_FLOOR`.
    """
    policy_logprobs = log_softmax(np.asarray(policy_logits, dtype=np.float64))
    if prior_logprobs is None:
        mixed = policy_logprobs
    else:
        prior = floored_probs(prior_logprobs, floor=floor)
        with np.errstate(divide="ignore"):  # log(0) becomes LOGIT_FLOOR
            mixed = np.log(alpha * prior + (1.0 - alpha) * np.exp(policy_logprobs))
    return np.maximum(mixed, LOGIT_FLOOR).astype(np.float32)


def root_probs(root_logits: np.ndarray, noise: np.ndarray | None, *, noise_weight: float) -> np.ndarray:
    """Probabilities of the root's actions: ``(1 - noise_weight) * softmax(root_logits) + noise_weight * noise``.

    ``root_logits`` are ``[K]`` float32; ``noise`` is a distribution ``[K]``, or None for none. Returns ``[K]`` float64.
    """
    probs: np.ndarray = torch.softmax(torch.from_numpy(root_logits), dim=0).double().numpy()
    return probs if noise is None else probs * (1 - noise_weight) + noise * noise_weight
