"""Non-finite updates: they are skipped, their batches are saved, and too many in a row end the run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from loguru import logger

from priorzero.types import NonFiniteError, Plain, StepRecord, UserError
from priorzero.world_model.records import RecordTable

MAX_SAVED_BATCHES = 5  # of a run


class NonFiniteUpdates:
    """Counts non-finite updates and saves their batches.

    Args:
        folder: folder of the saved batches, the first :data:`MAX_SAVED_BATCHES` of a run.
        limit: the run ends after this many in a row of one model.
    """

    def __init__(self, folder: Path, *, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._in_a_row: dict[str, int] = {}
        self.total = 0

    def state_dict(self) -> Plain:
        return {"total": self.total, "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state: Plain) -> None:
        self.total, self._in_a_row = state["total"], dict(state["in_a_row"])

    def applied(self, model: str) -> None:
        """An update of ``model`` was applied."""
        self._in_a_row[model] = 0

    def skipped(self, model: str, error: NonFiniteError, *, records: Sequence[StepRecord], arrays: Plain) -> None:
        """An update was skipped.

        Args:
            model: ``"world model"`` or ``"LLM"``.
            error: says what is not finite.
            records: the decisions of the batch.
            arrays: further arrays of the batch.

        Raises:
            UserError: it is the last non-finite update in a row that is allowed.
        """
        self.total += 1
        self._in_a_row[model] = self._in_a_row.get(model, 0) + 1
        try:
            saved = self._save(error, records, arrays)
        except (OSError, RuntimeError) as problem:  # torch raises RuntimeError if the disk is full
            saved = f"; the batch could not be saved ({problem})"
        logger.error(f"skipped a non-finite update: {error}{saved}")
        if self._in_a_row[model] >= self._limit:
            raise UserError(
                f"{self._limit} non-finite updates in a row were skipped (train.max_nonfinite_updates): {error}"
            ) from error

    def _save(self, error: NonFiniteError, records: Sequence[StepRecord], arrays: Plain) -> str:
        files = (self._folder / f"batch_{n}.pt" for n in range(1, MAX_SAVED_BATCHES + 1))
        file = next((file for file in files if not file.exists()), None)
        if file is None:
            return ""
        table = RecordTable()
        for record in records:
            table.number(record)
        self._folder.mkdir(exist_ok=True)
        try:
            torch.save({"error": str(error), "records": table.state_dict(), "arrays": arrays}, file)
        except (OSError, RuntimeError):
            with contextlib.suppress(OSError):
                file.unlink()  # an incomplete batch cannot be read
            raise
        return f"; the batch was saved to {file}"
