"""Small policies for tests: one to learn with, one to search with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from priorzero.config import resolve_settings
from priorzero.llm.models import LanguageModel
from priorzero.policy import PriorZeroPolicy
from priorzero.search.base import Root
from priorzero.search.root import NUM_BINS
from priorzero.world_model.replay import PriorZeroGameBuffer
from tests.helpers.segments import FEATURE_SIZE, WORLD_MODEL, demo_segments


def make_policy_and_buffer(
    llm: LanguageModel | None = None, *, seed: int = 0
) -> tuple[PriorZeroPolicy, PriorZeroGameBuffer]:
    """A policy for batches of 8 sequences, and a buffer with 31 decisions of three episodes."""
    settings = resolve_settings(
        {
            "env": {"action_space_size": 8},
            "world_model": WORLD_MODEL,
            "replay": {"segment_length": 6},
            "train": {"batch_size": 8, "td_steps": 2, "learning_rate": 1e-2, "grad_clip": 1e9},
            "llm": {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2},
        }
    )
    torch.manual_seed(seed)
    policy = PriorZeroPolicy(settings, feature_size=FEATURE_SIZE, device="cpu", llm=llm)
    buffer = PriorZeroGameBuffer(policy.lightzero_config, rng=np.random.default_rng(seed))
    buffer.push(demo_segments(policy.lightzero_config, lengths=[5, 17, 9]))
    return policy, buffer


def make_search_policy(**search: Any) -> PriorZeroPolicy:
    """A policy without an LLM whose world model predicts different values for different actions.

    ``search`` are changes to the ``search`` settings.
    """
    settings = resolve_settings(
        {
            "env": {"action_space_size": 16},
            "world_model": {**WORLD_MODEL, "embed_dim": 32, "context_length": 8, "dropout": 0.1},
            "search": {"num_simulations": 16, **search},
            "prior": {"enabled": False, "floor": 0.0},
            "train": {"batch_size": 4, "td_steps": 2},
            "eval": {"modes": ["world_model"]},
        }
    )
    torch.manual_seed(0)
    policy = PriorZeroPolicy(settings, feature_size=FEATURE_SIZE, device="cpu", llm=None)
    generator = torch.Generator().manual_seed(0)
    for p in policy.network.parameters():  # LightZero initialises the heads with zeros
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return policy


def zero_heads(policy: PriorZeroPolicy, *names: str) -> None:
    """Let heads of the world model return the same output for all inputs, ``policy``, ``value`` or ``rewards``."""
    with torch.no_grad():
        for name in names:
            last = policy.network.world_model.get_submodule(f"head_{name}").head_module[-1]
            last.weight.zero_()
            last.bias.zero_()


def make_root(
    seed: int = 0,
    *,
    num_actions: int = 12,
    length: int = 1,
    legal: Any = (0, 3, 5, 9),
    prior: Any = None,
    prior_weight: float = 0.5,
    noise: bool = False,
) -> Root:
    """A root with a history of ``length`` random observations; ``prior`` and ``noise`` are over ``legal``."""
    rng = np.random.default_rng(seed)
    return Root(
        features=rng.normal(size=(length, FEATURE_SIZE)).astype(np.float32),
        actions=rng.integers(num_actions, size=length - 1),
        legal_actions=np.array(legal),
        prior_logprobs=None if prior is None else np.log(np.array(prior)).astype(np.float32),
        prior_weights=None if prior is None else np.full(NUM_BINS, prior_weight),
        noise=rng.dirichlet(np.ones(len(legal))) if noise else None,
        seed=seed,
    )
