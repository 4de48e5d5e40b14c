"""Checks of the world model: its update, the search, and the text encoder's features."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from bench_search import FEATURE_SIZE, make_roots
from bench_world_model import make_batch, make_states
from gpu_context import Context, Figures, Outcome, largest_difference, relative_difference

from priorzero.policy import PriorZeroPolicy
from priorzero.search.base import Root, SearchResult
from priorzero.world_model.batch import ReplayBatch

FLOAT32 = 1e-4
# LightZero turns logits into a value v by ((sqrt(1 + 0.004 (|v'| + 1.001)) - 1) / 0.002)^2 - 1. In float32 the root is
# near 1, with steps of 1.2e-7, so that values have steps of 1.2e-4 sqrt(1 + |v|), 4e-4 for |v| = 10.
VALUES = 5e-4
FIRST_STEP = 0.05  # as for the LLM: AdamW's first step is discontinuous where a gradient is zero
# An action is selected by comparing scores. Where two are closer than the rounding errors, another one is selected, and
# the visit counts of this root differ, without either being wrong. This happens at few roots.
EQUAL_ROOTS = 0.9
NO_DROPOUT: dict[str, dict[str, Any]] = {"world_model": {"dropout": 0.0}}


# ---- update ----


def random_batch(policy: PriorZeroPolicy) -> ReplayBatch:
    """A batch with random features and targets."""
    cfg = policy.lightzero_config
    features = np.random.default_rng(0).normal(size=(cfg.batch_size, cfg.num_unroll_steps + 1, FEATURE_SIZE))
    batch = make_batch(features.astype(np.float32), num_actions=cfg.model.action_space_size)
    weights = np.random.default_rng(1).uniform(0.2, 1.0, size=cfg.batch_size)
    return dataclasses.replace(batch, weights=weights)


@dataclasses.dataclass(frozen=True)
class UpdateResult:
    """What an update gives: its metrics, priorities, gradient, and how the parameters and the target moved."""

    metrics: dict[str, float]
    priorities: np.ndarray
    gradient: list[torch.Tensor]
    steps: list[torch.Tensor]
    target: list[torch.Tensor]


def update(context: Context, device: torch.device | str) -> UpdateResult:
    """One update without dropout."""
    policy = context.policy(device, NO_DROPOUT, feature_size=FEATURE_SIZE)
    policy.fit_features(np.random.default_rng(2).normal(size=(100, FEATURE_SIZE)).astype(np.float32))
    parameters = [p for _, p in policy.trained_world_model_parameters()]
    before = [p.detach().cpu().clone() for p in parameters]
    gradient: list[torch.Tensor] = []
    policy._optimizer_world_model.register_step_pre_hook(
        lambda *_: gradient.extend(p.grad.cpu() for p in parameters if p.grad is not None)
    )
    metrics = policy.learn_world_model(random_batch(policy), train_iter=0)
    return UpdateResult(
        priorities=metrics.pop("priorities"),
        metrics=metrics,
        gradient=gradient,
        steps=[p.detach().cpu() - old for p, old in zip(parameters, before, strict=True)],
        target=[p.detach().cpu() for p in policy.target_network.parameters()],
    )


def check_world_model_update(context: Context) -> Outcome:
    """All losses, the priorities, the gradient, the parameters after one step and the target network."""
    cpu, own = update(context, "cpu"), update(context, context.device)
    figures: Figures = {
        name.removeprefix("train/"): abs(value - cpu.metrics[name]) / max(1e-2, abs(cpu.metrics[name]))
        for name, value in own.metrics.items()
    }
    scale = float(np.abs(cpu.priorities).max())
    figures["priorities"] = largest_difference(own.priorities, cpu.priorities) / scale
    figures["gradient"] = relative_difference(own.gradient, cpu.gradient)
    figures["target"] = relative_difference(own.target, cpu.target)
    ok = all(isinstance(value, float) and value < FLOAT32 for value in figures.values())
    figures["step"] = step = relative_difference(own.steps, cpu.steps)
    return Outcome(ok and step < FIRST_STEP, figures, "relative differences")


# ---- search ----


def search_roots(context: Context) -> list[Root]:
    """Random roots with a history, exploration noise and a prior of an LLM."""
    rng = np.random.default_rng(3)
    return [
        dataclasses.replace(
            root, prior_logprobs=np.log(rng.dirichlet(np.ones(len(root.legal_actions)))).astype(np.float32)
        )
        for root in make_roots(8 if context.quick else 64, num_actions=256, num_legal=20)
    ]


def compare_searches(ours: Sequence[SearchResult], reference: Sequence[SearchResult]) -> dict[str, Any]:
    """Differences of two searches of the same roots.

    ``root_value`` and ``action_values`` are compared where the visit counts are equal.
    """
    pairs = list(zip(ours, reference, strict=True))
    equal = [(a, b) for a, b in pairs if np.array_equal(a.visit_counts, b.visit_counts)]
    return {
        "equal": len(equal),
        "policy_logits": max(largest_difference(a.policy_logits, b.policy_logits) for a, b in pairs),
        "predicted_value": max(abs(a.predicted_value - b.predicted_value) for a, b in pairs),
        "root_value": max((abs(a.root_value - b.root_value) for a, b in equal), default=math.nan),
        "action_values": max(
            (largest_difference(np.nan_to_num(a.action_values), np.nan_to_num(b.action_values)) for a, b in equal),
            default=math.nan,
        ),
    }


def search_outcome(figures: dict[str, Any], *, roots: int) -> Outcome:
    """Whether the searches agree."""
    values = [figures[name] for name in ("predicted_value", "root_value", "action_values")]
    ok = figures["policy_logits"] < FLOAT32 and all(difference < VALUES for difference in values)
    ok = ok and figures["equal"] >= EQUAL_ROOTS * roots
    return Outcome(
        ok, {"roots": roots, **figures}, f"the visit counts of {figures['equal']} of {roots} roots are equal"
    )


def check_search(context: Context) -> Outcome:
    """Visit counts and values of fixed roots, against the CPU."""
    roots = search_roots(context)
    results = {
        device: context.policy(device, feature_size=FEATURE_SIZE).search(roots, num_actions=256)
        for device in ("cpu", str(context.device))
    }
    visits = {int(result.visit_counts.sum()) for result in results[str(context.device)]}
    outcome = search_outcome(compare_searches(results[str(context.device)], results["cpu"]), roots=len(roots))
    num_simulations = context.settings().search.num_simulations
    return dataclasses.replace(outcome, ok=bool(outcome.ok) and visits == {num_simulations})


def check_search_batch(context: Context) -> Outcome:
    """The result of a root does not depend on the other roots of the batch, nor on an earlier search."""
    roots = search_roots(context)
    policy = context.policy(context.device, feature_size=FEATURE_SIZE)
    together = policy.search(roots, num_actions=256)
    chosen = range(0, len(roots), max(1, len(roots) // 8))
    alone = [policy.search([roots[i]], num_actions=256)[0] for i in chosen]
    pair = [policy.search([roots[0], roots[i]], num_actions=256)[1] for i in chosen]
    expected = [together[i] for i in chosen]
    figures = compare_searches([*alone, *pair], [*expected, *expected])
    return search_outcome(figures, roots=2 * len(chosen))


def check_search_after_update(context: Context) -> Outcome:
    """The search follows the parameters: after an update, and after the old parameters were loaded.

    On a GPU it replays CUDA graphs, which contain the addresses of the parameters.
    """
    roots = search_roots(context)[:8]
    layer = {"train": {"learning_rate": 1e-2}}
    policy = context.policy(context.device, NO_DROPOUT, layer, feature_size=FEATURE_SIZE)
    state = {name: tensor.clone() for name, tensor in policy.world_model_state().items()}
    before = policy.search(roots, num_actions=256)
    policy.learn_world_model(random_batch(policy), train_iter=0)
    after = policy.search(roots, num_actions=256)
    fresh = context.policy(context.device, NO_DROPOUT, layer, feature_size=FEATURE_SIZE)
    fresh.load_world_model_state(policy.world_model_state())
    updated = compare_searches(after, fresh.search(roots, num_actions=256))
    policy.load_world_model_state(state)
    loaded = compare_searches(policy.search(roots, num_actions=256), before)
    change = compare_searches(after, before)["policy_logits"]
    figures = {"change": change} | {f"loaded_{name}": value for name, value in loaded.items()} | updated
    outcome = search_outcome(updated, roots=len(roots))
    ok = bool(outcome.ok) and bool(search_outcome(loaded, roots=len(roots)).ok) and change > 100 * FLOAT32
    return Outcome(ok, figures, outcome.note)


# ---- features ----


def check_text_encoder(context: Context) -> Outcome:
    """The features of states."""
    states = make_states(count=5 if context.quick else 20)
    features = {device: context.text_encoder(device).features(states) for device in ("cpu", str(context.device))}
    difference = largest_difference(features[str(context.device)], features["cpu"])
    deviation = float(features["cpu"].std(axis=0).max())
    return Outcome(difference < FLOAT32 and deviation > 1e-2, {"features": difference, "deviation": deviation})


CHECKS: dict[str, Callable[[Context], Outcome]] = {
    "world_model_update": check_world_model_update,
    "search": check_search,
    "search_batch": check_search_batch,
    "search_after_update": check_search_after_update,
    "text_encoder": check_text_encoder,
}
