"""What every logger of metrics can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from priorzero.play.transcript import EvaluationTranscript

# What a step counts: world-model updates, iterations, or environment steps.
Axis = Literal["train_iter", "iteration", "env_step"]


class MetricsLogger(Protocol):
    """Writes the metrics of a run to one place."""

    def write(self, scalars: Mapping[str, float], *, step: int, axis: Axis) -> None:
        """Write finite values of one step.

        Raises:
            OSError: a file of the run cannot be written. This ends the run, which can be resumed.
        """

    def write_evaluation(
        self, scalars: Mapping[str, float], *, transcripts: Sequence[EvaluationTranscript], env_step: int
    ) -> None:
        """Write the results of an evaluation, and the first episode of each mode and game.

        Raises:
            OSError: as of :meth:`write`.
        """

    def close(self, *, failed: bool) -> None:
        """Write what is not written yet. ``failed``: an error has ended the run. Errors are logged, not raised."""
