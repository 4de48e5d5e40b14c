"""Checkpoints: whole or not there, checked before they are believed, and enough to go on as if nothing had happened."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from priorzero.config import OPTIONS, read_config_file, resolve_settings
from priorzero.play.action_vocabulary import ActionIndexer
from priorzero.policy import PriorZeroPolicy
from priorzero.settings import Settings
from priorzero.types import UserError

FORMAT = 6
MANIFEST = "manifest.json"
PACKAGES = ("priorzero", "torch", "transformers", "LightZero", "numpy")
RUN_NAME = re.compile(r"[\w][\w.+-]{0,99}")
NAME = re.compile(r"iteration_(\d+)(?:\+(\d+))?(~?)")  # with ~: what was there before it was written again

# What a resumed run may do otherwise than the run did before; everything else decides what is learned.
MAY_DIFFER = {
    "run": {
        "exp_name", "output_dir", "max_iter", "max_env_step", "device", "num_threads", "log_every", "trace_iterations",
        "checkpoint_every", "keep_checkpoints",
    },
    "env": {"evaluator_env_num", "step_timeout_s"},
    "encoder": {"cache_size"},
    "prior": {"engine", "attempts", "backoff_s", "timeout_s", "prompt_cache_tokens"},
    "llm": {"trust_remote_code", "micro_batch_size", "gradient_accumulation_steps", "learning_rate", "grad_clip"},
    "train": {"overlap", "learning_rate", "grad_clip", "max_nonfinite_updates"},
    "vllm": set(OPTIONS["vllm"]) - {"sync_every", "max_staleness"},
    "eval": {"every", "episodes", "modes", "unseen"},
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are as they were written.

    Attributes:
        folder: where it is, ``RUN/checkpoints/iteration_N``.
        manifest: counters, games, versions, and checksums of the files.
        settings: what the run was started with.
        damaged: later checkpoints of the run, the oldest first, which are damaged.
        notes: what its user should know, once the log is open.
    """

    folder: Path
    manifest: dict[str, Any]
    settings: Settings
    damaged: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def run_folder(self) -> Path:
        return self.folder.parent.parent


def save_checkpoint(folder: Path, *, write: Callable[[Path], None], about: Mapping[str, Any]) -> Path:
    """Write a checkpoint, aside first and then under its name, so that it is whole or not there.

    Args:
        folder: where it goes; what is there is replaced once the new one is whole.
        write: puts the files into a folder.
        about: what the manifest says besides versions and checksums.

    Raises:
        OSError: it cannot be written, for example because the disk is full; nothing of it is left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        write(aside)
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        manifest = {
            "format": FORMAT,
            **about,
            "versions": {name: _version(name) for name in PACKAGES},
            "files": {str(path.relative_to(aside)): _checksum(path) for path in files},
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        aside.chmod(0o755)
        for path in [*aside.rglob("*"), aside]:
            _sync(path)
        before = folder.with_name(f"{folder.name}~")  # found, too, if it ends here
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
            folder.rename(before)
        aside.rename(folder)
        for parent in folder.parents[:2]:  # the first checkpoint's folder is new as well
            _sync(parent)
        shutil.rmtree(before, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
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


def saved_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    found = []
    for path in (run_folder / "checkpoints").glob("iteration_*"):
        match = NAME.fullmatch(path.name)
        if match and (path / MANIFEST).is_file():
            found.append((int(match[1]), int(match[2] or 0), not match[3], path))
    return [path for *_, path in sorted(found)]


def remove_old_checkpoints(run_folder: Path, *, keep: int) -> None:
    """Leave the last ``keep`` (at least one); 0 leaves all."""
    for path in saved_checkpoints(run_folder)[:-keep] if keep else ():
        gone = path.with_name(f".{path.name}-old")  # at once; what is left if this process is killed is removed later
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(run_folder: Path) -> None:
    """What processes that were killed while they saved have left behind. The run must be claimed."""
    for path in (run_folder / "checkpoints").glob(".iteration_*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (run_folder / "checkpoints").glob("iteration_*~"):
        if path.with_name(path.name.removesuffix("~")).exists():
            shutil.rmtree(path, ignore_errors=True)


def _checked_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of files that are as they were written. Raises ValueError, OSError, KeyError, TypeError or
    AttributeError if they are not."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']}, this version reads {FORMAT}")
    for name, checksum in manifest["files"].items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"its manifest names a file outside of it: {name}")
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if _checksum(path) != checksum:
            raise ValueError(f"{name} is not what was written")
    return manifest


def read_state(folder: Path, name: str) -> Any:
    """Plain data that :func:`save_checkpoint` has written, after a check of the folder's files.

    Raises:
        UserError: they are not what was written.
    """
    try:
        _checked_manifest(folder)
        return torch.load(folder / name, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: is damaged ({type(error).__name__}: {error})") from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check a checkpoint's files against its manifest.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        manifest = _checked_manifest(folder)
        for name in ("training.pt", "world_model.pt", "actions.json", "config.yaml"):
            if name not in manifest["files"]:
                raise ValueError(f"{name} is missing")
        settings = resolve_settings(read_config_file(folder / "config.yaml"))
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    except UserError as error:
        raise ValueError(str(error)) from error
    return Checkpoint(folder, manifest, settings)


def newest_checkpoint(run_folder: Path) -> Checkpoint:
    """The newest checkpoint of a run that is sound. Damaged ones behind it are named in its notes.

    Raises:
        UserError: there is none.
    """
    found, notes, why = saved_checkpoints(run_folder), [], ""
    for folder in reversed(found):
        try:
            checkpoint = read_checkpoint(folder)
        except ValueError as error:
            notes.append(f"{folder} is damaged ({error}); the one before it is used")
            why = why or f" (the newest: {error})"
            continue
        checkpoint.damaged.extend(found[found.index(folder) + 1 :])
        checkpoint.notes.extend(notes)
        return checkpoint
    what = f"all {len(found)} checkpoints are damaged{why}" if found else "it holds no checkpoint"
    raise UserError(f"--resume {run_folder}: {what}; start a new run instead")


def set_damaged_aside(checkpoint: Checkpoint) -> None:
    """Rename the damaged checkpoints behind one, whose names the run needs again. The run must be claimed.

    Raises:
        UserError: one cannot be renamed.
    """
    for damaged in checkpoint.damaged:
        names = (damaged.with_name(f"damaged_{n}_{damaged.name}") for n in range(1, 1000))
        try:
            damaged.rename(next(name for name in names if not name.exists()))
        except OSError as error:
            raise UserError(f"{damaged} is damaged and cannot be renamed ({error}); remove it") from error


def find_checkpoint(where: str, *, output_dir: str, exp_name: str, wanted: Mapping[str, Any]) -> Checkpoint | None:
    """What ``--resume`` means.

    Args:
        where: a run's folder, its newest checkpoint's folder, or ``auto``: the run that saved last under
            ``output_dir``, of those that are named ``exp_name`` if it is given, and fit ``wanted``.
        output_dir: looked through for ``auto``.
        exp_name: "" for any.
        wanted: values of the group ``run`` that were given, such as ``env_id``.

    Returns:
        None where ``auto`` finds nothing.

    Raises:
        UserError: no sound checkpoint where one was named.
    """
    if where != "auto":
        folder = Path(where)
        if folder.parent.name == "checkpoints" and (folder / MANIFEST).is_file():
            later = saved_checkpoints(folder.parent.parent)
            if later and later[-1].resolve() != folder.resolve():
                raise UserError(
                    f"--resume {where}: the run went on to {later[-1].name}, and what came after would be written "
                    f"over; type --resume {folder.parent.parent}, or copy the run's folder without the later ones"
                )
            folder = folder.parent.parent
        if not folder.is_dir():
            raise UserError(f"--resume {where}: there is no such folder; name a run's folder, or auto")
        return newest_checkpoint(folder)
    if exp_name and not RUN_NAME.fullmatch(exp_name):
        return None  # no run is called so
    runs = {}
    for run_folder in [Path(output_dir, exp_name)] if exp_name else Path(output_dir).glob("*"):
        saved = saved_checkpoints(run_folder)
        if saved and all(_stored(saved, key) == value for key, value in wanted.items()):
            runs[run_folder] = (saved[-1] / MANIFEST).stat().st_mtime
    return newest_checkpoint(max(runs, key=runs.__getitem__)) if runs else None


def _stored(checkpoints: Sequence[Path], key: str) -> Any:
    for checkpoint in reversed(checkpoints):
        try:
            return read_config_file(checkpoint / "config.yaml")["run"][key]
        except (UserError, KeyError, TypeError):
            continue  # damaged
    return None


def check_same(checkpoint: Checkpoint, settings: Settings, *, games: Sequence[Any]) -> None:
    """Whether a run with these settings can go on from a checkpoint; packages that have changed are noted.

    Raises:
        UserError: it lists what differs.
    """
    if settings.run.max_env_step == 0:
        raise UserError("run.max_env_step=0 evaluates and trains nothing, and --resume goes on training; leave it out")
    different = [
        f"{group}.{key} is {settings[group][key]!r}, the checkpoint's is {value!r}"
        for group, values in checkpoint.settings.items()
        for key, value in values.items()
        if settings[group][key] != value and key not in MAY_DIFFER.get(group, ())
    ]
    were, are = checkpoint.manifest["games"], {game.name: game.md5 for game in games}
    if not different and were != are:
        different.append(f"the game files are {are}, the checkpoint's were {were}")
    if different:
        raise UserError(
            f"{checkpoint.folder}: the run cannot go on from this checkpoint:\n"
            + "\n".join(f"  - {difference}" for difference in different)
            + "\nleave these settings out, or start a new run without --resume"
        )
    versions = {name: _version(name) for name in PACKAGES}
    before = checkpoint.manifest["versions"]
    changed = [f"{name} {before.get(name)} to {now}" for name, now in versions.items() if now != before.get(name)]
    if changed:
        listed = ", ".join(changed)
        checkpoint.notes.append(f"packages have changed since the checkpoint: {listed}; figures may differ slightly")


def load_training(checkpoint: Checkpoint, *, policy: PriorZeroPolicy, indexer: ActionIndexer) -> dict[str, Any]:
    """Bring both models to where they were and return the rest of ``training.pt``.

    Raises:
        UserError: the checkpoint is of models of other shapes.
    """
    load_world_model(checkpoint.folder, policy=policy, indexer=indexer)
    state: dict[str, Any] = torch.load(checkpoint.folder / "training.pt", map_location="cpu", weights_only=True)
    if policy.llm_learner is not None:
        policy.llm_learner.llm.load(checkpoint.folder / "llm")
    policy.load_training_state(state["policy"])
    return state


def load_world_model(folder: Path, *, policy: PriorZeroPolicy, indexer: ActionIndexer) -> None:
    """Read the world model and the numbering of the actions back. The LLM is loaded by ``llm.path=FOLDER/llm``.

    Raises:
        UserError: the folder is no checkpoint, or one of a world model of another shape.
    """
    try:
        state = torch.load(folder / "world_model.pt", map_location="cpu", weights_only=True)
        actions = json.loads((folder / "actions.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: is not a checkpoint ({error}); give a folder under RUN/checkpoints") from error
    try:
        policy.load_world_model_state(state)
    except RuntimeError as error:
        raise UserError(
            f"{folder}: holds a world model of another shape; use the config.yaml beside it ({error})"
        ) from error
    indexer.load_state_dict(actions)
