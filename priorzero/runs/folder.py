"""The folder of a run: its name, its lock and its files."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from loguru import logger

from priorzero.config import dump_settings
from priorzero.envs import GameSpec
from priorzero.runs.checkpoint import saved_checkpoints
from priorzero.runs.files import CONFIG, EPISODES, ERROR, EVALUATIONS, LOCK, LOGS, recordings_after
from priorzero.runs.loggers import metrics_files
from priorzero.runs.progress import open_logs
from priorzero.runtime.concurrency import called_at_exit
from priorzero.runtime.paths import shown, user_path
from priorzero.settings import Settings
from priorzero.types import UserError

RUN_NAME = re.compile(r"[\w][\w.+-]{0,99}")
MAX_NAME_BYTES = 200  # the file system allows 255, and names of temporary folders are longer
MAX_ATTEMPTS = 100


def check_run_folder(settings: Settings) -> None:
    """Check that a new run's folder can be created. Nothing remains of the attempt.

    Raises:
        UserError: the name is invalid or exists, or ``run.output_dir`` cannot be written.
    """
    root, name = user_path(settings.run.output_dir, what="run.output_dir="), settings.run.exp_name
    if name and not is_run_name(name):
        raise UserError(
            f"run.exp_name={shown(name)!r}: use at most 100 letters, digits and . _ + - ({MAX_NAME_BYTES} bytes), for "
            "example zork1_try2"
        )
    if name and os.path.lexists(root / name):
        raise _exists(root / name)
    _try_to_write(root)


def _try_to_write(root: Path) -> None:
    """Raise UserError if no folder can be created in the nearest existing folder, which may be a pseudo file system."""
    while True:
        existing = next(p for p in (root, *root.absolute().parents) if p.exists())
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".priorzero-", dir=existing))
            return
        except OSError as error:
            if existing.exists():  # otherwise another run has removed it, which it had created but not used
                raise _not_writable(root, error, where=existing) from error


def is_run_name(name: str) -> bool:
    """Whether a run can have this name."""
    return RUN_NAME.fullmatch(name) is not None and len(name.encode()) <= MAX_NAME_BYTES


def given_folder(text: str | Path, *, what: str) -> Path:
    """The path of a run's folder that a user gave, as :func:`user_path`. It has a name, also if ``.`` was given."""
    folder = user_path(text, what=what)
    return folder if folder.name and ".." not in folder.parts else folder.resolve()


@contextlib.contextmanager
def new_run_folder(settings: Settings, games: Sequence[GameSpec]) -> Iterator[Path]:
    """Create the folder of a new run and lock it until the end of the block.

    Without ``run.exp_name``, the folder gets a name that no other run has, also if several start at the same time. If
    nothing is written into it, it is removed at the end, also if a signal ends the process.

    Raises:
        UserError: the name is invalid or exists, or the folder cannot be created.
    """
    check_run_folder(settings)
    root = user_path(settings.run.output_dir, what="run.output_dir=")
    new_parents = [path for path in (root, *root.absolute().parents) if not path.exists()]
    folder = _create(root, settings.run.exp_name, games=games, seed=settings.run.seed)

    def remove_if_unused() -> None:
        with contextlib.suppress(OSError):  # another process has put something into one of these folders
            if os.listdir(folder) == [LOCK]:
                (folder / LOCK).unlink()
            for path in (folder, *new_parents):
                path.rmdir()

    lock = None
    try:
        with called_at_exit(remove_if_unused):
            lock = lock_folder(folder)
            yield folder
    finally:
        remove_if_unused()
        if lock is not None:
            lock.close()


def _create(root: Path, name: str, *, games: Sequence[GameSpec], seed: int) -> Path:
    for attempt in itertools.count(1):
        try:
            root.mkdir(parents=True, exist_ok=True)
            for path in [root / name] if name else (root / generated for generated in _names(games, seed=seed)):
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
                    return path
            raise _exists(root / name)
        except (
            FileNotFoundError,
            FileExistsError,
        ) as error:  # another run has just removed `root`, which it had created
            if attempt == MAX_ATTEMPTS:
                raise _not_writable(root, error, where=root) from error
        except OSError as error:
            raise _not_writable(root, error, where=root) from error
    raise AssertionError


def _names(games: Sequence[GameSpec], *, seed: int) -> Iterator[str]:
    """Names made of the games, the seed and the time, which can also be given as ``run.exp_name``."""
    others = f"_and_{len(games) - 1}_more" if len(games) > 1 else ""
    rest = f"{others}_seed{seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    stem = games[0].name[: 90 - len(rest)] + rest
    yield stem
    for number in itertools.count(2):
        yield f"{stem}_{number}"


def _exists(folder: Path) -> UserError:
    resume = f", or type --resume {shlex.quote(str(folder))} to continue this run" if saved_checkpoints(folder) else ""
    return UserError(
        f"run.exp_name={folder.name}: {folder} exists already; give another name, or none to get a new one{resume}"
    )


def _not_writable(root: Path, error: OSError, *, where: Path) -> UserError:
    return UserError(
        f"run.output_dir={root}: {where} is not a writable folder ({error.strerror}); give another one: --set "
        "run.output_dir=FOLDER"
    )


def create_files(settings: Settings, folder: Path) -> None:
    """Write a run's settings into its folder, which exists, and open its logs.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        (folder / LOGS).mkdir(exist_ok=True)
        (folder / CONFIG).write_text(dump_settings(settings), encoding="utf-8")
        (folder / ERROR).unlink(missing_ok=True)  # it ended the run before this was resumed
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error}); make it writable, or start a new run in another folder: --set "
            "run.output_dir=FOLDER"
        ) from error
    open_logs(folder / LOGS)


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


def truncate_files(folder: Path, sizes: Mapping[str, int], *, env_step: int) -> None:
    """Cut the files that a run appends to, to their sizes when its checkpoint was written, and remove later recordings.

    Args:
        folder: the run's.
        sizes: size in bytes of each file. Files that are not listed are removed: they were created later.
        env_step: environment steps in the checkpoint.
    """
    for path in [folder / EPISODES, folder / EVALUATIONS, *metrics_files(folder)]:
        if not path.exists():
            continue
        size = sizes.get(path.name, 0)
        if size == 0:
            path.unlink()
        elif path.stat().st_size > size:
            with path.open("r+b") as file:
                file.truncate(size)
    for path in recordings_after(folder, env_step):
        path.unlink()


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
    if not is_run_name(name) or not folder.is_dir() or saved_checkpoints(folder):
        return None
    lock_folder(folder).close()
    names = (folder.with_name(f"{folder.name}.unsaved{n}") for n in range(1, 1000))
    return folder.rename(next(name for name in names if not name.exists()))
