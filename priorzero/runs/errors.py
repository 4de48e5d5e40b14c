"""Errors that end a run."""

from __future__ import annotations

import contextlib
import errno
import shlex
from collections.abc import Iterator
from pathlib import Path

from priorzero.settings import Settings
from priorzero.types import EngineError, GameTimeoutError, GameWorkerError, UserError

_SPACE = "free some space, or ask for a larger quota"
_WRITABLE = "make it writable"
_DISK = "check the disk, or the network file system"
_FILES = "raise the limit of open files (ulimit -n)"
# What to do about errors that always come from a file system.
DISK_ERRORS = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "the file is larger than the file system or ulimit -f allows: raise the limit",
    errno.EROFS: _WRITABLE,
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
}
# The same for errors that can also have other causes. They count if they name a file of the run.
FILE_ERRORS = {
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.ENOENT: "if the run's folder was moved, move it back",
    errno.ENOTDIR: "if the run's folder was moved, move it back",
    errno.EISDIR: "remove this folder",
    errno.ELOOP: _DISK,
    errno.ENOTCONN: _DISK,
    errno.ENODEV: _DISK,
    errno.ENXIO: _DISK,
    errno.ETIMEDOUT: _DISK,
    errno.ENAMETOOLONG: "give run.output_dir a shorter name",
}


@contextlib.contextmanager
def reported_to_user(folder: Path, settings: Settings, *, resumable: bool = True) -> Iterator[None]:
    """Raise UserError in place of errors of games, engines, disks and the GPU's memory.

    ``resumable``: ``--resume`` continues the run.
    """
    try:
        yield
    except GameWorkerError as error:
        raise UserError(
            f"the game failed: {error}{more_time(error, settings)}. The last checkpoint is in {folder}"
        ) from error
    except EngineError as error:
        raise UserError(f"the LLM engine failed: {error}. The run's files are in {folder}") from error
    except RuntimeError as error:
        problem = out_of_memory(error, settings)
        if problem is None:
            raise
        raise UserError(
            f"{problem}. A new run needs less memory with --set llm.use_lora=true, a smaller llm.path, or --set "
            f"train.batch_size={settings.train.batch_size // 2}. The run's files are in {folder}"
        ) from error
    except OSError as error:
        advice = disk_advice(error, folder=folder)
        if advice is None:
            raise
        then = f"type --resume {shlex.quote(str(folder))}" if resumable else "start a new run"
        raise UserError(f"{folder}: cannot write ({error}); {advice}, then {then}") from error


def more_time(error: GameWorkerError, settings: Settings) -> str:
    """After a game exceeded its time limit: what to type if it needs more time for a step. Otherwise empty."""
    if not isinstance(error, GameTimeoutError):
        return ""
    return f". If it needs more time, type --set env.step_timeout_s={10 * settings.env.step_timeout_s:g}"


def out_of_memory(error: RuntimeError, settings: Settings) -> str | None:
    """The message of an error for lack of GPU memory, and how to free some; None if it is another error."""
    import torch  # late, since the module is also used where torch is not needed

    if not isinstance(error, torch.OutOfMemoryError):
        return None
    uses_vllm = settings.prior.enabled and settings.prior.engine == "vllm"
    return (
        f"out of GPU memory ({' '.join(str(error).split())[:200]}). End other programs that use the GPU (nvidia-smi "
        f"lists them){', or lower vllm.gpu_memory_utilization' if uses_vllm else ''}"
    )


def disk_advice(error: OSError, *, folder: Path) -> str | None:
    """What the user can do about an error of the file system; None if it is another error.

    Args:
        error: the error.
        folder: the run's.
    """
    if error.errno in DISK_ERRORS:
        return DISK_ERRORS[error.errno]
    names = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, (str, Path))]
    if any(name.absolute().is_relative_to(folder.absolute()) for name in names):
        return FILE_ERRORS.get(error.errno or 0)
    return None
