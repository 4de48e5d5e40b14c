"""The folder of a run."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from loguru import logger

from priorzero.config import dump_settings
from priorzero.envs.games import GameSpec
from priorzero.runs.checkpoint import RUN_NAME, saved_checkpoints
from priorzero.runs.metrics import open_logs
from priorzero.settings import Settings
from priorzero.types import UserError


def new_run_folder(settings: Settings, games: Sequence[GameSpec]) -> Path:
    """The run's folder, not made yet. A name that was given must be new; a made-up one is."""
    root, name = Path(settings.run.output_dir), settings.run.exp_name
    if name:
        if not RUN_NAME.fullmatch(name):
            raise UserError(
                f"run.exp_name={name!r}: use at most 100 letters, digits and . _ + -, for example zork1_try2"
            )
        if (root / name).exists():
            raise UserError(
                f"run.exp_name={name}: {root / name} exists and is left as it is; "
                "give another name, or none to get a new one"
            )
    else:
        several = f"_and_{len(games) - 1}_more" if len(games) > 1 else ""
        stem = f"{games[0].name}{several}_seed{settings.run.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
        names = [stem, *(f"{stem}_{n}" for n in range(2, 100))]
        name = next(n for n in names if not (root / n).exists())
    existing = next(p for p in (root, *root.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run.output_dir={root}: {existing} is not a folder that can be written to; give another one")
    return root / name


def begin_files(settings: Settings, folder: Path, *, again: bool) -> TextIO | None:
    """Open a run's folder and logs; returns the lock of a new run (one that goes on has been locked).

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        (folder / "log").mkdir(parents=True, exist_ok=again)
        (folder / "config.yaml").write_text(dump_settings(settings), encoding="utf-8")
    except OSError as error:
        where = settings.run.output_dir
        raise UserError(f"run.output_dir={where}: cannot be written ({error}); give another folder") from error
    open_logs(folder / "log")
    return None if again else claim(folder)


def cut_files(folder: Path, sizes: dict[str, int]) -> None:
    """Shorten what a run appends to, to what it held when its checkpoint was written; what came later is done again.

    Args:
        folder: the run's.
        sizes: bytes of each file; event files that are not among them were begun later.
    """
    for path in [folder / "episodes.jsonl", folder / "evaluations.jsonl", *folder.glob("events.out.tfevents.*")]:
        if not path.exists():
            continue
        size = sizes.get(path.name, 0)
        if size == 0:
            path.unlink()
        elif path.stat().st_size > size:
            with path.open("r+b") as file:
                file.truncate(size)


def claim(folder: Path) -> TextIO:
    """Keep other processes from writing into a run's folder, for as long as the file is open.

    A file system that knows no locks keeps nobody out; this is logged.

    Raises:
        UserError: another process has it, or the folder cannot be written to.
    """
    try:
        file = (folder / ".lock").open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error})") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(f"{folder}: another process is running this run; end that one first") from error
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error}): see to it that no other process goes on with this run")
    return file


def set_unsaved_aside(folder: Path) -> Path | None:
    """Rename the folder of a run that ended before it saved anything, so that its name is free; None if there is none.

    Raises:
        UserError: the run is under way.
    """
    if not folder.is_dir() or saved_checkpoints(folder):
        return None
    claim(folder).close()
    names = (folder.with_name(f"{folder.name}.unsaved{n}") for n in range(1, 1000))
    return folder.rename(next(name for name in names if not name.exists()))
