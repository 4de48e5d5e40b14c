"""Time of one search over several games, compared with one search for each game. Takes about two minutes.

    python scripts/bench_search.py [--quick]     # --quick: half a minute

A search has 25 simulations. Its roots have a history of four observations, exploration noise and a seed each. The world
model has random parameters and two sizes: small (embedding size 128, 100 actions in the vocabulary,
12 of them valid) and the default (512, 256 actions, 20 valid). The results are equal if the visit counts are.

A second table divides the milliseconds for each root into the model's forward passes and the rest, which is the tree.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_tools import SMALL_SETTINGS, Row, report, seconds

from priorzero.config import Layer, resolve_settings
from priorzero.policy import PriorZeroPolicy
from priorzero.search.base import Root, SearchResult
from priorzero.world_model.inference import WorldModelInference

FEATURE_SIZE = 3 * 384 + 128  # of the default encoder: feedback, room and inventory, then score and moves
# settings, actions in the vocabulary, valid actions
SIZES: dict[str, tuple[Layer, int, int]] = {
    "small": (SMALL_SETTINGS, 100, 12),
    "default": ({"env": {"action_space_size": 256}}, 256, 20),
}
BATCHES = (1, 4, 16, 64)


def make_policy(size: str, *, device: str = "cpu", num_actions: int | None = None) -> PriorZeroPolicy:
    """A policy of one of :data:`SIZES` with 25 simulations.

    Args:
        size: one of :data:`SIZES`.
        device: of the world model.
        num_actions: actions in the vocabulary; None: those of the size.
    """
    layer: dict[str, Any] = {
        "search": {"num_simulations": 25},
        "prior": {"enabled": False},
        "eval": {"modes": ["world_model"]},
    }
    settings = resolve_settings(SIZES[size][0], layer)
    if num_actions is not None:
        settings = resolve_settings(settings, {"env": {"action_space_size": num_actions}})
    torch.manual_seed(0)
    policy = PriorZeroPolicy(settings, feature_size=FEATURE_SIZE, device=device, llm=None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.network.parameters():  # LightZero initialises its heads with zeros: all actions would be equal
            p += 0.05 * torch.randn(p.shape, generator=generator).to(p.device)
    return policy


def make_roots(count: int, *, num_actions: int, num_legal: int) -> list[Root]:
    """Random roots."""
    rng = np.random.default_rng(0)
    return [
        Root(
            features=rng.normal(size=(4, FEATURE_SIZE)).astype(np.float32),
            actions=rng.integers(num_actions, size=3),
            legal_actions=rng.choice(num_actions, num_legal, replace=False),
            noise=rng.dirichlet(np.full(num_legal, 0.3)),
            seed=number,
        )
        for number in range(count)
    ]


class TimedInference(WorldModelInference):
    """Adds up the seconds of the model's forward passes."""

    model_s = 0.0

    def _timed(self, method: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            self.model_s += time.perf_counter() - started

    def root_contexts(self, *arguments: Any) -> Any:
        return self._timed(super().root_contexts, *arguments)

    def predict(self, *arguments: Any) -> Any:
        return self._timed(super().predict, *arguments)

    def step(self, *arguments: Any) -> Any:
        return self._timed(super().step, *arguments)


def search_batch(
    policy: PriorZeroPolicy, roots: list[Root], *, num_actions: int, repeats: int
) -> tuple[float, float, list[SearchResult]]:
    """One search over all roots. Returns its seconds, those of the model (both of the fastest run), and the results."""
    runs = []
    for _ in range(repeats):
        policy.inference = TimedInference(policy.network)
        total_s, results = seconds(lambda: policy.search(roots, num_actions=num_actions), repeats=1)
        runs.append((total_s, policy.inference.model_s))
    return *min(runs), results


def search_each(policy: PriorZeroPolicy, roots: list[Root], *, num_actions: int) -> list[SearchResult]:
    """One search for each root."""
    return [policy.search([root], num_actions=num_actions)[0] for root in roots]


def same_visits(one: list[SearchResult], other: list[SearchResult]) -> bool:
    """Whether all visit counts are equal."""
    return all(np.array_equal(a.visit_counts, b.visit_counts) for a, b in zip(one, other, strict=True))


def measure(size: str, *, batches: tuple[int, ...]) -> tuple[list[Row], list[Any]]:
    """The comparisons of one size, and the milliseconds for each root."""
    policy, (_, num_actions, num_legal) = make_policy(size), SIZES[size]
    policy.search(make_roots(4, num_actions=num_actions, num_legal=num_legal), num_actions=num_actions)  # warm-up
    rows, per_root = [], []
    for count in batches:
        roots = make_roots(count, num_actions=num_actions, num_legal=num_legal)
        repeats = 2 if count < 16 else 1
        total_s, model_s, results = search_batch(policy, roots, num_actions=num_actions, repeats=repeats)
        per_root.append(
            {
                "sizes": size,
                "roots": count,
                "ms": 1000 * total_s / count,
                "model_ms": 1000 * model_s / count,
                "tree_ms": 1000 * (total_s - model_s) / count,
            }
        )
        if (size, count) == ("default", 64):
            continue  # it would take half a minute
        each = partial(search_each, policy, roots, num_actions=num_actions)
        each_s, expected = seconds(each, repeats=repeats)
        rows.append(Row(f"{size}, one search over E={count}", total_s, each_s, None, same_visits(results, expected)))
    return rows, per_root


def main() -> int:
    """Returns the exit code: 0 if all results are equal, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the small size, with 1 and 4 roots")
    quick = parser.parse_args().quick
    rows: list[Row] = []
    per_root: list[Any] = []
    for size in ["small"] if quick else SIZES:
        own_rows, own_times = measure(size, batches=BATCHES[:2] if quick else BATCHES)
        rows += own_rows
        per_root += own_times
    print(f"{'milliseconds for each root':26}  {'total':>7}  {'model':>7}  {'tree':>7}")
    for times in per_root:
        name = f"{times['sizes']}, E={times['roots']}"
        print(f"{name:26}  {times['ms']:7.1f}  {times['model_ms']:7.1f}  {times['tree_ms']:7.1f}")
    return report("search", rows, per_root=per_root, threads=torch.get_num_threads())


if __name__ == "__main__":
    sys.exit(main())
