"""Fixtures that several test files share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ["PRIORZERO_ACTION_CACHE"] = "off"  # no test may find what another one, or a run, has left

from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # the models of most tests are so small that threads only wait for one another

from priorzero.config import PRESETS, resolve_settings  # noqa: E402
from priorzero.models import LanguageModel, load_language_model  # noqa: E402


def make_settings(*layers: dict[str, dict[str, Any]]) -> Any:
    """The quick test's settings with changes."""
    return resolve_settings(PRESETS["quick_test"], *layers)


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """SmolLM2-135M from its package, float32 on the CPU. Tests must leave its parameters as they are."""
    return load_language_model(make_settings().llm, device=torch.device("cpu"))


def make_tiny_llm(tokenizer: Any, *, seed: int = 0, **changes: Any) -> LanguageModel:
    """A small random Llama behind a real tokenizer: a real model for tests that train it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        **{"max_position_embeddings": 1024, **changes},
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("sdpa")
    return LanguageModel(model.eval(), tokenizer, torch.float32)


@pytest.fixture
def tiny_llm(smollm2: LanguageModel) -> LanguageModel:
    return make_tiny_llm(smollm2.tokenizer)
