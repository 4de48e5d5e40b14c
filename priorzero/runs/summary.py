"""The summary at the end of a run."""

from __future__ import annotations

import resource
import shlex
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from priorzero.play.evaluator import Evaluation
from priorzero.runs.counters import Counters
from priorzero.runs.files import EVALUATIONS, METRICS_CSV
from priorzero.runs.results import EVALUATION_KEYS, Result, read_lines, results_from
from priorzero.settings import MODE_NAMES, Settings


@dataclass(frozen=True)
class RunSummary:
    """What a run did.

    Attributes:
        folder: the run's folder.
        rows: name to value: counts, times and results.
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
        "charts": _charts(settings),
    }


def _charts(settings: Settings) -> str:
    """Where the metrics of ``run.loggers`` can be seen."""
    places = {
        "tensorboard": f"tensorboard --logdir {shlex.quote(settings.run.output_dir)}",
        "csv": f"{METRICS_CSV} in the run's folder",
        "wandb": "Weights & Biases",
    }
    return "; ".join(places[name] for name in settings.run.loggers)


def format_table(rows: Mapping[str, Any]) -> str:
    """Two aligned columns."""
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


def describe_evaluation(evaluation: Evaluation) -> str:
    """Mean score, mean return and wins, in one line."""
    maximum = f" of {evaluation.max_score:g}" if evaluation.max_score else ""
    return (
        f"mean score {evaluation.mean_score:.2f}{maximum}, "
        f"mean return {evaluation.mean_return:.2f}, {evaluation.wins} of {len(evaluation.returns)} episodes won"
    )


def summary_text(
    counters: Counters,
    *,
    stopped: bool,
    folder: Path,
    settings: Settings,
    games: str,
    num_episodes: int,
    updates: str,
    time: str,
    checkpoint: Path | None,
    resumable: bool,
) -> str:
    """What a run shows at its end. ``updates`` counts those of both models; ``time`` is from :func:`time_text`."""
    rows = {"updates": updates, "time": time}
    if (report := folder / "report.html").exists():
        rows["report"] = str(report)
    rows["checkpoint"] = str(checkpoint or "none (nothing was trained)")
    rows["charts"] = _charts(settings)
    if stopped and resumable and checkpoint is not None:
        rows["to continue"] = f"python -m priorzero.entry --resume {shlex.quote(str(folder))}"
    return (
        f"{'stopped' if stopped else 'done'}: {games}, {counters.env_step} env steps in {counters.iteration} "
        f"iterations, {num_episodes} training episodes\nwhat was learned\n"
        + learned_text(results_by_time(folder / EVALUATIONS), env_step=counters.env_step)
        + f"\nthe run\n{format_table(rows)}"
    )


# ---- what was learned ----


# (mode, whether the games are unseen in training) -> result
Results = dict[tuple[str, bool], Result]


def results_by_time(path: Path) -> dict[int, Results]:
    """Read ``evaluations.jsonl``: environment steps to the results of the last evaluation there, in ascending order."""
    by_time: dict[int, Results] = {}
    for result in results_from(read_lines(path, keys=EVALUATION_KEYS)):
        by_time.setdefault(result.env_step, {})[result.mode, result.unseen] = result
    return dict(sorted(by_time.items()))


def learned_text(scores: Mapping[int, Results], *, env_step: int) -> str:
    """What a run has learned, from :func:`results_by_time`: a sentence, and a table with the first and last evaluation.

    Args:
        env_step: environment steps of the run.
    """
    if not scores:
        return "  there was no evaluation"
    first, last = min(scores), max(scores)
    columns = [first, last] if first != last else [last]
    titles = {at: "before" if at == 0 else "after" if at == env_step else f"at {at} env steps" for at in columns}
    if env_step == 0:
        titles[0] = "without training"
    lines = []
    for unseen in (False, True):
        modes = [mode for mode, of_unseen in scores[last] if of_unseen == unseen]
        if modes:
            lines += _table(modes, [(titles[at], scores[at]) for at in columns], unseen=unseen)
    sentence = _sentence(scores[first], scores[last]) if len(columns) == 2 else None
    return "\n".join([*([f"  {sentence}"] if sentence else []), *(f"  {line}" for line in lines)])


def _table(modes: Sequence[str], columns: Sequence[tuple[str, Results]], *, unseen: bool) -> list[str]:
    """A line with the titles, and one line for each mode."""
    maximum = columns[-1][1][modes[0], unseen].max_score
    title = f"mean score{f' (at most {maximum:g})' if maximum else ''}{', games not trained on' if unseen else ''}"
    names = [title, *(f"  {MODE_NAMES[mode]} ({mode})" for mode in modes)]
    width = max(map(len, names))
    lines = [f"{title:<{width}}" + "".join(f"  {name:>8}" for name, _ in columns)]
    for mode, name in zip(modes, names[1:], strict=True):
        line = f"{name:<{width}}"
        for heading, scores in columns:
            score = scores.get((mode, unseen))
            line += f"  {'-' if score is None else f'{score.mean_score:.1f}':>{max(8, len(heading))}}"
        last = columns[-1][1][mode, unseen]
        lines.append(f"{line}   won {last.wins} of {last.num_episodes}")
    return lines


def _sentence(first: Results, last: Results) -> str | None:
    """How the score of the main mode has changed; None if it was not evaluated twice."""
    for mode in ("world_model_with_prior", "world_model", *(mode for mode, _ in last)):
        if (mode, False) in first and (mode, False) in last:
            before, after = (round(results[mode, False].mean_score, 1) for results in (first, last))
            verb = "rose" if after > before else "fell"
            change = f"stayed at {after:.1f}" if after == before else f"{verb} from {before:.1f} to {after:.1f}"
            return f"{MODE_NAMES[mode]}: the mean score {change}"
    return None


def time_text(seconds: Mapping[str, float], *, start_up_s: float, total_s: float, spent_s: float) -> str:
    """Where the time of this process went.

    Args:
        seconds: duration of each activity.
        start_up_s: seconds until the first iteration.
        total_s: seconds of the process.
        spent_s: seconds before the run was resumed.
    """
    evaluating = sum(s for name, s in seconds.items() if name.startswith("evaluating"))
    phases = {
        "start-up": start_up_s,
        **{name: seconds.get(name, 0.0) for name in ("collecting", "learning: world model", "learning: LLM")},
        "evaluating": evaluating,
        "saving": seconds.get("saving", 0.0),
    }
    longest_first = sorted(phases.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {s:.0f} s" for name, s in longest_first if s >= 0.5)
    before = f" (and {spent_s:.0f} s before it was resumed)" if spent_s else ""
    return f"{total_s:.0f} s{before}{f': {listed}' if listed else ''}"


# ---- resources and parameters ----


def peak_memory_mb() -> float:
    """The largest main memory of this process so far, in MB (10^6 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in KiB


def peak_memory_text() -> str:
    """The largest memory so far of this process, and of the GPU if the process uses one."""
    text = f"{peak_memory_mb():.0f} MB in this process"
    if torch.cuda.is_initialized():
        text += f", {torch.cuda.max_memory_reserved() / 1e6:.0f} MB of the GPU"
    return text


def fingerprint(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """A checksum (CRC-32) of each tensor's bytes, by name."""
    return {
        name: zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, tensor in parameters.items()
    }


def count_moved(before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """How many tensors differ between two fingerprints."""
    return sum(before[name] != after[name] for name in before)
