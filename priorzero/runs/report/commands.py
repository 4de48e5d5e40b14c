"""The commands that repeat, continue and inspect a run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from priorzero.config import PRESETS, parse_assignments, resolve_settings
from priorzero.runs.files import CONFIG
from priorzero.runs.report.data import RunData
from priorzero.settings import Settings
from priorzero.types import UserError

MAX_ASSIGNMENTS = 8  # a command with more --set flags is not shown
# Settings with a flag of their own.
FLAGS = {"run.env_id": "--env_id", "run.seed": "--seed", "run.max_iter": "--max_iter", "prior.engine": "--engine"}


@dataclass(frozen=True)
class Command:
    """A command line and its purpose."""

    purpose: str
    text: str


def commands(run: RunData) -> list[Command]:
    """The commands of a run, in the order in which they are shown."""
    entry = f"python -m priorzero.{'ray_entry' if run.on_cluster else 'entry'}"
    where = shlex.quote(str(run.folder))
    again = f"{entry} --config {shlex.quote(str(run.folder / CONFIG))}"
    found = [Command("Repeat the run with the same settings", again)]
    arguments = plain_arguments(run.settings)
    if arguments is not None:
        found.append(Command("The same without the file", shlex.join([*entry.split(), *arguments])))
    if run.can_resume:
        more = _more(run) if run.is_finished else ""
        purpose = "Train longer" if more else "Continue the run"
        found.append(Command(purpose, f"{entry} --resume {where}{more}"))
    if "tensorboard" in run.settings.run.loggers:
        found.append(Command("Show all metrics", f"tensorboard --logdir {where}"))
    found.append(Command("Write this report again", f"python -m priorzero.report {where}"))
    return found


def _more(run: RunData) -> str:
    """Flags that double the limits which a finished run has reached."""
    settings, flags = run.settings.run, ""
    if run.iteration >= settings.max_iter:
        flags += f" --max_iter {2 * settings.max_iter}"
    if run.env_step >= settings.max_env_step:
        flags += f" --set run.max_env_step={2 * settings.max_env_step}"
    return flags


def plain_arguments(settings: Settings) -> list[str] | None:
    """Arguments of ``priorzero.entry`` that give these settings; None if they are too many.

    The preset is the one that leaves the fewest settings to be changed.
    """
    candidates = [(preset, _changes(settings, preset)) for preset in PRESETS]
    preset, changes = min(candidates, key=lambda candidate: len(candidate[1]))
    flags = {"quick_test": ["--quick_test"], "standard": []}.get(preset, ["--preset", preset])
    assignments = {name: f"{name}={_typed(value)}" for name, value in changes.items()}
    try:
        again = resolve_settings(PRESETS[preset], parse_assignments(assignments.values()))
    except UserError:
        return None
    if _without_name(again) != _without_name(settings):  # a value that cannot be typed
        return None
    for name, flag in FLAGS.items():
        if assignments.pop(name, None) is not None:
            flags += [flag, str(changes[name])]
    if len(assignments) > MAX_ASSIGNMENTS:
        return None
    for assignment in assignments.values():
        flags += ["--set", assignment]
    return flags


def _changes(settings: Settings, preset: str) -> dict[str, Any]:
    """The settings that differ from a preset: ``group.key`` to value."""
    base = _without_name(resolve_settings(PRESETS[preset]))
    return {
        f"{group}.{key}": value
        for group, values in _without_name(settings).items()
        for key, value in values.items()
        if value != base[group][key]
    }


def _without_name(settings: Settings) -> dict[str, dict[str, Any]]:
    plain = settings.model_dump()
    del plain["run"]["exp_name"]  # names one run
    return plain


def _typed(value: Any) -> str:
    """A value as it is typed after ``--set group.key=``."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
