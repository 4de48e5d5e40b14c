"""Stable numbers for actions: the world model's action embedding and policy head need one index an action."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class ActionIndexer(Protocol):
    """Gives the valid actions of a state distinct indices below ``capacity``.

    Attributes:
        capacity: ``A``.
        num_overflows: how often an action found no free index of its own.
        num_used: indices below this have been given out.
    """

    capacity: int
    num_overflows: int

    @property
    def num_used(self) -> int: ...

    def keep(self, actions: Sequence[str]) -> tuple[str, ...]:
        """The actions that fit: all of them, or the first ``capacity`` (counted)."""
        ...

    def indices(self, actions: Sequence[str]) -> np.ndarray:
        """Distinct indices of at most ``capacity`` actions, ``[K]`` int64."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Capped:
    """What both numberings share: a capacity, and a count of what did not fit."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_overflows = 0

    def keep(self, actions: Sequence[str]) -> tuple[str, ...]:
        self.num_overflows += max(0, len(actions) - self.capacity)
        return tuple(actions[: self.capacity])


class ActionVocabulary(_Capped):
    """An action text keeps its index from the first time it is seen.

    When all indices are taken, a new action gets that of the action that was longest not valid anywhere (never one that
    is valid now). This is counted: what the world model learned for the old action then speaks for the new one.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._index: OrderedDict[str, int] = OrderedDict()  # least recently valid first

    @property
    def num_used(self) -> int:
        return len(self._index)

    def indices(self, actions: Sequence[str]) -> np.ndarray:
        for action in actions:
            if action in self._index:
                self._index.move_to_end(action)
        for action in actions:
            if action not in self._index:
                if len(self._index) < self.capacity:
                    self._index[action] = len(self._index)
                else:
                    _, freed = self._index.popitem(last=False)
                    self._index[action] = freed
                    self.num_overflows += 1
        return np.array([self._index[action] for action in actions], dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        return {
            "actions": list(self._index),
            "indices": list(self._index.values()),
            "num_overflows": self.num_overflows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._index = OrderedDict(zip(state["actions"], state["indices"], strict=True))
        self.num_overflows = state["num_overflows"]


class PositionalIndices(_Capped):
    """An action's index is its place in the list of actions that are valid now (for comparison)."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._longest = 0

    @property
    def num_used(self) -> int:
        return self._longest

    def indices(self, actions: Sequence[str]) -> np.ndarray:
        self._longest = max(self._longest, len(actions))
        return np.arange(len(actions), dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        return {"num_used": self.num_used, "num_overflows": self.num_overflows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._longest = state["num_used"]
        self.num_overflows = state["num_overflows"]


def make_action_indexer(kind: str, capacity: int) -> ActionIndexer:
    """``"vocabulary"`` or ``"positional"``."""
    return ActionVocabulary(capacity) if kind == "vocabulary" else PositionalIndices(capacity)
