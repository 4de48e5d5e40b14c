"""Builds the prior engine from the settings. A prior server imports this module and does not need LightZero."""

from __future__ import annotations

from pathlib import Path

from priorzero.llm.engines.base import PriorBuilder
from priorzero.llm.engines.hf import TransformersEngine
from priorzero.llm.engines.vllm import VLLMEngine
from priorzero.llm.engines.vllm_process import unsupported_adapter_parts
from priorzero.llm.model_files import find_llm, local_model
from priorzero.llm.models import LanguageModel
from priorzero.llm.prompts import prompt_style
from priorzero.settings import Settings
from priorzero.types import PriorEngine, UserError


def make_engine(settings: Settings, *, llm: LanguageModel, vllm_log: Path) -> PriorEngine:
    """The prior engine that ``prior.engine`` names (not ``auto``). It is not started.

    Raises:
        UserError: vLLM cannot serve the LLM's adapter, or ``vllm.max_model_len`` exceeds the LLM's context.
    """
    builder = PriorBuilder(
        llm,
        prompt_style(settings),
        temperature=settings.prior.temperature,
        generate_max_len=settings.llm.generate_max_len,
    )
    if settings.prior.engine == "transformers":
        if llm.device.type == "cpu":  # one row keeps a CPU busy and can use the prompt cache
            cached_tokens = settings.prior.prompt_cache_tokens
            return TransformersEngine(builder, rows_per_forward=1, prompt_cache_tokens=cached_tokens)
        # The time of a small forward pass on a GPU hardly depends on its number of tokens, so many requests at once
        # save more than a prompt cache, which allows only one.
        return TransformersEngine(builder)
    source = find_llm(settings.llm)
    unsupported = unsupported_adapter_parts(llm.model) if hasattr(llm.model, "peft_config") else []
    if unsupported:
        what = source.adapter.what if source.adapter is not None else f"llm.path={settings.llm.path}"
        raise UserError(
            f"{what}: vLLM cannot serve an adapter with {', '.join(unsupported)}; type --engine transformers, or "
            "--set llm.use_lora=false to merge the adapter into its base model"
        )
    max_model_len = max(4096, 2 * (settings.llm.prompt_max_len + settings.llm.generate_max_len))
    if llm.max_length is not None:
        max_model_len = min(max_model_len, llm.max_length)
        if settings.vllm.max_model_len > llm.max_length:
            raise UserError(
                f"vllm.max_model_len={settings.vllm.max_model_len} exceeds the model's {llm.max_length} tokens; "
                "leave it at 0"
            )
    return VLLMEngine(
        builder,
        model=local_model(source.model),
        cfg=settings.vllm.model_copy(update={"max_model_len": settings.vllm.max_model_len or max_model_len}),
        log_file=vllm_log,
        trust_remote_code=settings.llm.trust_remote_code,
    )
