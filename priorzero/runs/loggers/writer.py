"""The loggers of a run together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from loguru import logger

from priorzero.play.transcript import EvaluationTranscript
from priorzero.runs.files import METRICS_CSV
from priorzero.runs.loggers.base import Axis, MetricsLogger
from priorzero.runs.loggers.csv_file import CsvLogger
from priorzero.runs.loggers.tensorboard import EVENTS, TensorBoardLogger
from priorzero.runs.loggers.wandb_run import WandbLogger, check_wandb
from priorzero.settings import RunSettings, Settings


class MetricsWriter:
    """Writes metrics with all loggers and keeps the last value of each metric.

    A value that is not finite is not written. It is counted and logged.

    Attributes:
        last: the last value of each metric.
        num_not_finite: number of values that were not finite.
    """

    def __init__(self, loggers: Sequence[MetricsLogger], *, last: Mapping[str, float] | None = None) -> None:
        self._loggers = loggers
        self.last: dict[str, float] = dict(last or {})
        self.num_not_finite = 0

    def write(self, scalars: Mapping[str, float], *, step: int, axis: Axis) -> None:
        """Write the values of one step; raises OSError if a file cannot be written."""
        finite = self._finite(scalars, step=step)
        for metrics_logger in self._loggers:
            metrics_logger.write(finite, step=step, axis=axis)

    def write_evaluation(
        self, scalars: Mapping[str, float], *, transcripts: Sequence[EvaluationTranscript], env_step: int
    ) -> None:
        """Write the results of an evaluation; raises OSError if a file cannot be written."""
        finite = self._finite(scalars, step=env_step)
        for metrics_logger in self._loggers:
            metrics_logger.write_evaluation(finite, transcripts=transcripts, env_step=env_step)

    def _finite(self, scalars: Mapping[str, float], *, step: int) -> dict[str, float]:
        finite = {}
        for name, value in scalars.items():
            if math.isfinite(value):
                finite[name] = self.last[name] = float(value)
            else:
                self.num_not_finite += 1
                logger.error(f"{name} is {value} at step {step}")
        return finite

    def close(self, *, failed: bool = False) -> None:
        """Close all loggers. ``failed``: an error has ended the run."""
        for metrics_logger in self._loggers:
            metrics_logger.close(failed=failed)


def make_metrics_writer(
    folder: Path, settings: Settings, *, last: Mapping[str, float] | None, seconds: Callable[[], float]
) -> MetricsWriter:
    """The loggers of ``run.loggers``.

    Args:
        folder: the run's.
        settings: all settings.
        last: the last value of each metric, if the run is resumed.
        seconds: returns the seconds that the run has taken so far.

    Raises:
        UserError: W&B cannot be started.
        OSError: a file cannot be written.
    """
    make: dict[str, Callable[[], MetricsLogger]] = {
        "tensorboard": lambda: TensorBoardLogger(folder, settings=settings, last=last),
        "csv": lambda: CsvLogger(folder, seconds=seconds),
        "wandb": lambda: WandbLogger(folder, settings),
    }
    return MetricsWriter([make[name]() for name in dict.fromkeys(settings.run.loggers)], last=last)


def check_loggers(run: RunSettings) -> None:
    """Check the loggers before a run starts.

    Raises:
        UserError: W&B is not installed, not logged in or cannot be reached.
    """
    if "wandb" in run.loggers:
        check_wandb()


def metrics_files(folder: Path) -> list[Path]:
    """The files of a run that loggers append to, whether or not ``run.loggers`` still names them."""
    return [path for path in (*sorted(folder.glob(EVENTS)), folder / METRICS_CSV) if path.exists()]
