"""A slow reference for generalised advantage estimation."""

from __future__ import annotations


def advantages_by_definition(rewards, values, gamma, lam):
    """For each step the weighted sum of all later one-step errors."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
