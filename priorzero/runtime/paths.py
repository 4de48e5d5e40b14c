"""Paths that a user gives, files that are written as a whole, and the user's cache folder."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from pathlib import Path

from priorzero.types import UserError

MAX_NAME = 255  # bytes of a file's name, on most file systems
MAX_PATH = 4095  # bytes of a path, on Linux
MAX_SHOWN = 200  # characters of a given text in a message


def user_path(text: str | Path, *, what: str) -> Path:
    """Convert a text that a user gave to a path. ``~`` and environment variables (``$NAME``, ``${NAME}``) are replaced.

    A path that contains ``$`` and exists as it is written is used as it is.

    Args:
        text: the text.
        what: where it was given, as the beginning of a message: ``"run.output_dir="``, ``"--config "``.

    Returns:
        A path for which ``exists``, ``is_file`` and ``is_dir`` raise no error. It need not exist. If it is a folder,
        the same holds for its files.

    Raises:
        UserError: the text is empty, not UTF-8, too long or contains a NUL character; it names an unknown user or
            variable; or the path cannot be accessed.
    """
    given = str(text)
    if not given:
        raise UserError(f"{what.rstrip(' =')} is empty; give a path")
    prefix = f"{what}{shown(given)}"
    check_path_text(given, prefix=prefix)
    expanded = _with_variables(_with_home(given, prefix=prefix), prefix=prefix)
    check_path_text(expanded, prefix=prefix)
    try:
        if not os.path.isabs(expanded):
            os.getcwd()
    except OSError as error:
        raise UserError(
            f"{prefix}: the working folder does not exist any more, or cannot be read ({error.strerror}); change to "
            "another one, or give an absolute path"
        ) from error
    try:
        if stat.S_ISDIR(os.stat(expanded).st_mode):
            os.stat(os.path.join(expanded, "."))  # its files can be looked up
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"{prefix}: cannot be accessed ({error.strerror}); give another path") from error
    path = Path(expanded)
    return path.absolute() if str(path).startswith("~") else path  # "./~" becomes "~", which must not be replaced again


def user_cache_dir() -> Path:
    """``priorzero`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``.

    Raises:
        UserError: the variable is not a usable path; or it is not set, and the user has no home folder.
    """
    value = os.environ.get("XDG_CACHE_HOME")
    if value:
        return user_path(value, what="XDG_CACHE_HOME=") / "priorzero"
    try:
        return Path.home() / ".cache" / "priorzero"
    except RuntimeError as error:
        raise UserError(
            "there is no folder for cached files: HOME is not set, and this user has no home folder; set "
            "XDG_CACHE_HOME to a writable folder, for example: export XDG_CACHE_HOME=/tmp/cache"
        ) from error


def free_space(folder: Path) -> int | None:
    """Free bytes on the disk of a folder, which need not exist; None if the file system does not know its size."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    disk = shutil.disk_usage(existing)
    return disk.free if disk.total else None  # a network file system may not know its size


def check_free_space(folder: Path, *, size: int, what: str, content: str, advice: str) -> None:
    """Check that ``size`` bytes are free on the disk of a folder, which need not exist.

    Args:
        folder: where something will be written.
        size: bytes.
        what: where the folder was given, as the beginning of the message.
        content: what will be written.
        advice: what to do besides freeing space.

    Raises:
        UserError: there is less space.
    """
    free = free_space(folder)
    if free is not None and free < size:
        raise UserError(
            f"{what}: {free / 1e6:.0f} MB are free, but {content} needs about {size / 1e6:.0f} MB; free some space, or "
            f"{advice}"
        )


def replace_text(path: Path, text: str) -> None:
    """Write a text file as a whole: other processes see the old or the new content. Surrogates are replaced by ``?``.

    Raises:
        OSError: it cannot be written. The old file is unchanged, and nothing else remains.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def shown(text: str) -> str:
    """A text for a message: unprintable characters are escaped, and a long text is shortened in the middle."""
    if not text.isprintable():
        text = ascii(text)
    if len(text) <= MAX_SHOWN:
        return text
    return f"{text[: MAX_SHOWN // 2]}...{text[-MAX_SHOWN // 4 :]} ({len(text)} characters)"


def text_problem(text: str) -> str | None:
    """Why no setting, and no path, can be this text; None if it can."""
    if "\0" in text:
        return "it contains a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "it is not UTF-8 text"
    return None


def check_path_text(text: str, *, prefix: str) -> None:
    """Check that a file can have this path.

    Raises:
        UserError: it cannot. The message begins with ``prefix``.
    """
    problem = text_problem(text)
    if problem is not None:
        raise UserError(f"{prefix}: {problem}; give another path, or rename the file or folder")
    name, path = max(len(name.encode()) for name in text.split("/")), len(text.encode())
    if name > MAX_NAME:
        raise UserError(f"{prefix}: a name in this path has {name} bytes, but at most {MAX_NAME} are possible")
    if path > MAX_PATH:
        raise UserError(f"{prefix}: the path has {path} bytes, but at most {MAX_PATH} are possible")


def _with_home(text: str, *, prefix: str) -> str:
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)  # unchanged if there is no such user, or no home folder
    if expanded.startswith("~"):
        user = text.split("/")[0]
        reason = "HOME is not set" if user == "~" else f"there is no user {user[1:]}"
        raise UserError(f"{prefix}: {user} is not known, since {reason}; give the whole path, or ./~ for this name")
    return expanded


def _with_variables(text: str, *, prefix: str) -> str:
    names = re.findall(r"\$\{?(\w+)", text)
    if not names or os.path.exists(text):
        return text
    unset = [name for name in names if name not in os.environ]
    if unset:
        raise UserError(f"{prefix}: the environment variable {unset[0]} is not set; set it, or give the whole path")
    return os.path.expandvars(text)
