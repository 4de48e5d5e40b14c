"""Frozen text features: every text is encoded once, when it is first seen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from priorzero.llm.models import resolve_model
from priorzero.runtime.quiet import quiet_transformers
from priorzero.types import GameState, UserError

# Among a thousand entries of embeddings two numbers drown, and with them what tells one more point from one less.
COUNTER_COPIES = 64


class TextEncoder:
    """A pretrained sentence encoder, kept as it was pretrained.

    Each text's embedding has unit length and is then multiplied by ``sqrt(D)``, which gives its entries a variance of
    about one.

    Args:
        path: ``package:NAME``, a folder, or a hub id.
        device: where it runs.
        cache_size: texts whose features are kept.
        pooling: ``"mean"`` over the tokens (Reimers & Gurevych 2019), or ``"cls"``: the first token.
        parts: ``"apart"`` encodes feedback, room and inventory each by itself, ``"together"`` as one text.
        with_look: whether states carry room and inventory (decides ``F``).
        max_moves: scale of the move counter among the features.

    Raises:
        UserError: the encoder cannot be found or loaded.
    """

    def __init__(
        self,
        path: str,
        *,
        device: torch.device | str = "cpu",
        pooling: str = "mean",
        parts: str = "apart",
        cache_size: int,
        with_look: bool,
        max_moves: int,
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        quiet_transformers()
        name = resolve_model(path, setting="encoder.path")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
            self._model = AutoModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"encoder.path={path}: cannot be loaded ({str(error).strip().splitlines()[0]})") from error
        self._model.requires_grad_(False)
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._cache_size = cache_size
        self._pooling = pooling
        self._parts = parts
        self._with_look = with_look
        self._max_moves = max_moves
        self.embedding_size = int(self._model.config.hidden_size)

    @property
    def feature_size(self) -> int:
        """``F``."""
        return self.embedding_size * (3 if self._with_look and self._parts == "apart" else 1) + 2 * COUNTER_COPIES

    def features(self, states: Sequence[GameState]) -> np.ndarray:
        """Features of some states, ``[n, F]`` float32: embeddings, share of points, share of moves."""
        parts = [self._texts(state) for state in states]
        self._encode_missing(sorted({text for texts in parts for text in texts}))
        rows = [
            np.concatenate([*(self._cache[text] for text in texts), self._counters(state)])
            for state, texts in zip(states, parts, strict=True)
        ]
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return np.stack(rows).astype(np.float32)

    def _texts(self, state: GameState) -> list[str]:
        texts = [state.feedback, state.look, state.inventory] if self._with_look else [state.feedback]
        return texts if self._parts == "apart" else ["\n".join(texts)]

    def _counters(self, state: GameState) -> np.ndarray:
        points = state.score / state.max_score if state.max_score else state.score / 100.0
        return np.repeat([points, state.moves / self._max_moves], COUNTER_COPIES)

    @torch.inference_mode()
    def _encode_missing(self, texts: list[str]) -> None:
        for text in texts:
            if text in self._cache:
                self._cache.move_to_end(text)
                continue
            # One text at a time: padding to a neighbour's length would change the last digits of the features, and
            # with them, now and then, a search.
            inputs = self._tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            hidden = self._model(**inputs.to(self._model.device)).last_hidden_state[0]  # (T, D)
            unit = (
                torch.nn.functional.normalize((hidden.mean(dim=0) if self._pooling == "mean" else hidden[0]), dim=0)
                * self.embedding_size**0.5
            )
            self._cache[text] = unit.cpu().numpy()
