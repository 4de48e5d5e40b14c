"""Weights & Biases (W&B): metrics, settings, and the transcripts of evaluations as a table.

W&B's environment variables decide where a run goes: ``WANDB_MODE``, ``WANDB_PROJECT``, ``WANDB_ENTITY``,
``WANDB_API_KEY``, ``WANDB_BASE_URL``. Its library sends data from a process of its own, so training does not wait.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from priorzero.play.transcript import EvaluationTranscript
from priorzero.runs.files import WANDB
from priorzero.runs.loggers.base import Axis
from priorzero.runs.loggers.transcript_text import COLUMNS, episode_rows
from priorzero.runtime.activity import announced
from priorzero.runtime.network import no_reply, reason
from priorzero.runtime.packages import INSTALL
from priorzero.runtime.paths import replace_text
from priorzero.runtime.quiet import quiet
from priorzero.settings import Settings
from priorzero.types import UserError

if TYPE_CHECKING:
    import wandb

PROJECT = "priorzero"
INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 60.0  # to send the rest at the end of a run
TRANSCRIPTS = "evaluator_text/transcripts"
LEAVE_OUT = "leave wandb out: --set run.loggers=tensorboard"
WITHOUT = f"type WANDB_MODE=offline before the command, or {LEAVE_OUT}"


def check_wandb() -> None:
    """Check that W&B is installed, and unless it is offline, that it is logged in and its server replies.

    Raises:
        UserError: it says what to type.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"run.loggers=wandb: wandb is not installed; type {INSTALL['wandb']}, or {LEAVE_OUT}")
    with _errors_of_wandb("W&B cannot be started"), quiet():
        import wandb

        settings = wandb.setup().settings
    if settings.mode not in ("online", "run", "shared"):
        return
    problem = no_reply(settings.base_url)
    if problem is not None:
        raise UserError(f"run.loggers=wandb: {settings.base_url} cannot be reached ({problem}); {WITHOUT}")
    advice = "type wandb login --relogin, or correct WANDB_API_KEY"
    with _errors_of_wandb("W&B refuses the API key", advice=advice), quiet():
        # A separate call without `verify` would make this one skip the verification.
        has_key = wandb.login(prompt=False, verify=True)
    if not has_key:
        raise UserError(
            f"run.loggers=wandb: W&B is not logged in at {settings.base_url}; type wandb login, or set WANDB_API_KEY, "
            f"or {WITHOUT}"
        )


class WandbLogger:
    """Logs to a W&B run. A resumed run continues the same W&B run; its identifier is in ``wandb.json``.

    After an error of W&B, nothing more is logged there; the run and its other loggers go on.

    Args:
        folder: the run's. W&B writes into ``wandb/`` in it.
        settings: the configuration of the W&B run.

    Raises:
        UserError: W&B cannot be started.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        import wandb

        self._file = folder / WANDB
        saved = _read(self._file)
        self._id: str = saved.get("id") or secrets.token_hex(4)
        self._project: str = saved.get("project") or os.environ.get("WANDB_PROJECT") or PROJECT
        # The last step on each axis. A resumed run repeats steps after its checkpoint, which W&B has already.
        self._logged: dict[str, int] = dict(saved.get("steps", {}))
        self._skipped_until = dict(self._logged)
        self._defined: set[str] = set()
        with announced("connecting to Weights & Biases"), _errors_of_wandb("W&B cannot start the run"):
            self._run: wandb.Run | None = wandb.init(
                project=self._project,
                id=self._id,
                name=folder.name,
                resume="allow",
                reinit="create_new",
                dir=str(folder),
                config=settings.model_dump(),
                allow_val_change=True,  # settings may change when a run is resumed
                settings=wandb.Settings(
                    silent=True, console="off", init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S
                ),
            )
        self._offline = bool(self._run.offline)
        self._folder = Path(self._run.dir).parent
        logger.info(f"W&B: {self._folder if self._offline else self._run.url}")

    def write(self, scalars: Mapping[str, float], *, step: int, axis: Axis) -> None:
        """Log values of one step, with the axis as a metric of its own."""
        self._log(dict(scalars), step=step, axis=axis)

    def write_evaluation(
        self, scalars: Mapping[str, float], *, transcripts: Sequence[EvaluationTranscript], env_step: int
    ) -> None:
        """Log values, and a table with a row for each step of the transcripts."""
        values: dict[str, Any] = dict(scalars)
        if transcripts:
            import wandb

            rows = [row for episode in transcripts for row in episode_rows(episode)]
            # Of one type: a column of whole numbers and None would be refused when a fraction follows.
            values[TRANSCRIPTS] = wandb.Table(columns=list(COLUMNS), data=rows, allow_mixed_types=True)
        self._log(values, step=env_step, axis="env_step")

    def close(self, *, failed: bool) -> None:
        """Send what is not sent yet, for at most :data:`FINISH_TIMEOUT_S` seconds, and end the W&B run."""
        if self._run is None:
            return
        self._guarded(lambda run: run.finish(exit_code=int(failed)))
        if self._offline and self._run is not None:
            logger.info(f"W&B was offline; to upload the run, type wandb sync {shlex.quote(str(self._folder))}")
        self._run = None

    def _log(self, values: Mapping[str, Any], *, step: int, axis: Axis) -> None:
        if not values or step <= self._skipped_until.get(axis, -1):
            return

        def log(run: wandb.Run) -> None:
            if axis not in self._defined:
                run.define_metric(axis, hidden=True)
            for name in values.keys() - self._defined:
                run.define_metric(name, step_metric=axis)
            self._defined |= {axis, *values}
            run.log({**values, axis: step})

        self._guarded(log)
        if self._run is not None:
            self._logged[axis] = step
            state = {"id": self._id, "project": self._project, "steps": self._logged}
            replace_text(self._file, json.dumps(state) + "\n")

    def _guarded(self, action: Callable[[wandb.Run], None]) -> None:
        """Run an action; its first error ends the logging to W&B."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # also OSError: W&B's process has ended. It must not end the run
            self._run = None
            logger.error(
                f"W&B has failed ({reason(error)}), and nothing more is logged there; the run goes on. To upload what "
                f"was logged, type wandb sync {shlex.quote(str(self._folder))}"
            )
            _end_process()


def _end_process() -> None:
    """End W&B's process, which has failed. Otherwise W&B would do it when Python exits, with a stack trace."""
    import wandb

    try:
        wandb.teardown(exit_code=1)
    except Exception as error:  # the failure was logged as an error before
        logger.debug(f"W&B's process has ended ({reason(error)})")


@contextlib.contextmanager
def _errors_of_wandb(what: str, *, advice: str = "") -> Iterator[None]:
    """Raise UserError in place of W&B's errors, which have several base classes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"run.loggers=wandb: {what} ({reason(error)}); {f'{advice}, or ' if advice else ''}{WITHOUT}"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    """The contents of ``wandb.json``; empty for a new W&B run."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}), so the W&B run is not known; remove the file to begin a new W&B run"
        ) from error
    return content
