"""``metrics.csv``: one line for each value, for pandas and spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from priorzero.play.transcript import EvaluationTranscript
from priorzero.runs.files import METRICS_CSV, append_text
from priorzero.runs.loggers.base import Axis

COLUMNS = ("metric", "axis", "step", "value", "wall_s")


class CsvLogger:
    """Appends to ``metrics.csv`` in the run's folder.

    The file has one line for each value (long format), since metrics have different axes and some are rare: a table
    with one column for each metric would be mostly empty, and its header would change when a new metric appears.

    Args:
        folder: the run's.
        seconds: returns the seconds that the run has taken so far.
    """

    def __init__(self, folder: Path, *, seconds: Callable[[], float]) -> None:
        self._path = folder / METRICS_CSV
        self._seconds = seconds

    def write(self, scalars: Mapping[str, float], *, step: int, axis: Axis) -> None:
        """Append one line for each value, or none if this raises OSError."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        if not self._path.exists():
            table.writerow(COLUMNS)
        wall_s = round(self._seconds(), 1)
        table.writerows([name, axis, step, float(value), wall_s] for name, value in scalars.items())
        append_text(self._path, text.getvalue())

    def write_evaluation(
        self, scalars: Mapping[str, float], *, transcripts: Sequence[EvaluationTranscript], env_step: int
    ) -> None:
        """Append the scalars. The transcripts are in ``last_evaluation.json``."""
        self.write(scalars, step=env_step, axis="env_step")

    def close(self, *, failed: bool) -> None:
        """There is nothing to close: the file is open only while it is written."""


def read_metrics_csv(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The values of each metric in ``metrics.csv``: name to (step, value). Malformed lines are left out.

    Raises:
        OSError: the file cannot be read.
    """
    scalars: dict[str, list[tuple[float, float]]] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            try:
                scalars.setdefault(row["metric"], []).append((float(row["step"]), float(row["value"])))
            except (KeyError, TypeError, ValueError):  # the end of the file was cut off
                continue
    return scalars
