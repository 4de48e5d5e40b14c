"""One search over E games against a search for each of them. Takes about two minutes; ``--quick`` half a minute.

    python scripts/bench_search.py

25 simulations from roots with four observations of history, exploration noise and a seed each, on a world model with
random parameters: in the sizes of the quick test (embed 128, 100 actions given out, 12 of them valid) and in the
default ones (embed 512, 256 actions, 20 valid). Equal means the same visit counts in the batch and alone.

A second table tells milliseconds a root apart: the model's forward passes, and the rest, which is the tree. It holds
LightZero's C++ tree too, which has no row: it breaks ties by the clock, and its first simulation from a root visits any
of the valid actions whatever their prior (measured), so its searches do not repeat themselves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np
import torch
from bench_tools import Row, report, seconds

from priorzero.config import PRESETS, resolve_settings
from priorzero.policy import PriorZeroPolicy
from priorzero.search.base import Root, SearchResult
from priorzero.world_model.inference import WorldModelInference

FEATURE_SIZE = 3 * 384 + 128  # what the default encoder makes of feedback, room and inventory
SIZES = (("quick_test", 100, 12), ("standard", 256, 20))  # preset, actions given out, valid ones
BATCHES = (1, 4, 16, 64)


def make_policy(preset: str, *, tree: str) -> PriorZeroPolicy:
    """A policy in the sizes of a preset; 25 simulations whatever it says."""
    layer = {"search": {"num_simulations": 25, "tree": tree}, "prior": {"enabled": False}}
    settings = resolve_settings(PRESETS[preset], layer, {"eval": {"modes": ["world_model"]}})
    torch.manual_seed(0)
    policy = PriorZeroPolicy(settings, feature_size=FEATURE_SIZE, device="cpu", llm=None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.network.parameters():  # LightZero starts its heads at zero, where all actions are alike
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return policy


def make_roots(count: int, *, num_actions: int, num_legal: int) -> list[Root]:
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


class Stopwatch(WorldModelInference):
    """Adds up the seconds of the model's passes."""

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


def batched(
    policy: PriorZeroPolicy, roots: list[Root], *, num_actions: int, repeats: int
) -> tuple[float, float, list[SearchResult]]:
    """One search over all roots: seconds, seconds of them in the model (both of the fastest run), and the results."""
    runs = []
    for _ in range(repeats):
        policy.inference = Stopwatch(policy.network, to_scalar=policy.inverse_scalar_transform_handle)
        total_s, results = seconds(lambda: policy.search(roots, num_actions=num_actions), repeats=1)
        runs.append((total_s, policy.inference.model_s))
    return *min(runs), results


def same(one: list[SearchResult], other: list[SearchResult]) -> bool:
    """Whether two lists of searches agree in every visit count."""
    return all(np.array_equal(a.visit_counts, b.visit_counts) for a, b in zip(one, other, strict=True))


def main(arguments: list[str]) -> int:
    quick = arguments == ["--quick"]
    if arguments and not quick:
        sys.exit("usage: python scripts/bench_search.py [--quick]")
    rows, table = [], []
    for preset, num_actions, num_legal in SIZES[:1] if quick else SIZES:
        for tree in ("python", "cpp"):
            policy = make_policy(preset, tree=tree)
            policy.search(make_roots(4, num_actions=num_actions, num_legal=num_legal), num_actions=num_actions)
            for count in BATCHES[:2] if quick else BATCHES:
                roots = make_roots(count, num_actions=num_actions, num_legal=num_legal)
                repeats = 2 if count < 16 else 1
                total_s, model_s, together = batched(policy, roots, num_actions=num_actions, repeats=repeats)
                table.append(
                    {
                        "sizes": preset, "tree": tree, "roots": count, "ms": 1000 * total_s / count,
                        "model_ms": 1000 * model_s / count, "tree_ms": 1000 * (total_s - model_s) / count,
                    }
                )  # fmt: skip
                if tree == "python" and (preset, count) != ("standard", 64):  # half a minute, for what E=16 shows
                    alone_s, alone = seconds(
                        lambda: [policy.search([r], num_actions=num_actions)[0] for r in roots],  # noqa: B023
                        repeats=repeats,
                    )
                    equal = same(together, alone)
                    rows.append(Row(f"{preset}, one search over E={count}", total_s, alone_s, None, equal))
    print(f"{'milliseconds a root':24}  {'in all':>7}  {'model':>7}  {'tree':>7}")
    for line in table:
        name = f"{line['sizes']}, {line['tree']}, E={line['roots']}"
        print(f"{name:24}  {line['ms']:7.1f}  {line['model_ms']:7.1f}  {line['tree_ms']:7.1f}")
    return report("search", rows, per_root=table, threads=torch.get_num_threads())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
