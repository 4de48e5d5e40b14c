"""Checks of arguments that all games share."""

from __future__ import annotations

from priorzero.types import GameState


def check_arguments(*, seed: int, max_episode_steps: int) -> None:
    """Raise a ValueError unless these arguments of a game are allowed."""
    if seed < 0 or max_episode_steps < 1:
        raise ValueError(f"seed={seed} must be at least 0, and max_episode_steps={max_episode_steps} at least 1")


def check_action(state: GameState | None, action: str) -> GameState:
    """Return ``state``. Raises a ValueError unless the episode is in progress and ``action`` is valid."""
    if state is None or state.done:
        raise ValueError(f"step({action!r}) outside of an episode: call reset() first")
    if action not in state.valid_actions:
        raise ValueError(f"{action!r} is not among the valid actions {state.valid_actions}")
    return state
