"""Plays a game with actions that depend on nothing but the number of the step."""

from __future__ import annotations

from priorzero.types import GameState, TextGame


def play_some(game: TextGame, *, steps: int) -> list[GameState]:
    """The states of an episode's first ``steps`` steps, with the first state. The episode must not end before."""
    states = [game.reset()]
    for number in range(steps):
        actions = states[-1].valid_actions
        states.append(game.step(actions[number * 7 % len(actions)])[0])
    return states
