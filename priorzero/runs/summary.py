"""The summary at the end of a run."""

from __future__ import annotations

import resource
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from priorzero.play.evaluator import Evaluation
from priorzero.runs.counters import Counters
from priorzero.settings import Settings


@dataclass(frozen=True)
class RunSummary:
    """What a run did.

    Attributes:
        folder: the run's folder.
        rows: name to value, as printed at the end.
        metrics: the last value of every metric.
        evaluations: the last evaluation of each mode.
        stopped: the run was stopped before its end; ``--resume`` continues it.
    """

    folder: Path
    rows: dict[str, Any]
    metrics: dict[str, float]
    evaluations: dict[str, Evaluation]
    stopped: bool


def summary_rows(
    counters: Counters,
    *,
    settings: Settings,
    games: str,
    num_episodes: int,
    recent_returns: Collection[float],
    updates: Mapping[str, Any],
    evaluations: Mapping[str, Evaluation],
    resources: Mapping[str, str],
    checkpoint: Path | None,
) -> dict[str, Any]:
    """The rows of a run's summary. ``updates`` and ``resources`` are rows themselves."""
    mean_return = f"{np.mean(list(recent_returns)):.2f}" if recent_returns else "-"
    return {
        "game": games,
        "iterations": counters.iteration,
        "environment steps": counters.env_step,
        "episodes finished": num_episodes,
        "mean return": f"{mean_return} over the last {len(recent_returns)} episodes",
        **updates,
        **{f"evaluation, {mode}": describe_evaluation(e) for mode, e in evaluations.items()},
        **resources,
        "checkpoint": checkpoint or "none (nothing was trained)",
        "charts": f"tensorboard --logdir {settings.run.output_dir}",
    }


def format_table(rows: Mapping[str, Any]) -> str:
    """Two aligned columns."""
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


def describe_evaluation(evaluation: Evaluation) -> str:
    """Mean score, mean return and wins, in one line."""
    return (
        f"mean score {evaluation.mean_score:.2f} of {evaluation.max_score:g}, "
        f"mean return {evaluation.mean_return:.2f}, {evaluation.wins} of {len(evaluation.returns)} episodes won"
    )


def peak_memory_mb() -> float:
    """The largest main memory of this process so far, in MB (10^6 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in KiB


def fingerprint(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """A checksum (CRC-32) of each tensor's bytes, by name."""
    return {
        name: zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, tensor in parameters.items()
    }


def count_moved(before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """How many tensors differ between two fingerprints."""
    return sum(before[name] != after[name] for name in before)
