"""Saving a run: a checkpoint is written now and then, and a failure does not end the run."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loguru import logger

from priorzero.runs.checkpoint import remove_old_checkpoints, save_checkpoint
from priorzero.runs.errors import disk_advice
from priorzero.runtime.concurrency import run_in_thread
from priorzero.types import UserError


class Saver:
    """Writes the checkpoints of a run.

    Args:
        keep: number of checkpoints to keep; 0 keeps all.
        resumable: whether ``--resume`` continues the run.

    Attributes:
        last: the last checkpoint that was written or resumed from; None if there is none.
        failure: why the last attempt to write one failed; "" if it did not.
    """

    def __init__(self, run_folder: Path, *, keep: int, resumable: bool = True) -> None:
        self.last: Path | None = None
        self.failure = ""
        self._advice: str | None = None  # what to do about the failure
        self._resumable = resumable
        self._run_folder = run_folder
        self._keep = keep
        self._last_about: Mapping[str, Any] = {}

    def resumed_from(self, folder: Path, *, about: Mapping[str, Any]) -> None:
        """The run was resumed from this checkpoint, so that it need not be written again."""
        self.last, self._last_about = folder, about

    def is_saved(self, name: str, *, about: Mapping[str, Any]) -> bool:
        """Whether the last checkpoint has this name and these entries of the manifest, and still exists."""
        folder = self._run_folder / "checkpoints" / name
        return os.path.exists(folder) and (folder, about) == (self.last, self._last_about)

    def check(self) -> None:
        """Raises UserError if the last checkpoint of a run that has ended could not be written."""
        if self.failure:
            steps = [] if self._advice is None else [self._advice]
            if self._resumable and self.last is not None:
                steps.append(f"type --resume {shlex.quote(str(self._run_folder))}")
            what_to_do = f"; {', then '.join(steps)}" if steps else ""
            raise UserError(
                f"the run has ended, but {self.failure}; the last checkpoint is {self.last or 'none'}{what_to_do}"
            )

    def log_last(self) -> None:
        """Log where an interrupted run was saved, if it was."""
        if self.last is not None and not self.failure:
            logger.warning(f"interrupted; what was learned so far is in {self.last}")

    async def save(self, name: str, *, write: Callable[[Path], None], about: Mapping[str, Any]) -> None:
        """Write a checkpoint and remove the oldest. If it cannot be written, this is logged.

        Nothing is written if :meth:`is_saved`.

        Args:
            write: writes the files into a folder; raises OSError or RuntimeError if this fails.
            about: entries of the manifest.
        """
        if self.is_saved(name, about=about):
            return
        folder = self._run_folder / "checkpoints" / name
        started = time.perf_counter()
        try:
            # In a thread, so that a second signal is noticed. The caller does nothing else meanwhile, also if it is
            # cancelled: it then saves again.
            await run_in_thread(lambda: save_checkpoint(folder, write=write, about=about))
        except (OSError, RuntimeError) as error:  # safetensors and torch raise RuntimeError, too
            self.failure = f"{name} could not be written ({' '.join(str(error).split())[:200]})"
            self._advice = disk_advice(error, folder=self._run_folder) if isinstance(error, OSError) else None
            logger.error(f"checkpoint {self.failure}; the last checkpoint is {self.last or 'none'}")
            return
        self.last, self._last_about, self.failure = folder, about, ""
        duration = time.perf_counter() - started
        try:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            logger.debug(f"checkpoint {name}: {size / 1e6:.0f} MB in {duration:.1f} s")
            remove_old_checkpoints(self._run_folder, keep=self._keep)
        except OSError as error:  # the checkpoint itself was written
            logger.warning(f"the checkpoints before {name} could not be removed ({error})")
