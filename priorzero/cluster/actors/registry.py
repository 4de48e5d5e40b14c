"""The registry: the action vocabulary of all collectors, and the LLM's latest parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from priorzero.play.action_vocabulary import ActionVocabulary
from priorzero.settings import Settings
from priorzero.types import Plain

REGISTRY = "registry"  # its name in Ray's namespace of the run


class Registry:
    """Assigns action indices for all collectors, and keeps the LLM parameters that were published last."""

    def __init__(self, settings: Settings) -> None:
        self._vocabulary = ActionVocabulary(settings.env.num_actions)
        self._num_collectors = 0
        self._version = 0
        self._parameters: list[Any] = []

    def new_collector(self) -> int:
        """A number that no other collector has had."""
        self._num_collectors += 1
        return self._num_collectors - 1

    def assign(self, actions: Sequence[str]) -> tuple[np.ndarray, int, int]:
        """Indices of actions, ``[K]``, and ``num_used`` and ``num_overflows`` of the vocabulary."""
        return self._vocabulary.indices(actions), self._vocabulary.num_used, self._vocabulary.num_overflows

    def actions(self) -> Plain:
        """State of the vocabulary."""
        return self._vocabulary.state_dict()

    def publish(self, version: int, parameters: list[Any]) -> None:
        """Keep the LLM's parameters: a list with Ray's reference to them. Ray does not resolve references in lists."""
        self._version, self._parameters = version, parameters

    def published(self) -> tuple[int, list[Any]]:
        """The arguments of the last :meth:`publish`; ``(0, [])`` if there was none."""
        return self._version, self._parameters


class RemoteVocabulary(ActionVocabulary):
    """Gets its indices from the :class:`Registry`, whose handle is ``registry``.

    Known indices are cached until the first overflow. A collector that has not called the registry since then still
    uses the old index of an action that was replaced.
    """

    def __init__(self, registry: Any, *, capacity: int, timeout_s: float) -> None:
        super().__init__(capacity)
        self._registry = registry
        self._timeout_s = timeout_s
        self._num_used = 0
        self._num_replaced = 0  # overflows of the registry

    @property
    def num_used(self) -> int:
        return self._num_used

    def indices(self, actions: Sequence[str]) -> np.ndarray:
        if self.num_overflows == 0 and all(action in self._index for action in actions):
            return np.array([self._index[action] for action in actions], dtype=np.int64)
        assigned = ray.get(self._registry.assign.remote(list(actions)), timeout=self._timeout_s)
        indices, self._num_used, num_replaced = assigned
        self.num_overflows += num_replaced - self._num_replaced
        self._num_replaced = num_replaced
        self._index.update(zip(actions, indices.tolist(), strict=True))
        return indices

    def __deepcopy__(self, memo: Any) -> ActionVocabulary:
        """A local copy, which evaluation can add actions to without changing the registry."""
        copied = ActionVocabulary(self.capacity)
        copied.load_state_dict(self.state_dict())
        return copied

    def state_dict(self) -> Plain:
        state: Plain = ray.get(self._registry.actions.remote(), timeout=self._timeout_s)
        return state

    def load_state_dict(self, state: Plain) -> None:
        raise RuntimeError("a collector cannot change the registry's indices")
