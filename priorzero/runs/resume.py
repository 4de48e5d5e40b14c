"""Resuming a run: which checkpoint, and whether the settings fit."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from loguru import logger

from priorzero.config import read_config_file, resolve_settings
from priorzero.envs import GameSpec
from priorzero.runs.checkpoint import (
    Checkpoint,
    package_versions,
    read_checkpoint,
    remove_leftovers,
    saved_checkpoints,
)
from priorzero.runs.files import CHECKPOINTS, CONFIG, MANIFEST
from priorzero.runs.folder import given_folder, is_run_name, lock_folder
from priorzero.runtime.paths import user_path
from priorzero.settings import AUTO, Settings, VLLMSettings
from priorzero.types import UserError

# Settings that may change when a run is resumed. All others decide what is learned.
MAY_DIFFER = {
    "run": {
        "exp_name", "output_dir", "max_iter", "max_env_step", "device", "num_threads", "log_every", "loggers",
        "trace_iterations", "checkpoint_every", "keep_checkpoints", "record_every",
    },
    "env": {"evaluator_env_num", "step_timeout_s"},
    "prior": {"engine", "attempts", "backoff_s", "timeout_s", "prompt_cache_tokens"},
    "llm": {"dtype", "trust_remote_code", "micro_batch_size", "learning_rate", "grad_clip"},
    "train": {"overlap", "learning_rate", "grad_clip", "max_nonfinite_updates"},
    "vllm": set(VLLMSettings.model_fields) - {"sync_every", "max_staleness"},
    "eval": {"every", "at_start", "episodes", "modes", "unseen"},
}  # fmt: skip


def newest_checkpoint(run_folder: Path) -> Checkpoint:
    """The newest intact checkpoint of a run. Damaged ones after it are listed in its notes.

    Raises:
        UserError: there is none.
    """
    try:
        return newest_intact(run_folder, resumable=True)
    except ValueError as error:
        raise UserError(f"--resume {run_folder}: {error}; start a new run instead") from error


def newest_intact(run_folder: Path, *, resumable: bool) -> Checkpoint:
    """As :func:`newest_checkpoint`; ``resumable`` as in :func:`~priorzero.runs.checkpoint.read_checkpoint`.

    Raises:
        ValueError: there is none; the message says why.
    """
    try:
        found = saved_checkpoints(run_folder)
    except OSError as error:
        raise ValueError(f"its checkpoints cannot be read ({error})") from error
    notes, reason = list[str](), ""
    for folder in reversed(found):
        try:
            checkpoint = read_checkpoint(folder, resumable=resumable)
        except ValueError as error:
            notes.append(f"{folder} cannot be used ({error}); the checkpoint before it is used")
            reason = reason or f" (the newest: {error})"
            continue
        checkpoint.damaged.extend(found[found.index(folder) + 1 :])
        checkpoint.notes.extend(notes)
        return checkpoint
    raise ValueError(f"none of its {len(found)} checkpoints can be used{reason}" if found else "it has no checkpoint")


def find_checkpoint(where: str, *, output_dir: str, exp_name: str, wanted: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint that ``--resume`` names.

    Args:
        where: a run's folder, the folder of its newest checkpoint, or ``auto``: the run under ``output_dir`` that saved
            last, among those with the name ``exp_name`` (if given) and the settings ``wanted``.
        output_dir: searched for ``auto``.
        exp_name: name of the run; "" for any.
        wanted: values of the group ``run``, such as ``env_id``.

    Returns:
        None if ``auto`` finds nothing.

    Raises:
        UserError: ``where`` has no intact checkpoint.
    """
    if where != "auto":
        return _named_checkpoint(where)
    if exp_name and not is_run_name(exp_name):
        return None
    root = user_path(output_dir, what="run.output_dir=")
    saved_at = {
        run_folder: saved_at
        for run_folder, saved, saved_at in _saved_runs([root / exp_name] if exp_name else root.glob("*"))
        if all(_saved_setting(saved, key) == value for key, value in wanted.items())
    }
    return newest_checkpoint(max(saved_at, key=saved_at.__getitem__)) if saved_at else None


def _saved_runs(folders: Iterable[Path]) -> Iterator[tuple[Path, list[Path], float]]:
    """The folders that have checkpoints, their checkpoints, and when the newest was written."""
    for folder in folders:
        try:
            saved = saved_checkpoints(folder)
            if saved:
                yield folder, saved, (saved[-1] / MANIFEST).stat().st_mtime
        except OSError as error:
            logger.warning(f"{folder} is left out, since it cannot be read ({error.strerror})")


def _named_checkpoint(where: str) -> Checkpoint:
    folder = given_folder(where, what="--resume ")
    if folder.name == CHECKPOINTS and folder.is_dir():
        folder = folder.parent
    if folder.parent.name == CHECKPOINTS and (folder / MANIFEST).is_file():
        run_folder = folder.parent.parent
        saved = saved_checkpoints(run_folder)
        if saved and saved[-1].resolve() != folder.resolve():
            raise UserError(
                f"--resume {where}: the run has a later checkpoint, {saved[-1].name}, which would be overwritten; type "
                f"--resume {shlex.quote(str(run_folder))}, or copy the run's folder without the later checkpoints"
            )
        folder = run_folder
    else:
        check_is_run(folder, what=f"--resume {where}", advice="name a run's folder, or auto")
    return newest_checkpoint(folder)


def check_is_run(folder: Path, *, what: str, advice: str) -> None:
    """Check that a folder exists and does not contain runs instead of checkpoints.

    Args:
        folder: where a run is expected.
        what: how the folder was given, as the beginning of a message.
        advice: what to give instead of a path that is no folder.

    Raises:
        UserError: it is not there, or contains runs.
    """
    if not (folder / CHECKPOINTS).exists() and (runs := list(_saved_runs(folder.glob("*")))):
        newest, *_ = max(runs, key=lambda run: run[2])
        raise UserError(
            f"{what}: this is not a run's folder, but it contains {len(runs)} of them; name one, such as "
            f"{shlex.quote(str(newest))}"
        )
    if not folder.is_dir():
        problem = "this is a file" if folder.exists() else "there is no such folder"
        raise UserError(f"{what}: {problem}; {advice}")


def _saved_setting(checkpoints: Sequence[Path], key: str) -> Any:
    """A setting of the group ``run``, from the newest readable checkpoint."""
    for checkpoint in reversed(checkpoints):
        try:
            return read_config_file(checkpoint / CONFIG)["run"][key]
        except (UserError, KeyError, TypeError):
            continue  # damaged
    return None


def check_trusted(
    checkpoint: Checkpoint,
    flags: Iterable[Mapping[str, Mapping[str, Any]]],
    *,
    flag: str = "--set llm.trust_remote_code=true",
) -> None:
    """Check that the user has agreed to run code that comes with the LLM of a checkpoint.

    A checkpoint, and its configuration with it, may come from anyone.

    Args:
        checkpoint: its settings are used.
        flags: settings that the user gave.
        flag: what the user types to trust the code.

    Raises:
        UserError: the configuration runs such code, and ``flags`` do not say whether to trust it.
    """
    llm = checkpoint.settings.llm
    if llm.trust_remote_code and not any("trust_remote_code" in layer.get("llm", {}) for layer in flags):
        raise UserError(
            f"{checkpoint.folder}: its configuration runs code that comes with a model ({llm.path}); if you trust "
            f"it, type {flag}"
        )


def check_games(checkpoint: Checkpoint, games: Sequence[GameSpec]) -> None:
    """Check that a run on these games can be resumed from a checkpoint. Changed package versions are noted.

    Raises:
        UserError: the game files differ.
    """
    saved_games, own_games = checkpoint.manifest.get("games", {}), {game.name: game.md5 for game in games}
    if saved_games != own_games:
        raise _not_resumed(checkpoint, [f"the game files are {own_games}, the checkpoint has {saved_games}"])
    note_changed_versions(checkpoint)


def check_same_settings(checkpoint: Checkpoint, settings: Settings) -> None:
    """Check that a run with these settings can be resumed from a checkpoint. No file of a game or model is read.

    Raises:
        UserError: it lists what differs.
    """
    if settings.run.max_env_step == 0:
        raise UserError("run.max_env_step=0 only evaluates, and --resume continues training; leave one of them out")
    _check_origin(checkpoint)
    different = [
        f"{name} is {now!r}, the checkpoint has {before!r}"
        for name, now, before in _differences(settings, checkpoint.settings)
    ]
    if different:
        raise _not_resumed(checkpoint, different)


def _not_resumed(checkpoint: Checkpoint, different: Sequence[str]) -> UserError:
    return UserError(
        f"{checkpoint.folder}: the run cannot be resumed with these settings:\n"
        + "\n".join(f"  - {difference}" for difference in different)
        + "\nleave these settings out, or start a new run without --resume"
    )


def note_changed_versions(checkpoint: Checkpoint) -> None:
    """Add a note to a checkpoint if versions of packages have changed since it was written."""
    saved_versions = checkpoint.manifest.get("versions", {})
    changed = [
        f"{name} {saved_versions.get(name)} to {version}"
        for name, version in package_versions().items()
        if version != saved_versions.get(name)
    ]
    if changed:
        checkpoint.notes.append(
            f"packages have changed since the checkpoint was written: {', '.join(changed)}; results may differ slightly"
        )


def keep_limits(settings: Settings, saved: Settings) -> None:
    """Replace ``auto`` by what the run has resolved it to, also if the rule for ``auto`` has changed since."""
    for name in ("max_episode_steps", "action_space_size"):
        if getattr(settings.env, name) == AUTO:
            setattr(settings.env, name, getattr(saved.env, name))


def _differences(settings: Settings, saved: Settings) -> list[tuple[str, Any, Any]]:
    """The settings that may not differ but do: name, present value, value in the checkpoint."""
    now, before = settings.model_dump(), saved.model_dump()
    return [
        (f"{group}.{key}", now[group][key], value)
        for group, values in before.items()
        for key, value in values.items()
        if now[group][key] != value and key not in MAY_DIFFER.get(group, ())
    ]


def _check_origin(checkpoint: Checkpoint) -> None:
    """Raise UserError if ``config.yaml`` in the run's folder says that the checkpoint is from another run."""
    file = checkpoint.run_folder / CONFIG
    if not file.exists():
        return
    try:
        settings = resolve_settings(read_config_file(file))
    except UserError as error:  # the run does not need this file
        checkpoint.notes.append(f"{file} cannot be used and is replaced ({error})")
        return
    different = [f"{name}: {now!r} and {before!r}" for name, now, before in _differences(settings, checkpoint.settings)]
    if different:
        raise UserError(
            f"{checkpoint.folder}: its settings are not those of {file} ({'; '.join(different[:5])}). If the "
            f"checkpoint is from another run, move it back. If {CONFIG} was edited, that has no effect: remove the file"
        )


def prepare_resume(checkpoint: Checkpoint, settings: Settings, *, games: Sequence[GameSpec]) -> TextIO:
    """Lock a run that is resumed, and clean up its checkpoints. ``output_dir`` and ``exp_name`` are set to its folder.

    Returns:
        The lock.

    Raises:
        UserError: the game files differ, or another process uses the run.
    """
    check_games(checkpoint, games)
    folder = checkpoint.run_folder
    lock = lock_folder(folder)
    try:
        newest = [checkpoint.folder, *checkpoint.damaged]
        if saved_checkpoints(folder)[-len(newest) :] != newest:
            raise UserError(f"{folder}: another process has resumed this run meanwhile; type the command again")
        rename_damaged(checkpoint)
    except UserError:
        lock.close()
        raise
    remove_leftovers(folder)
    settings.run.output_dir, settings.run.exp_name = str(folder.parent), folder.name
    return lock


def rename_damaged(checkpoint: Checkpoint) -> None:
    """Rename damaged checkpoints, since the run will need their names. The run must be locked.

    Raises:
        UserError: one cannot be renamed.
    """
    for damaged in checkpoint.damaged:
        names = (damaged.with_name(f"damaged_{n}_{damaged.name}") for n in range(1, 1000))
        try:
            damaged.rename(next(name for name in names if not name.exists()))
        except OSError as error:
            raise UserError(f"{damaged} is damaged and cannot be renamed ({error}); remove it") from error
