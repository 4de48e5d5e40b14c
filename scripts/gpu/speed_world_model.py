"""Speed of the world model: updates, the search, and the text encoder that gives its features."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from bench_search import SIZES, make_policy, make_roots, same_visits, search_each
from bench_world_model import make_batch, unknown_state
from gpu_context import Context, Outcome
from speed_tools import FLOAT32, measure_ceilings, median_seconds

from priorzero.config import PRESETS, resolve_settings
from priorzero.play.text_encoder import TextEncoder
from priorzero.policy import PriorZeroPolicy
from priorzero.types import GameState
from priorzero.world_model.batch import ReplayBatch

Figures = dict[str, float | str | bool]

FEATURE_SIZE = 1280  # of the default encoder
SIMULATIONS = 25
NUM_LEGAL = 20
# The goals of the search with the default settings.
GOAL_S = 0.05  # four roots
GOAL_RATIO = 20.0  # decisions a second of 64 roots, compared with one root


# ---- updates ----


def check_world_model_update(context: Context, *, size: str) -> Outcome:
    """An update with the default settings or those of the quick test, against the CPU of the same machine."""
    changes = {"world_model": PRESETS["quick_test"]["world_model"]} if size == "quick_test" else {}
    settings = resolve_settings(context.settings(), changes)
    steps = settings.world_model.num_unroll_steps + 1
    features = np.random.default_rng(0).normal(size=(settings.train.batch_size, steps, FEATURE_SIZE))
    batch = make_batch(features.astype(np.float32), num_actions=settings.env.num_actions)
    policy = context.policy(context.device, changes, feature_size=FEATURE_SIZE)
    ours_s = update_seconds(policy, batch, context.device)
    on_cpu = context.policy("cpu", changes, feature_size=FEATURE_SIZE)
    cpu_s = update_seconds(on_cpu, batch, torch.device("cpu"), max_repeats=1)
    figures: Figures = {
        "seconds": ours_s,
        "floor_s": update_floor(policy, context, steps=settings.train.batch_size * (steps - 1)),
        "cpu_s": cpu_s,
        "ratio_cpu": cpu_s / ours_s,
        "parameters_m": sum(p.numel() for _, p in policy.trained_world_model_parameters()) / 1e6,
        "sequences_per_s": settings.train.batch_size / ours_s,
        "cpu_threads": torch.get_num_threads(),
    }
    return Outcome(None, figures, "the CPU's update is measured once, after one that warms up")


def update_seconds(
    policy: PriorZeroPolicy, batch: ReplayBatch, device: torch.device, *, max_repeats: int = 10
) -> float:
    """Seconds of an update. The warm-up also creates AdamW's moments."""
    numbers = itertools.count()
    return median_seconds(
        lambda: policy.learn_world_model(batch, train_iter=next(numbers)), device, max_repeats=max_repeats
    )[0]


def update_floor(policy: PriorZeroPolicy, context: Context, *, steps: int) -> float:
    """Seconds that an update on ``steps`` steps of all sequences together takes at least.

    Each parameter needs 6 operations for each of its inputs. Those of the transformer are two tokens a step, those of
    the encoder and the heads are one; tables need none. AdamW reads parameters, gradients and two moments, and writes
    all but the gradients.
    """
    ceilings = measure_ceilings(context.device, quick=context.quick)
    transformer, others = product_parameters(policy)
    all_parameters = sum(p.numel() for _, p in policy.trained_world_model_parameters())
    operations = 6.0 * steps * (2 * transformer + others)
    return max(operations / ceilings.rates[FLOAT32], 7 * 4 * all_parameters / ceilings.bandwidth)


def product_parameters(policy: PriorZeroPolicy) -> tuple[int, int]:
    """The numbers of parameters in matrix products: of the transformer, and of the encoder and the heads together."""
    trained = {name for name, _ in policy.trained_world_model_parameters()}
    counts = {True: 0, False: 0}
    for name, module in policy.network.world_model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in trained:
            counts[name.startswith("transformer.")] += module.weight.numel()
    return counts[True], counts[False]


# ---- search ----


class TimedCalls:
    """Adds up the seconds that calls of an object's public methods take, those from outside only.

    Attributes:
        seconds: the sum.
    """

    def __init__(self, target: Any) -> None:
        self._target = target
        self.seconds = 0.0
        self._depth = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value) or name.startswith("_"):
            return value

        def timed(*arguments: Any, **keywords: Any) -> Any:
            self._depth += 1
            started = time.perf_counter()
            try:
                return value(*arguments, **keywords)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - started

        return timed


def check_search(context: Context, *, num_actions: int) -> Outcome:
    """A search over E roots, by E, against one search for each root."""
    device = context.device
    policy = make_search_policy(context, num_actions=num_actions)
    all_roots = make_roots(4 if context.quick else 256, num_actions=num_actions, num_legal=NUM_LEGAL)
    figures: Figures = {}
    for count in (1, 4) if context.quick else (1, 4, 16, 64, 256):
        roots = all_roots[:count]
        total_s, model_s = search_seconds(policy, roots, num_actions=num_actions, device=device)
        one_s = float(figures.get("e1_s", total_s))
        figures |= {
            f"e{count}_s": total_s,
            f"e{count}_s_per_root": total_s / count,
            f"e{count}_model_s": model_s,
            f"e{count}_rest_s": total_s - model_s,
            f"e{count}_decisions_per_s": count / total_s,
            f"e{count}_ratio_one_root": one_s * count / total_s,
        }
    four = all_roots[:4]
    each_s, each = median_seconds(
        lambda: search_each(policy, four, num_actions=num_actions), device, max_repeats=3, warm_up=False
    )
    figures["e4_ratio_measured"] = each_s / float(figures["e4_s"])
    figures["e4_same_visits"] = same_visits(policy.search(four, num_actions=num_actions), each)
    figures["floor_s"] = search_floor(policy, context)
    figures["e4_goal_met"] = float(figures["e4_s"]) < GOAL_S
    if "e64_ratio_one_root" in figures:
        figures["e64_goal_met"] = float(figures["e64_ratio_one_root"]) >= GOAL_RATIO
    return Outcome(
        None, figures, "ratio: E searches of one root | one of E; model: calls of the world model; floor: without cache"
    )


def make_search_policy(context: Context, *, num_actions: int) -> PriorZeroPolicy:
    """The policy of ``bench_search.py``: the default sizes, with ``quick`` the small ones."""
    size = "small" if context.quick else "default"
    assert size in SIZES
    return make_policy(size, device=context.device.type, num_actions=num_actions)


def search_seconds(
    policy: PriorZeroPolicy, roots: Sequence[Any], *, num_actions: int, device: torch.device
) -> tuple[float, float]:
    """Seconds of a search, and those of the world model within it: of the call with the median."""
    inference = policy.inference
    policy.search(roots, num_actions=num_actions)  # warm-up; it may record CUDA graphs for this number of roots
    timed = TimedCalls(inference)
    policy.inference = timed
    try:
        runs: list[tuple[float, float]] = []
        while not runs or (len(runs) < 9 and sum(total for total, _ in runs) < 0.5):
            timed.seconds = 0.0
            total_s, _ = median_seconds(
                lambda: policy.search(roots, num_actions=num_actions), device, max_repeats=1, warm_up=False
            )
            runs.append((total_s, timed.seconds))
    finally:
        policy.inference = inference
    return sorted(runs)[len(runs) // 2]


def search_floor(policy: PriorZeroPolicy, context: Context) -> float:
    """Seconds of a search of any number of roots, if each forward pass reads the transformer's parameters from memory.

    There are two passes in each simulation, for the reward and for the value, and one for the roots. A GPU's cache may
    hold the parameters, so a search can take less.
    """
    num_bytes = 4 * product_parameters(policy)[0]
    return (2 * SIMULATIONS + 1) * num_bytes / measure_ceilings(context.device, quick=context.quick).bandwidth


# ---- text encoder ----


def check_encoder(context: Context) -> Outcome:
    """Features of new states, one text after the other as the package does, against one padded batch."""
    encoder = context.text_encoder(context.device)
    numbers = itertools.count()
    figures: Figures = {}
    for count in (1, 4) if context.quick else (1, 4, 64):

        def new_states(count: int = count) -> list[GameState]:
            return [unknown_state(next(numbers)) for _ in range(count)]

        ours_s, _ = median_seconds(lambda make=new_states: encoder.features(make()), context.device, budget_s=0.5)
        batch_s, _ = median_seconds(
            lambda make=new_states: encode_padded(encoder, make()), context.device, budget_s=0.5
        )
        figures |= {
            f"n{count}_s": ours_s,
            f"n{count}_states_per_s": count / ours_s,
            f"n{count}_padded_batch_s": batch_s,
            f"n{count}_ratio_padded_batch": batch_s / ours_s,
        }
    return Outcome(None, figures, "three new texts for each state; the padded batch is what batching would give")


@torch.inference_mode()
def encode_padded(encoder: TextEncoder, states: Sequence[GameState]) -> np.ndarray:
    """The mean of the encoder's output for each text of the states, in one padded batch, ``[n, D]``."""
    texts = [text for state in states for text in (state.feedback, state.look, state.inventory)]
    inputs = encoder._tokenizer(texts, return_tensors="pt", truncation=True, max_length=256, padding=True)
    inputs = inputs.to(encoder._model.device)
    hidden = encoder._model(**inputs).last_hidden_state  # (n, T, D)
    mask = inputs["attention_mask"][:, :, None]
    embeddings: np.ndarray = ((hidden * mask).sum(dim=1) / mask.sum(dim=1)).cpu().numpy()
    return embeddings


# ---- the checks ----

CHECKS: dict[str, Callable[[Context], Outcome]] = {
    **{
        f"world_model_update_{size}": functools.partial(check_world_model_update, size=size)
        for size in ("default", "quick_test")
    },
    **{
        f"search_{num_actions}_actions": functools.partial(check_search, num_actions=num_actions)
        for num_actions in (256, 2048)
    },
    "encoder": check_encoder,
}
