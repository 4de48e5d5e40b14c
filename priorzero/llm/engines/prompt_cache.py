"""Keys and values of earlier prompts: where a prompt goes on from one of them, only what is new is computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class PromptCache:
    """The latest prompts of one model under one set of parameters; whoever changes those calls :meth:`clear`.

    Args:
        max_tokens: tokens kept, of all prompts together; the prompt asked longest ago goes first. (One that another
            went on from is not asked again: to keep it longer would drive out what other games go on from.)
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._prompts: OrderedDict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = OrderedDict()
        self.num_tokens = 0
        self._asked = 0
        self._found = 0

    def begin(self, ids: Sequence[int]) -> Any:
        """What is known of the beginning of a prompt.

        Args:
            ids: the prompt's tokens, at least one.

        Returns:
            A transformers ``DynamicCache`` of its own, with as many of the prompt's tokens as possible but its last.
        """
        from transformers import DynamicCache

        best, length = None, 0
        for known in self._prompts:
            common = _common(known, ids)
            if common > length:
                best, length = known, common
        length = min(length, len(ids) - 1)
        past = DynamicCache()
        if best is not None and length:
            for layer, (keys, values) in enumerate(self._prompts[best]):
                past.update(keys[..., :length, :], values[..., :length, :], layer)
        self._asked += len(ids)
        self._found += length
        return past

    def keep(self, ids: Sequence[int], past: Any) -> None:
        """Remember a prompt.

        Args:
            ids: its tokens.
            past: the ``DynamicCache`` after the forward pass; what comes behind the prompt is left out.
        """
        n = len(ids)
        if n > self._max_tokens:
            return
        self._forget(tuple(ids))
        # Copies: a slice would keep alive what comes behind it.
        self._prompts[tuple(ids)] = [
            (layer.keys[..., :n, :].clone(), layer.values[..., :n, :].clone()) for layer in past.layers
        ]
        self.num_tokens += n
        while self.num_tokens > self._max_tokens:
            self._forget(next(iter(self._prompts)))

    def _forget(self, ids: tuple[int, ...]) -> None:
        if self._prompts.pop(ids, None) is not None:
            self.num_tokens -= len(ids)

    def clear(self) -> None:
        """Forget everything: the parameters have changed."""
        self._prompts.clear()
        self.num_tokens = 0

    def take_hit_rate(self) -> float:
        """Share of the tokens of the prompts since the last call that were known."""
        rate = self._found / max(1, self._asked)
        self._asked = self._found = 0
        return rate


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))
