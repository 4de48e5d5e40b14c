"""The page of a report. Its template is ``page.html``, with the parts of :mod:`priorzero.runs.pages`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from priorzero.config import differences
from priorzero.play.transcript import EvaluationTranscript
from priorzero.runs.files import LAST_EVALUATION
from priorzero.runs.pages import make_environment
from priorzero.runs.pages.episodes import episode_data
from priorzero.runs.report.charts import Points, Series, line_chart, running_mean
from priorzero.runs.report.commands import commands
from priorzero.runs.report.data import RunData
from priorzero.settings import MODE_NAMES

# There are five colours. Modes that sample have that of the same agent without sampling, except the LLM alone.
MODE_COLOURS = {
    "world_model_with_prior": 1,
    "world_model_with_prior_sampled": 1,
    "world_model": 2,
    "world_model_sampled": 2,
    "prior": 3,
    "prior_sampled": 4,
    "random": 5,
}

# Titles and metrics of the charts of losses; those without values are left out.
LOSSES = (
    ("World model and LLM, total", "train/total_loss", 0),
    ("World model, total", "train/wm_total_loss", 2),
    ("World model: value", "train/wm_value_loss", 2),
    ("World model: policy", "train/wm_policy_loss", 2),
    ("World model: reward", "train/wm_reward_loss", 2),
    ("World model: latent", "train/wm_latent_loss", 2),
    ("LLM, total", "train/llm_loss", 3),
    ("LLM: SFT on visit counts", "train/llm_sft_loss", 3),
    ("LLM: RFT on rewards", "train/llm_rft_loss", 3),
    ("LLM: KL divergence", "train/llm_kl_loss", 3),
    ("PPO: policy", "ppo/policy_loss", 4),
    ("PPO: value", "ppo/value_loss", 4),
)

MEAN_WINDOW = 20  # training episodes, as in collector_iter/reward_mean
MAX_TRANSCRIPT_CHARS = 1_200_000  # of transcripts in the page; prompts, then trees, are left out beyond it


@dataclass(frozen=True)
class TimeShare:
    """Seconds in which a part of the iterations ran, and their share of the iterations' wall time."""

    name: str
    seconds: float
    share: float


def render(run: RunData, *, running: bool, error: str) -> str:
    """The page as HTML. ``running`` and ``error`` are those of :func:`priorzero.runs.report.write_report`."""
    data, left_out, size_note = episode_data(_sorted(run.transcripts), max_chars=MAX_TRANSCRIPT_CHARS)
    if left_out:
        left_out = f"{left_out} {LAST_EVALUATION} contains them."
    notes = [*run.notes, *filter(None, (left_out, size_note))]
    template = _environment().get_template("page.html")
    return template.render(
        run=run,
        games=run.settings.run.env_id,
        state=_state(run, running=running, error=error),
        error=error,
        facts=_facts(run),
        changed=[
            (f"{group}.{key}", "" if value is None else str(value))
            for group, values in differences(run.settings).items()
            for key, value in values.items()
        ],
        table=_table(run),
        curve=learning_curve(run),
        curve_legend=_curve_legend(run),
        losses=_loss_charts(run),
        times=time_shares(run),
        total_time=sum(value for _, value in run.scalars.get("time/iteration_s", [])),
        transcripts=data,
        notes=notes,
        commands=commands(run),
        duration=duration,
    )


@functools.cache
def _environment() -> Environment:
    return make_environment(Path(__file__).parent)


def duration(seconds: float) -> str:
    """``2.5 s``, ``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _state(run: RunData, *, running: bool, error: str) -> str:
    """One or two words, and a class of the style sheet as first word: ``done``, ``stopped`` or ``running``."""
    if running:
        return "running"
    if error:
        return "ended by an error"
    if run.is_finished:
        return "done" if run.is_evaluated else "stopped before the last evaluation"
    return "stopped"


def _facts(run: RunData) -> list[tuple[str, str, str]]:
    """Name, value and a remark for each number at the top of the page."""
    settings, total = run.settings, run.settings.run
    if run.on_cluster:
        llm_updates = ("PPO steps", f"{run.llm_updates}", "of the LLM")
    elif settings.prior.enabled:
        llm_updates = ("LLM updates", f"{run.llm_updates}", "")
    else:
        llm_updates = ("LLM", "none", "UniZero alone")
    return [
        ("iterations", f"{run.iteration}", f"of {total.max_iter:,}" if total.max_env_step else "evaluation only"),
        ("environment steps", f"{run.env_step:,}", f"at most {total.max_env_step:,}" if total.max_env_step else ""),
        ("training episodes", f"{len(run.episodes):,}", ""),
        ("world-model updates", f"{run.world_model_updates:,}", ""),
        llm_updates,
        ("wall time", duration(run.seconds), "without the start-up"),
    ]


# ---- evaluations ----


def mode_name(mode: str, *, unseen: bool = False) -> str:
    """A mode in words."""
    return MODE_NAMES.get(mode, mode) + (", unseen games" if unseen else "")


def _mode_order(key: tuple[str, bool]) -> tuple[bool, int, str]:
    """Sorts (mode, unseen): games that are trained on first, then in the order of ``MODE_NAMES``."""
    mode, unseen = key
    return unseen, list(MODE_NAMES).index(mode) if mode in MODE_NAMES else len(MODE_NAMES), mode


def _table(run: RunData) -> dict[str, Any]:
    """The first and the last evaluation: their environment steps, and one row for each mode."""
    if not run.evaluations:
        return {"times": [], "rows": []}
    times = list(dict.fromkeys([run.evaluations[0].env_step, run.evaluations[-1].env_step]))
    columns = [run.evaluated_at(time) for time in times]
    keys = sorted({key for column in columns for key in column}, key=_mode_order)
    rows = []
    for mode, unseen in keys:
        found = [column.get((mode, unseen)) for column in columns]
        best = next(result.max_score for result in reversed(found) if result is not None)
        rows.append({"name": mode_name(mode, unseen=unseen), "mode": mode, "results": found, "max_score": best})
    return {"times": times, "rows": rows}


# ---- charts ----


def learning_curve(run: RunData) -> Markup | None:
    """Returns of training episodes and evaluations over environment steps; None if there are neither."""
    series = _curve_series(run)
    if not any(one.points for one in series):
        return None
    values = [y for one in series for _, y in one.points]
    limit = max((e.max_score for e in run.evaluations), default=0.0)
    shown = 0 < limit <= 2 * max(values)  # a far larger maximum would flatten the curve
    return line_chart(
        series,
        title="return over environment steps",
        x_label="environment steps",
        limit=limit if shown else math.nan,
        from_zero=True,
    )


def _curve_series(run: RunData) -> list[Series]:
    points = [
        (float(line["env_step"]), float(line["total_reward"]))
        for line in run.episodes
        if math.isfinite(line["total_reward"])
    ]
    series = [Series("training episode", points, "dots", 0)]
    if len(points) > 1:
        mean = running_mean(points, window=MEAN_WINDOW)
        series.append(Series(f"mean of the last {MEAN_WINDOW} training episodes", mean, "line", 0))
    for mode, unseen in sorted({(e.mode, e.unseen) for e in run.evaluations}, key=_mode_order):
        own: Points = [
            (e.env_step, e.mean_return)
            for e in run.evaluations
            if (e.mode, e.unseen) == (mode, unseen) and math.isfinite(e.mean_return)
        ]
        label = f"evaluation: {mode_name(mode, unseen=unseen)}"
        series.append(Series(label, own, "marks", MODE_COLOURS.get(mode, 5)))
    return series


def _curve_legend(run: RunData) -> list[Series]:
    return [one for one in _curve_series(run) if one.points]


def _loss_charts(run: RunData) -> list[dict[str, Any]]:
    charts = []
    for title, name, colour in LOSSES:
        points = run.scalars.get(name, [])
        if not any(value for _, value in points):  # not learned, or switched off
            continue
        if name == "train/total_loss" and "train/llm_loss" not in run.scalars:  # the world model's
            continue
        by_iteration = run.on_cluster and not name.startswith("train/wm_")
        x_label = "iterations" if by_iteration else "world-model updates"
        chart = line_chart([Series(title, points, "line", colour)], title=title, x_label=x_label, width=360, height=190)
        charts.append({"title": title, "name": name, "svg": chart, "first": points[0][1], "last": points[-1][1]})
    return charts


def time_shares(run: RunData) -> list[TimeShare]:
    """How the wall time of the iterations was used, longest first. Parts may overlap."""
    total = sum(value for _, value in run.scalars.get("time/iteration_s", []))
    if not total:
        return []
    others = {"time/iteration_s", "time/run_s"}
    parts = {
        name.removeprefix("time/").removesuffix("_s").replace("_", " "): sum(value for _, value in points)
        for name, points in run.scalars.items()
        if name.startswith("time/") and name.endswith("_s") and name not in others
    }
    waits = zip(run.scalars.get("time/idle_share", []), run.scalars["time/iteration_s"], strict=False)
    parts["idle"] = sum(share * seconds for (_, share), (_, seconds) in waits)
    shares = [TimeShare(name, seconds, seconds / total) for name, seconds in parts.items()]
    return sorted(shares, key=lambda one: -one.seconds)


# ---- transcripts ----


def _sorted(episodes: Sequence[EvaluationTranscript]) -> list[EvaluationTranscript]:
    return sorted(episodes, key=lambda e: _mode_order((e["mode"], e["unseen"])))
