"""Updates that were not applied because something in them is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger

from priorzero.types import NonFiniteError, Plain, StepRecord, UserError
from priorzero.world_model.records import RecordTable


def plain_batch(batch: Sequence[Any]) -> Plain:
    """The arrays of LightZero's current and target batch, in their order."""
    parts = {"current": batch[0], "target": batch[1]}
    return {name: [torch.as_tensor(np.asarray(array)) for array in part] for name, part in parts.items()}


class DroppedUpdates:
    """Keeps what was to be learned from where an update was not applied, and ends the run after too many in a row.

    Args:
        folder: the batches go there, in plain data, the first ``KEPT`` of a run.
        limit: updates in a row, of one model.
    """

    KEPT = 5

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
        self._in_a_row[model] = 0

    def dropped(self, model: str, error: NonFiniteError, *, records: Sequence[StepRecord], arrays: Plain) -> None:
        """Take note of an update that was not applied.

        Args:
            model: ``"world model"`` or ``"LLM"``.
            error: names the culprit.
            records: the decisions it began from.
            arrays: what was computed with, if there is more.

        Raises:
            UserError: it was the last in a row that is allowed.
        """
        self.total += 1
        self._in_a_row[model] = self._in_a_row.get(model, 0) + 1
        try:
            kept = self._keep(error, records, arrays)
        except (OSError, RuntimeError) as problem:  # torch raises RuntimeError for a full disk
            kept = f"; what it was to learn from could not be kept ({problem})"
        logger.error(f"update left out: {error}{kept}")
        if self._in_a_row[model] >= self._limit:
            raise UserError(f"{self._limit} updates in a row were left out (train.max_nonfinite_updates): {error}") from error

    def _keep(self, error: NonFiniteError, records: Sequence[StepRecord], arrays: Plain) -> str:
        files = (self._folder / f"batch_{n}.pt" for n in range(1, self.KEPT + 1))
        file = next((file for file in files if not file.exists()), None)
        if file is None:
            return ""
        table = RecordTable()
        for record in records:
            table.number(record)
        self._folder.mkdir(exist_ok=True)
        torch.save({"error": str(error), "records": table.state_dict(), "arrays": arrays}, file)
        return f"; what it was to learn from is in {file}"


