"""The history of decisions in an episode."""

from __future__ import annotations

from collections.abc import Sequence

from priorzero.types import GameState, HistoryStep


def without_loops(history: Sequence[HistoryStep], *, now: GameState | HistoryStep) -> list[HistoryStep]:
    """Remove the loops from a history: decisions that led back to an earlier place and earned no reward.

    ``history`` is all decisions of the episode, oldest first, and ``now`` the state after the last one. Between two
    rewards, the result visits each place at most once.
    """
    places, rewards = [*(step.place for step in history), now.place], [step.reward for step in history]
    return [history[t] for t in loop_free_path(places, rewards)]


def loop_free_path(places: Sequence[tuple[str, ...]], rewards: Sequence[float]) -> list[int]:
    """The indices of the decisions that remain without loops, see :func:`without_loops`.

    Args:
        places: the places in which the n decisions were taken, and the place after the last one, ``[n + 1]``.
        rewards: the rewards of the decisions, ``[n]``.
    """
    path: list[int] = []
    visited: dict[tuple[str, ...], int] = {}  # place -> length of the path to it, since the last reward
    for t, (place, reward) in enumerate(zip(places, [0.0, *rewards], strict=True)):
        if reward:  # the reward of the previous decision
            visited = {}
        if place in visited:
            del path[visited[place] :]
            visited = {other: length for other, length in visited.items() if length <= len(path)}
        visited[place] = len(path)
        path.append(t)
    return path[:-1]
