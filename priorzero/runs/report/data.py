"""Reads what a run has logged, for its report. Nothing here imports a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priorzero.config import read_config_file, resolve_settings
from priorzero.play.transcript import EvaluationTranscript, read_transcripts
from priorzero.runs.files import CONFIG, EPISODES, EVALUATIONS, LAST_EVALUATION, LOGS, METRICS_CSV
from priorzero.runs.loggers.csv_file import read_metrics_csv
from priorzero.runs.results import EVALUATION_KEYS, Result, read_lines, results_from
from priorzero.settings import Settings
from priorzero.types import UserError

Points = list[tuple[float, float]]  # (step, value)

EPISODE_KEYS = ("env_step", "total_reward")


@dataclass(frozen=True)
class RunData:
    """Everything that a run's folder says about it.

    Attributes:
        folder: the run's, as it was named.
        settings: the run's.
        episodes: lines of ``episodes.jsonl``.
        evaluations: in the order in which they were made, one for each mode.
        scalars: the metrics, (step, value) each.
        transcripts: episodes of the last evaluation.
        notes: what is missing in the folder and why, in sentences.
        seconds: wall time of the run.
        can_resume: there is a checkpoint from which the run can be continued.
    """

    folder: Path
    settings: Settings
    episodes: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Result]
    scalars: Mapping[str, Points]
    transcripts: Sequence[EvaluationTranscript]
    notes: Sequence[str]
    seconds: float
    can_resume: bool

    @property
    def iteration(self) -> int:
        """Iterations so far."""
        return int(self._last("collector_iter/env_steps")[0])

    @property
    def env_step(self) -> int:
        """Environment steps so far."""
        return int(self._last("collector_iter/env_steps")[1])

    @property
    def world_model_updates(self) -> int:
        """Updates of the world model so far."""
        return int(self._last("train/wm_total_loss")[0])

    @property
    def llm_updates(self) -> int:
        """Updates of the LLM so far; on a Ray cluster, PPO steps."""
        return int(self._last("ppo/steps" if self.on_cluster else "train/llm_version")[1])

    @property
    def on_cluster(self) -> bool:
        """Whether this is a run on a Ray cluster."""
        return any(name.startswith("cluster/") for name in self.scalars)

    @property
    def is_finished(self) -> bool:
        """Whether all iterations or all environment steps are done."""
        run = self.settings.run
        return self.iteration >= run.max_iter or self.env_step >= run.max_env_step

    @property
    def is_evaluated(self) -> bool:
        """Whether there is an evaluation of the last state."""
        return bool(self.evaluations) and self.evaluations[-1].env_step == self.env_step

    def evaluated_at(self, env_step: int) -> dict[tuple[str, bool], Result]:
        """The evaluations at one time: (mode, unseen) to result."""
        return {(e.mode, e.unseen): e for e in self.evaluations if e.env_step == env_step}

    def _last(self, name: str) -> tuple[float, float]:
        points = self.scalars.get(name)
        return points[-1] if points else (0.0, 0.0)


def read_run(folder: Path) -> RunData:
    """Read a run's folder.

    Raises:
        UserError: it is not a run's folder, or one of its files cannot be read.
    """
    settings = _read_settings(folder)
    episodes = read_lines(folder / EPISODES, keys=EPISODE_KEYS)
    lines = read_lines(folder / EVALUATIONS, keys=EVALUATION_KEYS)
    scalars = read_scalars(folder)
    evaluations = results_from(lines)
    notes: list[str] = []
    transcripts = _read_last_transcripts(folder, evaluations, notes)
    times = [line.get("wall_s", 0.0) for line in (*episodes[-1:], *lines[-1:])]
    times += [value for _, value in scalars.get("time/run_s", [])[-1:]]
    return RunData(
        folder=folder,
        settings=settings,
        episodes=episodes,
        evaluations=evaluations,
        scalars=scalars,
        transcripts=transcripts,
        notes=notes,
        seconds=max(times, default=0.0),
        can_resume=any(folder.glob("checkpoints/iteration_*/training.pt")),
    )


def _read_settings(folder: Path) -> Settings:
    example = "give a run's folder, such as data_priorzero/NAME"
    if folder.is_file():
        raise UserError(f"{folder} is a file; {example}")
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; {example}")
    if folder.parent.name == "checkpoints" and (folder / CONFIG).is_file():
        raise UserError(f"{folder} is a checkpoint; give its run's folder, {folder.parent.parent}")
    if not ((folder / CONFIG).is_file() and (folder / LOGS).is_dir()):
        runs = sorted(path.parent for path in folder.glob(f"*/{CONFIG}") if (path.parent / LOGS).is_dir())
        if runs:
            newest = max(runs, key=lambda run: (run / CONFIG).stat().st_mtime)
            raise UserError(
                f"{folder} is not a run's folder, but it contains {len(runs)} of them; name one, such as {newest}"
            )
        raise UserError(f"{folder} is not a run's folder: it has no {CONFIG} with {LOGS}/ beside it; {example}")
    try:
        return resolve_settings(read_config_file(folder / CONFIG))
    except UserError as error:
        raise UserError(
            f"{folder}: its {CONFIG} cannot be used; the run may come from another version of PriorZero. {error}"
        ) from error


def _read_last_transcripts(
    folder: Path, evaluations: Sequence[Result], notes: list[str]
) -> Sequence[EvaluationTranscript]:
    """The transcripts, if they belong to the last evaluation. Otherwise [], and a note says why."""
    path = folder / LAST_EVALUATION
    if not evaluations:
        return []
    if not path.exists():
        notes.append(f"The steps of the last evaluation were not stored: {LAST_EVALUATION} is missing.")
        return []
    try:
        env_step, transcripts = read_transcripts(path)
    except (OSError, ValueError, KeyError) as error:
        notes.append(f"The steps of the last evaluation cannot be read from {LAST_EVALUATION} ({error}).")
        return []
    if env_step != evaluations[-1].env_step:
        notes.append(
            f"{LAST_EVALUATION} is left out: it is from an evaluation at {env_step} environment steps, which was "
            "undone when the run was resumed from an earlier checkpoint."
        )
        return []
    return transcripts


def read_scalars(folder: Path) -> dict[str, Points]:
    """All metrics in the TensorBoard files and in ``metrics.csv`` of a run: name to (step, value).

    What is damaged is left out. A run can have both, each for a part of it: ``run.loggers`` may change when it is
    resumed.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    scalars: dict[str, Points] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value") and math.isfinite(value.simple_value):
                    scalars.setdefault(value.tag, []).append((float(event.step), float(value.simple_value)))
    if (folder / METRICS_CSV).exists():
        for name, points in read_metrics_csv(folder / METRICS_CSV).items():
            known = {step for step, _ in scalars.get(name, [])}
            added = [point for point in points if point[0] not in known]
            if added:
                scalars[name] = sorted([*scalars.get(name, []), *added])
    return scalars
