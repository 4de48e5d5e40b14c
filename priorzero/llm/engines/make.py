"""Builds the prior engine from the settings. A prior server imports this module and does not need LightZero."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from priorzero.llm.engines.base import PriorBuilder
from priorzero.llm.engines.hf import TransformersEngine
from priorzero.llm.engines.retry import RetryingPrior
from priorzero.llm.engines.vllm import VLLMEngine
from priorzero.llm.models import LanguageModel, resolve_model
from priorzero.llm.prompts import prompt_style
from priorzero.runtime.timeline import Timeline
from priorzero.settings import Settings
from priorzero.types import PriorEngine, UserError


def choose_engine(settings: Settings, *, device: torch.device) -> Literal["vllm", "transformers"]:
    """The engine that ``prior.engine`` names; ``auto`` is vLLM on a GPU and transformers on a CPU.

    Raises:
        UserError: it is vLLM, which is not installed.
    """
    engine = settings.prior.engine
    if engine == "auto":
        engine = "vllm" if device.type == "cuda" else "transformers"
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        how = "pip install --no-deps -r requirements/gpu.txt" if device.type == "cuda" else "scripts/set_up.sh test"
        raise UserError(
            f"prior.engine={settings.prior.engine}: vLLM is not installed; type {how}, or use --engine transformers"
        )
    return engine


def make_engine(settings: Settings, *, llm: LanguageModel, vllm_log: Path) -> PriorEngine:
    """The prior engine that ``prior.engine`` names (not ``auto``). It is not started.

    Raises:
        UserError: settings of vLLM do not fit the model or the machine.
    """
    builder = PriorBuilder(
        llm,
        prompt_style(settings),
        temperature=settings.prior.temperature,
        generate_max_len=settings.llm.generate_max_len,
    )
    if settings.prior.engine == "transformers":
        if llm.device.type == "cpu":  # one row keeps a CPU busy and can use the prompt cache
            num_tokens = settings.prior.prompt_cache_tokens
            return TransformersEngine(builder, rows_per_forward=1, prompt_cache_tokens=num_tokens)
        return TransformersEngine(builder, rows_per_forward=16)
    max_model_len = max(4096, 2 * (settings.llm.prompt_max_len + settings.llm.generate_max_len))
    if llm.max_length is not None:
        max_model_len = min(max_model_len, llm.max_length)
        if settings.vllm.max_model_len > llm.max_length:
            raise UserError(
                f"vllm.max_model_len={settings.vllm.max_model_len} exceeds the model's {llm.max_length} tokens; "
                "leave it at 0"
            )
    if settings.vllm.sleep and llm.device.type == "cpu":
        raise UserError("vllm.sleep=true needs a GPU, but this run uses the CPU; leave it out")
    return VLLMEngine(
        builder,
        model=resolve_model(settings.llm.path, setting="llm.path"),
        cfg=settings.vllm,
        max_model_len=settings.vllm.max_model_len or max_model_len,
        log_file=vllm_log,
        trust_remote_code=settings.llm.trust_remote_code,
    )


def make_prior(
    settings: Settings,
    engine: PriorEngine,
    *,
    timeout_s: float,
    sync_every: int = 1,
    max_staleness: int = 1,
    learner_version: Callable[[], int] | None = None,
    timeline: Timeline | None = None,
) -> RetryingPrior:
    """An engine with the retries of the settings; the arguments are those of :class:`RetryingPrior`."""
    return RetryingPrior(
        engine,
        attempts=settings.prior.attempts,
        backoff_s=settings.prior.backoff_s,
        timeout_s=timeout_s,
        sync_every=sync_every,
        max_staleness=max_staleness,
        learner_version=learner_version,
        timeline=timeline,
    )
