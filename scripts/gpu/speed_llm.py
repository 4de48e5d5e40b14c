"""Speed of the language model: priors and updates, for the shapes of SmolLM2-135M and of Qwen2.5-0.5B."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from bench_llm import records_of
from bench_prior import RecordingEngine, num_new_tokens, num_reference_tokens, request_of_length
from bench_prompts import (
    forward_operations,
    largest_difference,
    logprobs_one_prompt_per_action,
    synthetic_episode,
)
from gpu_context import Context, Outcome
from speed_tools import BFLOAT16, FLOAT32, GIB, dtype_name, forward_floor, measure_ceilings, median_seconds

from priorzero.config import resolve_settings
from priorzero.llm.fine_tuning import LLMLearner, LLMSample
from priorzero.llm.models import LanguageModel, add_lora, load_tokenizer
from priorzero.llm.packing import PromptRow, pack, register_tree_attention
from priorzero.llm.prompts import prompt_style, render_prompt
from priorzero.settings import Settings
from priorzero.types import PriorRequest

Figures = dict[str, float | str | bool]

SMOLLM2, QWEN = "smollm2", "qwen"
# Qwen2.5-0.5B's config.json. The rows of its embedding that SmolLM2's tokenizer does not use cost time all the same.
QWEN_SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
SMALL_QWEN_SHAPE = QWEN_SHAPE | {
    "vocab_size": 50_000,  # the tokenizer has 49 152 tokens
    "hidden_size": 112,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
}
# Largest difference of the log-probability of a token, in bfloat16 as vllm.parity_tolerance, and relative difference of
# the SFT loss.
LOGPROB_TOLERANCE = {FLOAT32: 1e-4, BFLOAT16: 0.3}
LOSS_TOLERANCE = {FLOAT32: 1e-4, BFLOAT16: 1e-2}
ACTIONS = 10  # of a state, where many states are computed
PAST = 5  # decisions of an episode before the first one that is measured, as many as a prompt shows


# ---- models and inputs ----


def make_qwen(context: Context, *, dtype: str, use_lora: bool = False) -> LanguageModel:
    """A model with random weights and Qwen2.5-0.5B's shape, on the context's device, with the context's tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = SMALL_QWEN_SHAPE if context.quick else QWEN_SHAPE
    # The deviation of the weights gives logits with a deviation of about one.
    config = Qwen2Config(**shape, initializer_range=shape["hidden_size"] ** -0.5)
    torch.manual_seed(0)
    with context.device:
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=register_tree_attention(), dtype=torch.float32
        )
    model.eval()
    if use_lora:
        model = add_lora(model, r=8, alpha=16)
    compute_dtype = torch.bfloat16 if dtype == BFLOAT16 else torch.float32
    return LanguageModel(model, load_tokenizer(context.settings().llm), compute_dtype)


def make_llm(context: Context, *, shape: str, dtype: str, use_lora: bool = False) -> LanguageModel:
    """The model of a check: ``smollm2`` is the context's, ``qwen`` has random weights."""
    if shape == QWEN:
        return make_qwen(context, dtype=dtype, use_lora=use_lora)
    return context.language_model(context.device, dtype=dtype, use_lora=use_lora)


def llm_settings(context: Context, **changes: Any) -> Settings:
    """The default settings of the prompts and the losses, with shorter prompts in a quick check."""
    quick = {"observation_chars": 100, "history_chars": 50} if context.quick else {}
    return resolve_settings(context.settings(), {"llm": {**quick, **changes}})


def episode_requests(
    llm: LanguageModel, settings: Settings, *, steps: int, num_actions: int, number: int = 0
) -> list[PriorRequest]:
    """The requests of a synthetic episode, after the first decisions, so that all prompts show some."""
    states, decisions = synthetic_episode(steps=PAST + steps, num_actions=num_actions, number=number)
    return [
        PriorRequest(
            render_prompt(states[t], decisions[:t], style=prompt_style(settings), tokenizer=llm.tokenizer).text,
            states[t].valid_actions,
        )
        for t in range(PAST, PAST + steps)
    ]


def tree_counts(rows: Sequence[PromptRow], *, rows_per_pass: int) -> tuple[int, int, int]:
    """What forward passes over ``rows_per_pass`` rows each have to compute, where a pass computes a prefix once.

    Returns:
        Tokens, tokens that predict a token of an action, and passes.
    """
    tokens = predictors = passes = 0
    for start in range(0, len(rows), rows_per_pass):
        nodes: dict[tuple[int, int], int] = {}  # (node of the prefix, token) -> node
        predicting = set()
        for row in rows[start : start + rows_per_pass]:
            prompt = -1
            for token in row.prompt_ids:
                prompt = nodes.setdefault((prompt, token), len(nodes))
            predicting.add(prompt)
            for completion in row.completions:
                node = prompt
                for token in completion[:-1]:
                    node = nodes.setdefault((node, token), len(nodes))
                    predicting.add(node)
        tokens, predictors, passes = tokens + len(nodes), predictors + len(predicting), passes + 1
    return tokens, predictors, passes


# ---- priors ----


@functools.lru_cache(maxsize=1)
def prior_llm(context: Context, *, shape: str, dtype: str) -> LanguageModel:
    """:func:`make_llm` for checks that do not change it. The last one is kept, since loading takes seconds."""
    return make_llm(context, shape=shape, dtype=dtype)


@torch.inference_mode()
def logprobs_padded_batch(llm: LanguageModel, row: PromptRow) -> list[np.ndarray]:
    """The token log-probabilities of each action, with one row for each action, padded on the right, in one pass."""
    sequences = [torch.tensor([*row.prompt_ids, *completion]) for completion in row.completions]
    # A causal model does not attend to padding on the right. Without a mask the fastest attention can be used.
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(llm.device)
    first = len(row.prompt_ids) - 1
    with llm.autocast():
        logits = llm.model(input_ids=input_ids, logits_to_keep=input_ids.shape[1] - first, use_cache=False).logits
    targets = input_ids[:, first + 1 :, None]
    logprobs = torch.log_softmax(logits[:, :-1].float(), -1).gather(2, targets)[:, :, 0].cpu().numpy()
    return [own[: len(completion)] for own, completion in zip(logprobs, row.completions, strict=True)]


def check_decision(context: Context, *, shape: str, dtype: str) -> Outcome:
    """One decision against one prompt for each action: one after the other, and all in one padded batch."""
    llm = prior_llm(context, shape=shape, dtype=dtype)
    figures: Figures = {}
    differences = []
    for num_actions in (2, 4) if context.quick else (16, 64):
        request = request_of_length(llm, tokens=60 if context.quick else 600, actions=num_actions)
        own, difference = decision_figures(llm, request, context)
        figures |= {f"k{num_actions}_{name}": value for name, value in own.items()}
        differences.append(difference)
    figures["largest_difference"] = max(differences)
    return Outcome(max(differences) < LOGPROB_TOLERANCE[dtype_name(llm)], figures)


def decision_figures(llm: LanguageModel, request: PriorRequest, context: Context) -> tuple[Figures, float]:
    """The figures of one decision, and the largest difference of a log-probability between three ways."""
    engine = RecordingEngine(llm, prompt_style(llm_settings(context)), prompt_cache_tokens=0)
    row, device = engine.builder.row(request), context.device
    ours_s, ours = median_seconds(lambda: engine.compute([request])[0], device)
    # The pass over a whole prompt has been warmed up.
    one_s, one = median_seconds(lambda: logprobs_one_prompt_per_action(llm, row), device, max_repeats=1, warm_up=False)
    padded_s, padded = median_seconds(lambda: logprobs_padded_batch(llm, row), device)
    pack_s, _ = median_seconds(lambda: pack([row], dtype=llm.compute_dtype, device=llm.device), device)
    tokens, predictors, passes = tree_counts([row], rows_per_pass=1)
    figures: Figures = {
        "s": ours_s,
        "pack_s": pack_s,
        "floor_s": forward_floor(llm, context, tokens=tokens, predictors=predictors, passes=passes),
        "tokens_per_s": tokens / ours_s,
        "ratio_one_prompt_per_action": one_s / ours_s,
        "ratio_padded_batch": padded_s / ours_s,
    }
    return figures, max(largest_difference(ours, one), largest_difference(padded, one))


def check_episode(context: Context, *, shape: str, dtype: str) -> Outcome:
    """An episode of 20 steps with 16 actions each, with and without the prompt cache."""
    llm, settings = prior_llm(context, shape=shape, dtype=dtype), llm_settings(context)
    style = prompt_style(settings)
    steps, num_actions, every = (4, 3, 2) if context.quick else (20, 16, 5)
    requests = episode_requests(llm, settings, steps=steps, num_actions=num_actions)
    cached = RecordingEngine(llm, style, prompt_cache_tokens=settings.prior.prompt_cache_tokens)
    uncached = RecordingEngine(llm, style, prompt_cache_tokens=0)
    rows = [cached.builder.row(request) for request in requests]
    cached_s, ours = median_seconds(lambda: cached.compute(requests), context.device, budget_s=0.5, max_repeats=3)
    uncached_s, _ = median_seconds(lambda: uncached.compute(requests), context.device, budget_s=0.5, max_repeats=3)
    measured = range(every - 1, steps, every)
    measured_s, reference = median_seconds(
        lambda: [logprobs_one_prompt_per_action(llm, rows[t]) for t in measured], context.device, max_repeats=1
    )
    reference_tokens = [num_reference_tokens(row) for row in rows]
    reference_s = measured_s * sum(reference_tokens) / sum(reference_tokens[t] for t in measured)
    difference = max(largest_difference(ours[t], own) for t, own in zip(measured, reference, strict=True))
    new_tokens, (tokens, predictors, _) = num_new_tokens(rows), tree_counts(rows, rows_per_pass=1)
    figures: Figures = {
        "cached_s": cached_s,
        "uncached_s": uncached_s,
        "floor_s": forward_floor(llm, context, tokens=new_tokens, predictors=predictors, passes=steps),
        "prompt_tokens": float(np.mean([len(row.prompt_ids) for row in rows])),
        "cached_new_tokens_per_s": new_tokens / cached_s,
        "uncached_tokens_per_s": tokens / uncached_s,
        "cached_ratio_one_prompt_per_action": reference_s / cached_s,
        "uncached_ratio_one_prompt_per_action": reference_s / uncached_s,
        "largest_difference": difference,
    }
    note = f"one prompt for each action: every {every}th step, scaled by tokens"
    return Outcome(difference < LOGPROB_TOLERANCE[dtype_name(llm)], figures, note)


def check_states(context: Context, *, shape: str, dtype: str) -> Outcome:
    """64 states of different games at once, by the number of states in a forward pass."""
    llm, settings = prior_llm(context, shape=shape, dtype=dtype), llm_settings(context)
    count, sizes = (4, (1, 4)) if context.quick else (64, (1, 4, 16, 64))
    requests = [episode_requests(llm, settings, steps=1, num_actions=ACTIONS, number=n)[0] for n in range(count)]
    figures: Figures = {}
    results: dict[int, list[list[np.ndarray]]] = {}
    for size in sizes:
        engine = RecordingEngine(llm, prompt_style(settings), prompt_cache_tokens=0, rows_per_forward=size)
        rows = [engine.builder.row(request) for request in requests]
        engine.compute_together(requests[:size])  # warm-up
        spent, results[size] = median_seconds(
            lambda: engine.compute_together(requests),  # noqa: B023
            context.device,
            budget_s=0.5,
            max_repeats=3,
            warm_up=False,
        )
        tokens, predictors, passes = tree_counts(rows, rows_per_pass=size)
        floor_s = forward_floor(llm, context, tokens=tokens, predictors=predictors, passes=passes)
        figures |= {f"rows{size}_s": spent, f"rows{size}_floor_s": floor_s, f"rows{size}_tokens_per_s": tokens / spent}
        figures[f"rows{size}_ratio_one_row"] = float(figures["rows1_s"]) / spent
        figures["prompt_tokens"] = float(np.mean([len(row.prompt_ids) for row in rows]))
    differences = [
        max(largest_difference(a, b) for a, b in zip(results[1], results[size], strict=True)) for size in sizes[1:]
    ]
    figures["largest_difference"] = max(differences)
    return Outcome(max(differences) < LOGPROB_TOLERANCE[dtype_name(llm)], figures)


# ---- updates ----


def make_learner(llm: LanguageModel, settings: Settings) -> LLMLearner:
    """A learner with a learning rate of 0, so that all updates start from the same parameters."""
    learner = LLMLearner(llm, settings.llm, style=prompt_style(settings), temperature=settings.prior.temperature)
    learner.optimizer.param_groups[0]["lr"] = 0.0
    return learner


def make_samples(learner: LLMLearner, settings: Settings) -> list[LLMSample]:
    """A batch: runs of consecutive decisions of different episodes, as replay gives them."""
    run = settings.llm.run_length
    records = []
    for number in range(settings.llm.batch_size // run):
        states, decisions = synthetic_episode(steps=PAST + run, num_actions=ACTIONS, number=number)
        records += records_of(states, decisions, settings, learner.llm.tokenizer, seed=number)[PAST:]
    returns = np.random.default_rng(0).normal(size=len(records))
    samples, skipped = learner.samples(records, returns)
    assert not skipped and len(samples) == settings.llm.batch_size
    return samples


def update_operations(llm: LanguageModel, *, tokens: int, predictors: int, use_lora: bool) -> float:
    """Floating point operations of an update in products with the parameters.

    The backward pass has two products for each one of the forward pass: for the gradients of the activations, and for
    those of the parameters. With adapters, the second is needed for the few parameters of the adapters only.
    """
    return (2 if use_lora else 3) * forward_operations(llm, tokens=tokens, predictors=predictors)


def check_update(context: Context, *, shape: str, use_lora: bool) -> Outcome:
    """An update on 32 decisions, 8 in a forward pass, against one decision in a forward pass."""
    dtype = BFLOAT16 if context.device.type == "cuda" else FLOAT32
    prior_llm.cache_clear()
    gc.collect()
    before = allocated_bytes(context.device)
    settings = llm_settings(context, **({"batch_size": 8, "micro_batch_size": 4} if context.quick else {}))
    learner = make_learner(make_llm(context, shape=shape, dtype=dtype, use_lora=use_lora), settings)
    llm, samples, micro_batch = learner.llm, make_samples(learner, settings), settings.llm.micro_batch_size
    learner.learn(samples)  # warm-up; it also creates AdamW's moments
    reset_peak(context.device)
    ours_s, ours = median_seconds(
        lambda: learner.learn(samples), context.device, budget_s=1.5, max_repeats=4, warm_up=False
    )
    peak = peak_bytes(context.device)
    learner.micro_batch_size = 1
    reference_s, reference = median_seconds(lambda: learner.learn(samples), context.device, budget_s=0.1, warm_up=False)
    tokens, predictors, passes = tree_counts([sample.row for sample in samples], rows_per_pass=micro_batch)
    operations = update_operations(llm, tokens=tokens, predictors=predictors, use_lora=use_lora)
    rate = measure_ceilings(context.device, quick=context.quick).rates[dtype_name(llm)]
    figures: Figures = {
        "seconds": ours_s,
        "floor_s": operations / rate,
        "tokens": tokens,
        "forward_passes": passes,
        "prompt_tokens": float(np.mean([len(sample.row.prompt_ids) for sample in samples])),
        "tokens_per_s": tokens / ours_s,
        "tflops": operations / ours_s / 1e12,
        "utilisation": operations / rate / ours_s,
        "ratio_one_decision": reference_s / ours_s,
        "loss_difference": abs(ours["sft_loss"] - reference["sft_loss"]) / abs(reference["sft_loss"]),
        "dtype": dtype_name(llm),
    }
    if peak is not None and before is not None:
        figures["peak_gib"] = (peak - before) / GIB
    ok = float(figures["loss_difference"]) < LOSS_TOLERANCE[dtype_name(llm)]
    return Outcome(ok, figures, "utilisation: of the measured rate of a large product; peak: with the parameters")


def allocated_bytes(device: torch.device) -> int | None:
    """Bytes of tensors on a GPU; None for a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    """Let :func:`peak_bytes` count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The largest number of bytes of tensors on a GPU; None for a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


# ---- the checks ----

PRIOR_CHECKS = {"decision": check_decision, "episode": check_episode, "states": check_states}
# 64 states in float32 would take long, and bfloat16 is the default on a GPU.
PRIORS = {
    (SMOLLM2, FLOAT32): ("decision", "episode"),
    (SMOLLM2, BFLOAT16): ("decision", "episode", "states"),
    (QWEN, BFLOAT16): ("decision", "episode", "states"),
}

CHECKS: dict[str, Callable[[Context], Outcome]] = {
    **{
        f"prior_{name}_{shape}_{dtype}": functools.partial(PRIOR_CHECKS[name], shape=shape, dtype=dtype)
        for (shape, dtype), names in PRIORS.items()
        for name in names
    },
    **{
        f"llm_update_{shape}_{name}": functools.partial(check_update, shape=shape, use_lora=use_lora)
        for shape in (SMOLLM2, QWEN)
        for name, use_lora in (("full", False), ("lora", True))
    },
}
