"""The progress line and the log files of a run."""

from __future__ import annotations

import functools
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from loguru import logger


def open_logs(folder: Path, *, terminal: TextIO | None = None) -> None:
    """Send the log to ``folder/run.log``, and messages of level INFO and above to the terminal.

    Messages that are bound to ``topic="prior"`` or ``topic="segments"`` also go to a file of their own, but not to the
    terminal.
    """
    terminal = terminal or sys.stderr
    logger.remove()
    logger.add(
        terminal,
        level="INFO",
        format="{time:HH:mm:ss} {level: <7} {message}",
        filter=lambda r: "topic" not in r["extra"],
    )
    logger.add(
        folder / "run.log",
        level="DEBUG",
        rotation="50 MB",
        format="{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <7} {message}",
    )
    for topic, name in (("prior", "llm_prior.log"), ("segments", "segments.log")):
        logger.add(
            folder / name,
            level="DEBUG",
            rotation="50 MB",
            format="{time:YYYY-MM-DD HH:mm:ss.SSS} {message}",
            filter=functools.partial(_has_topic, topic),
        )


def _has_topic(topic: str, record: Any) -> bool:
    return record["extra"].get("topic") == topic


class Progress:
    """A line that says how far a run is: rewritten in place on a terminal, a log line otherwise.

    Args:
        max_iter: iterations of the whole run.
        max_env_step: environment steps of the whole run; it ends at whichever comes first.
        every: iterations between lines.
        spent_s: seconds that the run took before it was resumed.
        terminal: where the line is written; stderr by default.
    """

    def __init__(
        self, *, max_iter: int, max_env_step: int, every: int, spent_s: float = 0.0, terminal: TextIO | None = None
    ) -> None:
        self._terminal = terminal or sys.stderr
        self._in_place = self._terminal.isatty()
        self._max_iter = max_iter
        self._max_env_step = max_env_step
        self._every = every
        self._started = time.monotonic() - spent_s

    def show(self, *, iteration: int, env_step: int, episode_return: float | None, loss: float | None) -> None:
        """Show the line if it is due.

        Args:
            iteration: iterations so far.
            env_step: environment steps so far.
            episode_return: mean return of the latest episodes; None before the first ends.
            loss: the latest total loss; None before the first update.
        """
        if iteration % self._every and iteration != self._max_iter:
            return
        elapsed = time.monotonic() - self._started
        share = max(iteration / self._max_iter, env_step / self._max_env_step)
        left = elapsed / share - elapsed if share > 0 else math.inf
        line = (
            f"iteration {iteration}/{self._max_iter}  env steps {env_step}  "
            f"return {'-' if episode_return is None else f'{episode_return:.2f}'}  "
            f"loss {'-' if loss is None else f'{loss:.3f}'}  "
            f"{env_step / elapsed:.2f} steps/s  left {_duration(left)}"
        )
        if self._in_place:
            self._terminal.write(f"\r\x1b[2K{line}")
            self._terminal.flush()
        else:
            logger.info(line)

    def end(self) -> None:
        """End the line on a terminal."""
        if self._in_place:
            self._terminal.write("\n")


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
