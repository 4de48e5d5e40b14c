"""Checks of arguments that all games share."""

from __future__ import annotations

from typing import get_args

from priorzero.types import GameState, ValidActionsMode


def check_arguments(
    *,
    seed: int,
    max_episode_steps: int,
    look_and_inventory: bool,
    drop_inert_commands: bool,
    valid_actions: ValidActionsMode,
) -> None:
    """Raise a ValueError unless these arguments of a game are allowed."""
    for name, number in {"seed": seed, "max_episode_steps": max_episode_steps}.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"{name}={number!r} must be an int, such as 1")
    for name, flag in {"look_and_inventory": look_and_inventory, "drop_inert_commands": drop_inert_commands}.items():
        if not isinstance(flag, bool):  # "false" would be true
            raise ValueError(f"{name}={flag!r} must be True or False")
    if valid_actions not in get_args(ValidActionsMode):
        raise ValueError(f"valid_actions={valid_actions!r} must be one of {', '.join(get_args(ValidActionsMode))}")
    if seed < 0 or max_episode_steps < 1:
        raise ValueError(f"seed={seed} must be at least 0, and max_episode_steps={max_episode_steps} at least 1")


def check_action(state: GameState | None, action: str) -> GameState:
    """Return ``state``. Raises a ValueError unless the episode is in progress and ``action`` is valid."""
    if state is None or state.done:
        raise ValueError(f"step({action!r}) outside of an episode: call reset() first")
    if action not in state.valid_actions:
        raise ValueError(f"{action!r} is not among the valid actions {state.valid_actions}")
    return state
