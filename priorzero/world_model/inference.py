"""Inference with UniZero's world model in which every state has its own context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from priorzero.runtime.cuda_graphs import CudaGraphs
from priorzero.search.base import Root

SCALING_EPSILON = 0.001  # of the transformation of values and rewards


@dataclass(frozen=True)
class Context:
    """A sequence of token embeddings: observation, action, ..., observation.

    Attributes:
        tokens: ``[T, E]``, zero from ``length`` on; T is ``context_length``.
        length: the number of tokens, at most ``context_length - 1``.
    """

    tokens: Tensor
    length: int


class WorldModelInference:
    """Implements :class:`~priorzero.search.base.SearchModel` with contexts of the type :class:`Context`.

    Positions count from the start of a context, as in training. Contexts of a batch are padded on the right, which a
    causal model does not attend to, so that a result does not depend on the rest of the batch beyond rounding.

    On a GPU, the two forward passes of a simulation are CUDA graphs: they consist of about 150 small kernels, and
    starting these one by one takes longer than running them.

    Args:
        model: LightZero's ``UniZeroModel``.
    """

    def __init__(self, model: Any) -> None:
        self._world_model = model.world_model
        self.context_length = int(self._world_model.context_length)
        self._device: torch.device = self._world_model.pos_emb.weight.device
        scale = self._world_model.config.support_size // 2
        self._support = torch.arange(-scale, scale + 1, dtype=torch.float32, device=self._device)
        self._is_cuda = self._device.type == "cuda"
        self._run_step: Callable[..., tuple[Tensor, ...]] = self.step_tensors
        self._run_predict: Callable[..., tuple[Tensor, ...]] = self.predict_tensors
        if self._is_cuda:
            self._run_step, self._run_predict = CudaGraphs(self.step_tensors), CudaGraphs(self.predict_tensors)

    def root_contexts(self, roots: Sequence[Root]) -> list[Context]:
        lengths = [2 * len(root.features) - 1 for root in roots]
        observations = self._embed_observations(np.concatenate([root.features for root in roots]))
        actions = self._to_device(np.concatenate([root.actions for root in roots]).astype(np.int64))
        tokens = observations.new_zeros(len(roots), self.context_length, observations.shape[1])
        row, token = self._places([range(0, length, 2) for length in lengths])
        tokens[row, token] = observations
        row, token = self._places([range(1, length, 2) for length in lengths])
        tokens[row, token] = self._world_model.act_embedding_table(actions)
        return [Context(own, length) for own, length in zip(tokens, lengths, strict=True)]

    def predict(self, contexts: Sequence[Context]) -> tuple[np.ndarray, np.ndarray]:
        padded = self._padded(contexts)
        lengths = [context.length for context in padded]
        tokens = self._stack(padded, width=max(lengths))
        policy_logits, values = self._run_predict(tokens, self._to_device(np.array(lengths)))
        return policy_logits[: len(contexts)].cpu().numpy(), values[: len(contexts)].cpu().numpy()

    def step(self, contexts: Sequence[Context], actions: np.ndarray) -> tuple[list[Context], np.ndarray]:
        padded = self._padded(contexts)
        lengths = [context.length for context in padded]
        tokens = self._stack(padded, width=max(lengths) + 1)
        actions = np.pad(actions, (0, len(padded) - len(contexts)))
        followed, rewards = self._run_step(tokens, *self._to_device(np.array([lengths, actions])))
        children = [
            Context(own, context.length + 2 if context.length + 2 < self.context_length else context.length)
            for own, context in zip(followed[: len(contexts)], contexts, strict=True)
        ]
        return children, rewards[: len(contexts)].cpu().numpy()

    def _padded(self, contexts: Sequence[Context]) -> list[Context]:
        """On a GPU, the contexts and copies of the first one up to the next power of two, so that few graphs occur."""
        missing = (1 << (len(contexts) - 1).bit_length()) - len(contexts) if self._is_cuda else 0
        return [*contexts, *[contexts[0]] * missing]

    def _stack(self, contexts: Sequence[Context], *, width: int) -> Tensor:
        """The tokens of n contexts, ``[n, width, E]``; on a GPU ``[n, T, E]``, since a graph has fixed shapes."""
        tokens = torch.stack([context.tokens for context in contexts])
        return tokens if self._is_cuda else tokens[:, :width]

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _places(self, tokens: Sequence[range]) -> tuple[Tensor, Tensor]:
        """The row and the token of each entry of ``tokens``, one row after the other."""
        rows = np.repeat(np.arange(len(tokens)), [len(own) for own in tokens])
        return self._to_device(rows), self._to_device(np.concatenate([np.array(own, np.int64) for own in tokens]))

    def _embed_observations(self, features: np.ndarray) -> Tensor:
        """Token embeddings ``[n, E]`` of features ``[n, F]``."""
        inputs = torch.as_tensor(features, dtype=torch.float32, device=self._device)
        embeddings: Tensor = self._world_model.tokenizer.encode_to_obs_embeddings(inputs)[:, 0]
        return embeddings

    # ---- forward passes; they read no result, so that a CUDA graph can record them ----

    def predict_tensors(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Policy logits ``[n, A]`` and values ``[n]`` of contexts ``[n, t, E]`` with ``lengths`` ``[n]``."""
        hidden = self._hidden(tokens, lengths - 1)
        policy_logits = self._world_model.head_policy.head_module(hidden)
        return policy_logits, self._to_scalar(self._world_model.head_value.head_module(hidden))

    def step_tensors(self, tokens: Tensor, lengths: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens ``[n, T, E]`` after one action ``[n]`` each, and the predicted rewards ``[n]``.

        ``tokens`` are ``[n, t, E]``, with ``t`` larger than the ``lengths`` ``[n]``.
        """
        rows = torch.arange(len(tokens), device=self._device)
        extended = tokens.index_put((rows, lengths), self._world_model.act_embedding_table(actions))
        hidden = self._hidden(extended, lengths)
        observations = self._world_model.head_observations.head_module(hidden)  # (n, E)
        free = extended.new_zeros(len(tokens), self.context_length + 2 - tokens.shape[1], tokens.shape[2])
        followed = torch.cat([extended, free], dim=1).index_put((rows, lengths + 1), observations)  # (n, T + 2, E)
        # A step is dropped as a whole, two tokens, so that a context still begins with an observation.
        dropped = 2 * (lengths + 2 >= self.context_length).long()
        kept = torch.arange(self.context_length, device=self._device) + dropped[:, None]  # (n, T)
        return followed[rows[:, None], kept], self._to_scalar(self._world_model.head_rewards.head_module(hidden))

    def _hidden(self, tokens: Tensor, last: Tensor) -> Tensor:
        """The transformer's output for contexts ``[n, t, E]`` at the positions ``last`` ``[n]``, ``[n, E]``."""
        positions = self._world_model.pos_emb(torch.arange(tokens.shape[1], device=self._device))
        hidden: Tensor = self._world_model.transformer(tokens + positions)
        return hidden[torch.arange(len(tokens), device=self._device), last]

    def _to_scalar(self, logits: Tensor) -> Tensor:
        """The scalars ``[n]`` that categorical logits ``[n, support]`` represent (MuZero, appendix F).

        LightZero's function leaves out the softmax if the logits of all rows happen to sum to one, and reads them back
        to find out.
        """
        value = (torch.softmax(logits, dim=1) * self._support).sum(dim=1)
        root = torch.sqrt(1 + 4 * SCALING_EPSILON * (value.abs() + 1 + SCALING_EPSILON))
        scaled = (root - 1) / (2 * SCALING_EPSILON)
        return torch.sign(value) * (scaled * scaled - 1)
