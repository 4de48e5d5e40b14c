"""Inference with UniZero's world model in which every state has its own context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from priorzero.search.base import Root


class WorldModelInference:
    """Implements :class:`~priorzero.search.base.SearchModel`.

    A context is a sequence of token embeddings ``[t, E]``: observation, action, ..., observation. It has at most
    ``context_length - 1`` tokens. Positions count from its start, as in training. Contexts of a batch are padded on the
    right, which a causal model does not attend to, so that a result does not depend on the rest of the batch.

    Args:
        model: LightZero's ``UniZeroModel``.
        to_scalar: turns categorical logits ``[n, support]`` into scalars ``[n, 1]``.
    """

    def __init__(self, model: Any, *, to_scalar: Callable[[Tensor], Tensor]) -> None:
        self._world_model = model.world_model
        self._to_scalar = to_scalar
        self.context_length = int(self._world_model.context_length)

    def root_contexts(self, roots: Sequence[Root]) -> list[Tensor]:
        embeddings = self._embed_observations(np.concatenate([root.features for root in roots])).split(
            [len(root.features) for root in roots]
        )
        contexts = []
        for root, observations in zip(roots, embeddings, strict=True):
            tokens = observations.new_empty(2 * len(observations) - 1, observations.shape[1])
            tokens[0::2] = observations
            if len(observations) > 1:
                tokens[1::2] = self._embed_actions(root.actions)
            contexts.append(tokens)
        return contexts

    def predict(self, contexts: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        hidden = self._last_hidden(contexts)
        policy_logits = self._world_model.head_policy.head_module(hidden)
        values = self._to_scalar(self._world_model.head_value.head_module(hidden))
        return policy_logits.cpu().numpy(), values.reshape(-1).cpu().numpy()

    def step(self, contexts: Sequence[Tensor], actions: np.ndarray) -> tuple[list[Tensor], np.ndarray]:
        embedded = self._embed_actions(actions)
        extended = [torch.cat([tokens, embedded[i : i + 1]]) for i, tokens in enumerate(contexts)]
        hidden = self._last_hidden(extended)
        rewards = self._to_scalar(self._world_model.head_rewards.head_module(hidden)).reshape(-1).cpu().numpy()
        observations = self._world_model.head_observations.head_module(hidden)  # (n, E)
        followed = [torch.cat([tokens, observations[i : i + 1]]) for i, tokens in enumerate(extended)]
        # A step is dropped as a whole, two tokens, so that a context still begins with an observation.
        return [tokens[2:] if len(tokens) > self.context_length - 1 else tokens for tokens in followed], rewards

    def _embed_observations(self, features: np.ndarray) -> Tensor:
        """Token embeddings ``[n, E]`` of features ``[n, F]``."""
        inputs = torch.as_tensor(features, dtype=torch.float32, device=self._world_model.device)
        embeddings: Tensor = self._world_model.tokenizer.encode_to_obs_embeddings(inputs)[:, 0]
        return embeddings

    def _embed_actions(self, actions: np.ndarray) -> Tensor:
        """Token embeddings ``[n, E]`` of action indices ``[n]``."""
        embeddings: Tensor = self._world_model.act_embedding_table(
            torch.as_tensor(actions, device=self._world_model.device)
        )
        return embeddings

    def _last_hidden(self, contexts: Sequence[Tensor]) -> Tensor:
        """The transformer's output at the last token of each context, ``[n, E]``."""
        lengths = torch.tensor([len(tokens) for tokens in contexts])
        padded = torch.nn.utils.rnn.pad_sequence(list(contexts), batch_first=True)  # (n, T, E)
        positions = self._world_model.pos_emb(torch.arange(padded.shape[1], device=padded.device))
        hidden: Tensor = self._world_model.transformer(padded + positions)
        return hidden[torch.arange(len(contexts)), lengths - 1]
