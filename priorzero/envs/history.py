"""The decisions of an episode that led to its present state."""

from __future__ import annotations

from collections.abc import Sequence

from priorzero.types import GameState, HistoryStep


def without_loops(history: Sequence[HistoryStep], *, now: GameState | HistoryStep) -> list[HistoryStep]:
    """The history without loops: decisions that led back to an earlier place and earned nothing on the way.

    Between two rewards, the result visits each place once. It does not depend on what was tried in vain.

    Args:
        history: all decisions of the episode, oldest first.
        now: the state after them.
    """
    path: list[HistoryStep] = []
    visited: dict[tuple[str, ...], int] = {}  # place -> length of the path there, since the last reward
    for step, earned in zip([*history, None], [0.0, *(step.reward for step in history)], strict=True):
        if earned:
            visited = {}
        place = now.place if step is None else step.place
        if place in visited:
            del path[visited[place] :]
            visited = {other: length for other, length in visited.items() if length <= len(path)}
        visited[place] = len(path)
        if step is not None:
            path.append(step)
    return path
