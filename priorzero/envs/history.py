"""The history of decisions in an episode."""

from __future__ import annotations

from collections.abc import Sequence

from priorzero.types import GameState, HistoryStep


def without_loops(history: Sequence[HistoryStep], *, now: GameState | HistoryStep) -> list[HistoryStep]:
    """Remove the loops from a history: decisions that led back to an earlier place and earned no reward.

    ``history`` is all decisions of the episode, oldest first, and ``now`` the state after the last one. Between two
    rewards, the result visits each place at most once.
    """
    path: list[HistoryStep] = []
    visited: dict[tuple[str, ...], int] = {}  # place -> length of the path to it, since the last reward
    for step, reward in zip([*history, None], [0.0, *(step.reward for step in history)], strict=True):
        if reward:  # the reward of the previous step
            visited = {}
        place = now.place if step is None else step.place
        if place in visited:
            del path[visited[place] :]
            visited = {other: length for other, length in visited.items() if length <= len(path)}
        visited[place] = len(path)
        if step is not None:
            path.append(step)
    return path
