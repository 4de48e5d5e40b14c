"""Settings and language models for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from bench_tools import SMALL_SETTINGS

from priorzero.config import resolve_settings
from priorzero.llm.models import LanguageModel
from priorzero.llm.packing import PromptRow, register_tree_attention
from priorzero.settings import Settings


def make_settings(*layers: dict[str, dict[str, Any]]) -> Settings:
    """Settings for small models and short prompts, with changes."""
    return resolve_settings(SMALL_SETTINGS, *layers)


def make_tiny_llm(tokenizer: Any, *, seed: int = 0, **changes: Any) -> LanguageModel:
    """A small random Llama behind a real tokenizer: a real model for tests that train it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **{**sizes, **changes})
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(register_tree_attention())
    return LanguageModel(model.eval(), tokenizer, torch.float32)


class SmallMemory:
    """A language model on a GPU whose memory suffices for ``largest`` rows; records the rows of each forward pass."""

    def __init__(self, llm: LanguageModel, *, largest: int) -> None:
        self._llm = llm
        self.largest = largest
        self.num_rows: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def token_logprobs(self, rows: Sequence[PromptRow], **kwargs: Any) -> Any:
        self.num_rows.append(len(rows))
        if len(rows) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._llm.token_logprobs(rows, **kwargs)
