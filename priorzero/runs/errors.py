"""Errors that end a run."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from priorzero.settings import Settings
from priorzero.types import EngineError, GameWorkerError, UserError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def reported_to_user(folder: Path, settings: Settings, *, resumable: bool = True) -> Iterator[None]:
    """Raise UserError in place of errors of games, engines and disks. ``resumable``: ``--resume`` continues the run."""
    try:
        yield
    except GameWorkerError as error:
        raise UserError(
            f"the game failed: {error}. If it needs more time, type --set env.step_timeout_s="
            f"{10 * settings.env.step_timeout_s:g}. The last checkpoint is in {folder}"
        ) from error
    except EngineError as error:
        raise UserError(f"the LLM engine failed: {error}. The run's files are in {folder}") from error
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        how = (
            f"make it writable, then type --resume {folder}" if resumable else "make it writable, then start a new run"
        )
        raise UserError(f"{folder}: cannot write ({error}); {how}") from error
