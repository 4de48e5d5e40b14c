"""The action vocabulary: an index for each action text, as the world model needs it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from priorzero.types import Plain


class ActionVocabulary:
    """Assigns the next free index to each new action text. The text keeps it.

    If no index is free, a new action gets the index of the action that has not been valid for the longest time. This is
    counted as an overflow: what the world model has learned for the old action is then applied to the new one.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_overflows = 0  # how often an action found no free index
        self._index: OrderedDict[str, int] = OrderedDict()  # least recently valid first

    @property
    def num_used(self) -> int:
        """Number of indices that have been assigned. These are the indices below it."""
        return len(self._index)

    def keep(self, actions: Sequence[str]) -> tuple[str, ...]:
        """The first ``capacity`` actions. The others are counted as overflows."""
        self.num_overflows += max(0, len(actions) - self.capacity)
        return tuple(actions[: self.capacity])

    def indices(self, actions: Sequence[str]) -> np.ndarray:
        """Distinct indices of at most ``capacity`` actions, ``[K]`` int64."""
        for action in actions:
            if action in self._index:
                self._index.move_to_end(action)
        for action in actions:
            if action not in self._index:
                if len(self._index) < self.capacity:
                    self._index[action] = len(self._index)
                else:
                    _, index = self._index.popitem(last=False)
                    self._index[action] = index
                    self.num_overflows += 1
        return np.array([self._index[action] for action in actions], dtype=np.int64)

    def texts(self) -> dict[int, str]:
        """The action that has each index."""
        state = self.state_dict()
        return dict(zip(state["indices"], state["actions"], strict=True))

    def state_dict(self) -> Plain:
        return {
            "actions": list(self._index),
            "indices": list(self._index.values()),
            "num_overflows": self.num_overflows,
        }

    def load_state_dict(self, state: Plain) -> None:
        self._index = OrderedDict(zip(state["actions"], state["indices"], strict=True))
        self.num_overflows = state["num_overflows"]
