"""The folder of a run: its name, its lock and its files."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from loguru import logger

from priorzero.config import dump_settings
from priorzero.envs import GameSpec
from priorzero.runs.checkpoint import saved_checkpoints
from priorzero.runs.files import CONFIG, EPISODES, ERROR, EVALUATIONS, LOCK, LOGS
from priorzero.runs.progress import open_logs
from priorzero.settings import Settings
from priorzero.types import UserError

RUN_NAME = re.compile(r"[\w][\w.+-]{0,99}")


def new_run_folder(settings: Settings, games: Sequence[GameSpec]) -> Path:
    """The path of a new run's folder, which is not created yet.

    Raises:
        UserError: the name is invalid or exists, or the folder cannot be created.
    """
    root, name = Path(settings.run.output_dir), settings.run.exp_name
    if name:
        if not RUN_NAME.fullmatch(name):
            raise UserError(
                f"run.exp_name={name!r}: use at most 100 letters, digits and . _ + -, for example zork1_try2"
            )
        if (root / name).exists():
            raise UserError(
                f"run.exp_name={name}: {root / name} exists already; give another name, or none to get a new one"
            )
    else:
        others = f"_and_{len(games) - 1}_more" if len(games) > 1 else ""
        stem = f"{games[0].name}{others}_seed{settings.run.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
        names = [stem, *(f"{stem}_{n}" for n in range(2, 100))]
        name = next(n for n in names if not (root / n).exists())
    existing = next(p for p in (root, *root.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run.output_dir={root}: {existing} is not a writable folder; give another one")
    return root / name


def create_files(settings: Settings, folder: Path, *, resumed: bool) -> TextIO | None:
    """Create a run's folder, write its settings and open its logs.

    Returns:
        The lock of a new run; None for a resumed one, which is locked already.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        (folder / LOGS).mkdir(parents=True, exist_ok=resumed)
        (folder / CONFIG).write_text(dump_settings(settings), encoding="utf-8")
        (folder / ERROR).unlink(missing_ok=True)  # it ended the run before this was resumed
    except OSError as error:
        where = settings.run.output_dir
        raise UserError(f"run.output_dir={where}: cannot be written ({error}); give another folder") from error
    open_logs(folder / LOGS)
    return None if resumed else lock_folder(folder)


def lock_folder(folder: Path) -> TextIO:
    """Lock a run's folder against other processes, as long as the returned file is open.

    If the file system has no locks, a warning is logged.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
    """
    try:
        file = (folder / LOCK).open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error})") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(f"{folder}: another process is running this run; stop that process first") from error
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error}); make sure that no other process resumes this run")
    return file


def truncate_files(folder: Path, sizes: Mapping[str, int]) -> None:
    """Cut the files that a run appends to, to their sizes when its checkpoint was written.

    Args:
        folder: the run's.
        sizes: size in bytes of each file. Event files that are not listed are removed: they were created later.
    """
    for path in [folder / EPISODES, folder / EVALUATIONS, *folder.glob("events.out.tfevents.*")]:
        if not path.exists():
            continue
        size = sizes.get(path.name, 0)
        if size == 0:
            path.unlink()
        elif path.stat().st_size > size:
            with path.open("r+b") as file:
                file.truncate(size)


def rename_unsaved(output_dir: Path, name: str) -> Path | None:
    """Rename the folder of a run that ended before it saved anything, so that its name is free.

    Args:
        output_dir: folder of all runs.
        name: name of the run.

    Returns:
        The new path; None if there is no such run.

    Raises:
        UserError: the run is still running.
    """
    folder = output_dir / name
    if not RUN_NAME.fullmatch(name) or not folder.is_dir() or saved_checkpoints(folder):
        return None
    lock_folder(folder).close()
    names = (folder.with_name(f"{folder.name}.unsaved{n}") for n in range(1, 1000))
    return folder.rename(next(name for name in names if not name.exists()))
