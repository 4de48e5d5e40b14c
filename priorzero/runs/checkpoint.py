"""Checkpoints: written atomically, verified by checksums when they are read.

A checkpoint is the folder ``RUN/checkpoints/iteration_N``. Its ``manifest.json`` holds counters, games, versions and a
checksum of every file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from priorzero.config import dump_settings, read_config_file, resolve_settings
from priorzero.runs.files import (
    ACTIONS,
    CHECKPOINTS,
    CONFIG,
    EXPORTED_WORLD_MODEL,
    LLM_FOLDER,
    MANIFEST,
    PLAY_STATE,
    TRAINING_STATE,
    WORLD_MODEL,
)
from priorzero.settings import Settings
from priorzero.types import Plain, UserError

FORMAT = 10  # raise it when a change makes older checkpoints unreadable
EXPORT_FORMAT = 1  # the same for exported agents, see priorzero.runs.exported
AGENT_FILES = (WORLD_MODEL, ACTIONS, CONFIG)  # in the checkpoints of both training loops
REQUIRED_FILES = (TRAINING_STATE, *AGENT_FILES)  # for resuming
EXPORTED_FILES = (EXPORTED_WORLD_MODEL, PLAY_STATE, ACTIONS, CONFIG)  # of an exported agent
PACKAGES = ("priorzero", "torch", "transformers", "LightZero", "numpy")
# iteration_N, or iteration_N+STEPS in the middle of a collection; "~" marks a version that is being replaced.
CHECKPOINT_NAME = re.compile(r"iteration_(\d+)(?:\+(\d+))?(~?)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are intact.

    Attributes:
        folder: ``RUN/checkpoints/iteration_N``.
        manifest: counters, games, versions and checksums.
        settings: settings of the run.
        damaged: later checkpoints of the run that are damaged, oldest first.
        notes: warnings for the user, for the log of the resumed run.
    """

    folder: Path
    manifest: dict[str, Any]
    settings: Settings
    damaged: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def run_folder(self) -> Path:
        """The run's folder."""
        return self.folder.parent.parent


# ---- writing ----


def save_checkpoint(folder: Path, *, write: Callable[[Path], None], about: Mapping[str, Any]) -> Path:
    """Write a checkpoint into a temporary folder and rename it, so that it is complete or not there.

    Args:
        folder: folder of the checkpoint; an existing one is replaced.
        write: writes the files into a folder.
        about: entries of the manifest besides versions and checksums.

    Raises:
        OSError: it cannot be written, for example because the disk is full. Nothing of it remains.
    """

    def replace(temporary: Path) -> None:
        replaced = folder.with_name(f"{folder.name}~")  # still found if this process is killed now
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        temporary.rename(folder)
        for parent in folder.parents[:2]:  # the folder of the first checkpoint is new as well
            _sync(parent)
        shutil.rmtree(replaced, ignore_errors=True)

    return _write_whole(folder, write=write, about={"format": FORMAT, **about}, place=replace)


def save_export(
    folder: Path, *, write: Callable[[Path], None], about: Mapping[str, Any], unverified: Collection[str]
) -> Path:
    """Write an exported agent (:mod:`priorzero.runs.exported`) as :func:`save_checkpoint` writes a checkpoint.

    Args:
        folder: must not exist, or be empty.
        write: writes the files into a folder.
        about: entries of the manifest besides versions and checksums.
        unverified: names of files that users may change. The manifest has no checksums of them.

    Raises:
        OSError: it cannot be written. Nothing of it remains.
    """

    def place(temporary: Path) -> None:
        temporary.rename(folder)  # fails if files have been written to the folder meanwhile
        _sync(folder.parent)

    about = {"export_format": EXPORT_FORMAT, **about}
    return _write_whole(folder, write=write, about=about, place=place, unverified=unverified)


def _write_whole(
    folder: Path,
    *,
    write: Callable[[Path], None],
    about: Mapping[str, Any],
    place: Callable[[Path], None],
    unverified: Collection[str] = (),
) -> Path:
    """Write files and their manifest into a temporary folder beside ``folder``, which ``place`` then renames."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        write(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file() and path.name not in unverified)
        manifest = {
            **about,
            "versions": package_versions(),
            "files": {str(path.relative_to(temporary)): _checksum(path) for path in files},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        temporary.chmod(0o755)
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        place(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def save_tensors(state: Any, path: Path) -> None:
    """``torch.save``.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    import torch  # late, since checkpoints are looked for before torch is needed

    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch raises it in place of the error of `file`, which is in the chain
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise OSError(f"{path.name}: {error}") from error
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def write_world_model(folder: Path, *, parameters: Plain, actions: Plain, settings: Settings) -> None:
    """Write the files of a checkpoint that both training loops have, besides the LLM.

    Args:
        folder: where to write.
        parameters: state dict of the world model.
        actions: state of the action vocabulary.
        settings: settings of the run.

    Raises:
        OSError: a file cannot be written.
    """
    save_tensors(parameters, folder / WORLD_MODEL)
    (folder / ACTIONS).write_text(json.dumps(actions), encoding="utf-8")
    (folder / CONFIG).write_text(dump_settings(settings), encoding="utf-8")


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return "not installed"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading ----


def saved_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = []
    for path in (run_folder / CHECKPOINTS).glob("iteration_*"):
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match and (path / MANIFEST).is_file():
            found.append((int(match[1]), int(match[2] or 0), not match[3], path))
    return [path for *_, path in sorted(found)]


def read_checkpoint(folder: Path, *, resumable: bool = True) -> Checkpoint:
    """Read and verify a checkpoint.

    Args:
        folder: the checkpoint's.
        resumable: a run must be able to continue from it. Otherwise its agent must be complete, which is also true of
            a checkpoint of a run on a Ray cluster.

    Raises:
        ValueError: it is damaged or incomplete; the message says how.
    """
    try:
        manifest = _verified_manifest(folder)
        if (
            resumable
            and TRAINING_STATE not in manifest["files"]
            and any(name.startswith(f"{LLM_FOLDER}/") for name in manifest["files"])
        ):
            raise ValueError(
                "it belongs to a run on a Ray cluster, which cannot be resumed; a new run can start from its LLM: "
                f"--set llm.path={folder / LLM_FOLDER}"
            )
        is_exported = "export_format" in manifest
        if is_exported and resumable:
            raise ValueError("it is an exported agent, which contains no training state")
        for name in EXPORTED_FILES if is_exported else REQUIRED_FILES if resumable else AGENT_FILES:
            if name not in manifest["files"]:
                raise ValueError(f"{name} is missing")
        settings = resolve_settings(read_config_file(folder / CONFIG))
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    except UserError as error:
        raise ValueError(str(error)) from error
    return Checkpoint(folder, manifest, settings)


def read_state(folder: Path, name: str) -> Any:
    """One file that :func:`save_checkpoint` wrote, after all files of the folder were verified.

    Raises:
        UserError: the folder is damaged.
    """
    import torch

    try:
        _verified_manifest(folder)
        return torch.load(folder / name, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: is damaged ({type(error).__name__}: {error})") from error


def _verified_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after all files were verified.

    Raises:
        ValueError, OSError, KeyError, TypeError, AttributeError: the manifest or a file is damaged.
    """
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    key, known = ("export_format", EXPORT_FORMAT) if "export_format" in manifest else ("format", FORMAT)
    if manifest[key] != known:
        raise ValueError(f"its format is {manifest[key]}, this version of priorzero reads format {known}")
    if key == "format":  # in a cache of downloads, the files of an exported agent are links
        _check_links(folder)
    for name, checksum in manifest["files"].items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"its manifest names a file outside of the folder: {name}")
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if _checksum(path) != checksum:
            raise ValueError(f"{name} has a wrong checksum")
    return manifest


def _check_links(folder: Path) -> None:
    """Raise ValueError if a link leads out of the folder: an export would publish other files of this machine."""
    inside = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise ValueError(f"it contains a link to a file outside of the folder: {path.relative_to(folder)}")


# ---- removing ----


def remove_old_checkpoints(run_folder: Path, *, keep: int) -> None:
    """Keep the last ``keep`` checkpoints; 0 keeps all."""
    for path in saved_checkpoints(run_folder)[:-keep] if keep else ():
        removed = path.with_name(f".{path.name}-old")  # renamed first, so that an interruption leaves no half of it
        path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def remove_leftovers(run_folder: Path) -> None:
    """Remove what a process that was killed while saving left behind. The run must be locked."""
    for path in (run_folder / CHECKPOINTS).glob(".iteration_*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (run_folder / CHECKPOINTS).glob("iteration_*~"):
        if path.with_name(path.name.removesuffix("~")).exists():
            shutil.rmtree(path, ignore_errors=True)
