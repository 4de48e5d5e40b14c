"""Merges a low-rank adapter into its base model, and checks the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from loguru import logger

from priorzero.llm.adapter_files import AdapterFiles, training_settings
from priorzero.types import UserError

# Largest allowed difference of a log-probability before and after, in nats. Rounding in float32 causes less, also on a
# GPU. peft merges some adapters wrongly, for example one on an output layer that shares its weights with the input
# embedding: the other layer then changes, too.
TOLERANCE = 0.03
MAX_TRAINED_TOKENS = 32


@torch.no_grad()
def merge_adapter(model: Any, adapter: AdapterFiles, *, token_ids: Sequence[int]) -> Any:
    """The base model of a peft model, with the adapter in its parameters.

    Args:
        model: the peft model, in eval mode and float32. It cannot be used afterwards.
        adapter: its files, for messages.
        token_ids: a text on which the log-probabilities before and after are compared.

    Raises:
        UserError: the adapter cannot be merged, or the log-probabilities change.
    """
    ids = [*token_ids, *_trained_tokens(adapter)]
    before = _logprobs(model, ids)
    try:
        merged = model.merge_and_unload().eval()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # peft raises errors of several types
        raise _not_merged(adapter, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    difference = float((_logprobs(merged, ids) - before).abs().max())
    if difference >= TOLERANCE:  # False for NaN, which is reported when the whole model is checked
        raise _not_merged(adapter, f"its log-probabilities would change by up to {difference:.2g} nats")
    logger.info(f"merged the adapter {adapter.folder} into {adapter.base}; llm.use_lora=false")
    return merged.requires_grad_(True)


def _trained_tokens(adapter: AdapterFiles) -> list[int]:
    """The first tokens whose rows of the embedding the adapter replaces; other tokens do not show a wrong merge."""
    indices = adapter.config.get("trainable_token_indices") or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return [token for tokens in lists for token in tokens][:MAX_TRAINED_TOKENS]


def _logprobs(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of all tokens of the vocabulary after each token, ``[T, V]``."""
    logits = model(input_ids=torch.tensor([list(token_ids)], device=model.device), use_cache=False).logits[0]
    return logits.float().log_softmax(dim=-1)


def _not_merged(adapter: AdapterFiles, reason: str) -> UserError:
    settings = training_settings(adapter)
    advice = "give another adapter, or a whole model"
    if settings is not None:
        advice = f"type {settings} to continue training the adapter without merging it, or give a whole model"
    return UserError(f"{adapter.what}: this adapter cannot be merged into its base model ({reason}); {advice}")
