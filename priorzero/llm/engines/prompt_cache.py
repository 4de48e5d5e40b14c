"""Key-value cache of earlier prompts, so that only the new tokens of a prompt are computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class PromptCache:
    """Keys and values of the latest prompts under one set of parameters. Call :meth:`clear` when those change.

    The least recently stored prompt is dropped first. A lookup does not count as a use: a prompt that another one
    continues is not requested again, and keeping it would drop prompts of other games that will be continued.
    ``max_tokens`` limits the tokens of all prompts together.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._prompts: OrderedDict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = OrderedDict()
        self.num_tokens = 0
        self._requested_tokens = 0
        self._found_tokens = 0

    def lookup(self, ids: Sequence[int]) -> Any:
        """The cached keys and values of the longest known prefix of a prompt of at least one token.

        The result is a new transformers ``DynamicCache``. It never contains the last token, whose logits are needed.
        """
        from transformers import DynamicCache

        best, length = None, 0
        for known in self._prompts:
            common = _common_prefix_length(known, ids)
            if common > length:
                best, length = known, common
        length = min(length, len(ids) - 1)
        past = DynamicCache()
        if best is not None and length:
            for layer, (keys, values) in enumerate(self._prompts[best]):
                past.update(keys[..., :length, :], values[..., :length, :], layer)
        self._requested_tokens += len(ids)
        self._found_tokens += length
        return past

    def store(self, ids: Sequence[int], past: Any) -> None:
        """Store a prompt's part of ``past``, the ``DynamicCache`` after the forward pass."""
        n = len(ids)
        if n > self._max_tokens:
            return
        self._drop(tuple(ids))
        # Cloned, because a slice would keep the memory of the tokens after the prompt.
        self._prompts[tuple(ids)] = [
            (layer.keys[..., :n, :].clone(), layer.values[..., :n, :].clone()) for layer in past.layers
        ]
        self.num_tokens += n
        while self.num_tokens > self._max_tokens:
            self._drop(next(iter(self._prompts)))

    def _drop(self, ids: tuple[int, ...]) -> None:
        if self._prompts.pop(ids, None) is not None:
            self.num_tokens -= len(ids)

    def clear(self) -> None:
        self._prompts.clear()
        self.num_tokens = 0

    def take_hit_rate(self) -> float:
        """Share of the prompt tokens since the last call that were found in the cache."""
        rate = self._found_tokens / max(1, self._requested_tokens)
        self._requested_tokens = self._found_tokens = 0
        return rate


def _common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))
