"""Describes the view of a BabyAI agent as text.

The wording is that of BabyAI-Text (Carta et al. 2023, "Grounding Large Language Models in Interactive Environments with
Online Reinforcement Learning").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

NOTHING = "You see nothing"
# Cells of the view that are not described as objects. The agent's own cell has the type of what it carries.
_SKIPPED = ("unseen", "empty", "wall", "floor", "agent")


def describe_view(image: np.ndarray) -> list[str]:
    """The sentences about a view: first the walls, then the objects from left to right, and from far to near.

    A wall is described only straight ahead and at both sides of the agent, and only if no object is in front of it. The
    object that the agent carries is not described here; see :func:`describe_carried`.

    Args:
        image: minigrid's encoding ``[N, N, 3]`` of the N x N cells that the agent sees: type, colour and state. The
            agent is at ``[N // 2, N - 1]`` and looks towards ``[N // 2, 0]``. Cells that it does not see are
            ``unseen``.

    Returns:
        Sentences without a full stop, such as "You see a red ball 1 step left and 2 steps forward"; empty if the agent
        sees no wall and no object.
    """
    from minigrid.core.constants import IDX_TO_OBJECT

    size = image.shape[0]
    kinds = np.array([[IDX_TO_OBJECT[int(kind)] for kind in column] for column in image[:, :, 0]])
    column, row = size // 2, size - 1
    lines = [
        ("forward", kinds[column, :row][::-1]),
        ("left", kinds[:column, row][::-1]),
        ("right", kinds[column + 1 :, row]),
    ]
    sentences = [
        f"You see a wall {_steps(distance)} {direction}"
        for direction, cells in lines
        if (distance := _distance_to_wall(cells))
    ]
    for x, y in np.ndindex(size, size):
        if kinds[x, y] not in _SKIPPED and (x, y) != (column, row):
            sentences.append(f"You see {_object(image[x, y])} {_where(x - column, row - y)}")
    return sentences


def describe_carried(kind: str, colour: str) -> str:
    """The sentence about the object that the agent carries, such as "You carry a blue key"."""
    return f"You carry {_with_article(f'{colour} {kind}')}"


def _distance_to_wall(cells: Iterable[str]) -> int:
    """The distance to the first cell that is not free, if it is a wall; otherwise 0."""
    for distance, kind in enumerate(cells, start=1):
        if kind not in ("unseen", "empty"):
            return distance if kind == "wall" else 0
    return 0


def _object(cell: np.ndarray) -> str:
    from minigrid.core.constants import IDX_TO_COLOR, IDX_TO_OBJECT, STATE_TO_IDX

    kind, colour = IDX_TO_OBJECT[int(cell[0])], IDX_TO_COLOR[int(cell[1])]
    states = {number: name for name, number in STATE_TO_IDX.items()}
    return _with_article(f"{states[int(cell[2])]} {colour} {kind}" if kind == "door" else f"{colour} {kind}")


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _where(right: int, forward: int) -> str:
    """``"2 steps left and 1 step forward"`` for -2 and 1; a direction with 0 steps is left out."""
    return " and ".join(_parts(right, forward))


def _parts(right: int, forward: int) -> Iterator[str]:
    if right:
        yield f"{_steps(abs(right))} {'right' if right > 0 else 'left'}"
    if forward:
        yield f"{_steps(forward)} forward"


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"
