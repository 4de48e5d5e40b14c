"""Chooses the prior engine. Imports no torch."""

from __future__ import annotations

import importlib.util
from typing import Literal

from priorzero.settings import Settings
from priorzero.types import UserError


def choose_engine(settings: Settings, *, device: str) -> Literal["vllm", "transformers"]:
    """The engine that ``prior.engine`` names; ``auto`` is vLLM on a GPU and transformers on a CPU.

    Args:
        settings: all settings.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: vLLM is not installed, or a setting of it needs a GPU.
    """
    engine = settings.prior.engine
    if engine == "auto":
        engine = "vllm" if device == "cuda" else "transformers"
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        how = "pip install --no-deps -r requirements/gpu.txt" if device == "cuda" else "scripts/set_up.sh test"
        raise UserError(
            f"prior.engine={settings.prior.engine}: vLLM is not installed; type {how}, or use --engine transformers"
        )
    if engine == "vllm" and device == "cpu":
        if settings.vllm.sleep:
            raise UserError("vllm.sleep=true needs a GPU, but this run uses the CPU; leave it out")
        if settings.vllm.tensor_parallel_size > 1:
            raise UserError(
                f"vllm.tensor_parallel_size={settings.vllm.tensor_parallel_size} needs that many GPUs, but this run "
                "uses the CPU; leave it out"
            )
    return engine
