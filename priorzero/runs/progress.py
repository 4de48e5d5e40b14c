"""What the terminal shows during a run, and the log files of a run."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from loguru import logger

from priorzero.runtime.activity import Activities, activities

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

REFRESH_S = 0.5  # seconds between refreshes of the live line
MAX_MARKS = 20  # speed and time left are measured over this many iterations
MAX_LOG_BYTES = 50_000_000
FILE_FORMAT = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <7} {message}"


# ---- the terminal ----


class Display:
    """Writes log messages to the terminal, and shows what the process is doing.

    On a terminal, a live line below the messages has the current activities and ``status``. If the output is not a
    terminal, or if the terminal cannot rewrite a line (``TERM=dumb``), activities that take long are logged instead,
    and the output has no escape codes.

    Attributes:
        status: returns how far the run is, for the live line.
    """

    def __init__(self, terminal: TextIO, *, watched: Activities = activities) -> None:
        self.status: Callable[[], str] = str
        self._terminal = terminal
        self._activities = watched
        self._live = self._make_live() if terminal.isatty() and os.environ.get("TERM", "dumb") != "dumb" else None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="display", daemon=True)

    def _make_live(self) -> Live:
        from rich.console import Console
        from rich.live import Live

        return Live(
            console=Console(file=self._terminal, force_terminal=True),
            get_renderable=self._line,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )

    def start(self) -> None:
        """Show everything from now on."""
        logger.remove()
        logger.add(self._write, level="INFO", format="{time:HH:mm:ss} {level: <7} {message}", filter=self._is_shown)
        if self._live is not None:
            self._live.start()
            self._live.console.show_cursor(True)  # rich hides it, and it would remain hidden if the process was killed
        self._thread.start()

    def stop(self) -> None:
        """Remove the live line, and close the log files."""
        self._stopped.set()
        self._thread.join()
        if self._live is not None:
            with self._closed_terminal_is_logged():
                self._live.stop()
        logger.remove()
        logger.add(_write_to_stderr, level="INFO")

    def _write(self, message: str) -> None:
        if self._live is not None:
            self._live.console.out(message, end="", highlight=False)
        else:
            self._terminal.write(message)
            self._terminal.flush()

    def _is_shown(self, record: Any) -> bool:
        """Messages with the topic "progress" repeat what the live line shows."""
        topic = record["extra"].get("topic")
        return topic is None or (topic == "progress" and self._live is None)

    def _watch(self) -> None:
        with self._closed_terminal_is_logged():
            while not self._stopped.wait(REFRESH_S):
                report = self._activities.report()
                if report is not None:
                    logger.bind(topic="progress").info(report)
                if self._live is not None:
                    self._live.refresh()

    @contextlib.contextmanager
    def _closed_terminal_is_logged(self) -> Iterator[None]:
        """A run continues when its terminal is closed, if it ignores SIGHUP."""
        try:
            yield
        except OSError as error:
            logger.warning(f"the terminal cannot be written ({error}); see log/run.log")

    def _line(self) -> Text:
        from rich.text import Text

        names = self._activities.current()
        doing = ", ".join(f"{name} ({seconds:.0f} s)" if seconds >= 1 else name for name, seconds in names.items())
        line = Text(overflow="fold")  # a narrow terminal shows it in two lines
        line.append(doing, style="bold").append("  " if doing else "").append(self.status())
        return line


def _write_to_stderr(message: str) -> None:
    """Write to what stderr is at this time."""
    if sys.stderr is not None:
        sys.stderr.write(message)


_display: Display | None = None


@contextlib.contextmanager
def terminal_output(terminal: TextIO | None = None) -> Iterator[None]:
    """Within the block, a :class:`Display` writes to ``terminal`` (default: stderr). An inner block has no effect."""
    global _display
    if _display is not None:
        yield
        return
    activities.reset()
    if terminal is None:  # a process may have no stderr
        terminal = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    _display = display = Display(terminal)
    display.start()
    try:
        yield
    finally:
        _display = None
        display.stop()


# ---- the log files ----


class LogFile:
    """A log file, for loguru. When it is full, it is renamed ``NAME.1.log``, ``NAME.2.log``, ..., and a new one begins.

    A file that cannot be written does not end the run. The first time, stderr says so. Each later message is tried
    again, and a line in the file says how many are missing.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_LOG_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._file: TextIO | None = None
        self._num_missing = 0
        self._was_reported = False
        self.write("")

    def write(self, message: str) -> None:
        """Write a message, which ends with a newline."""
        try:
            self._write(
                f"({self._num_missing} messages could not be written)\n{message}" if self._num_missing else message
            )
            self._num_missing = 0
        except OSError as error:
            self.stop()  # after some errors, a file must be opened again
            self._num_missing += 1
            if not self._was_reported:
                self._was_reported = True
                print(f"warning: {self._path} cannot be written ({error}); the run continues", file=sys.stderr)

    def _write(self, text: str) -> None:
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        elif self._file.tell() > self._max_bytes:
            self._file.close()
            names = (self._path.with_name(f"{self._path.stem}.{n}.log") for n in itertools.count(1))
            self._path.rename(next(name for name in names if not name.exists()))
            self._file = self._path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        self._file.write(text)

    def stop(self) -> None:
        """Close the file. The next message opens it again."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is still to be written was counted as missing
                self._file.close()
            self._file = None


def open_logs(folder: Path) -> None:
    """Also send the log to ``folder/run.log``, from level DEBUG on, until the block of :func:`terminal_output` ends.

    Messages that are bound to ``topic="prior"`` or ``topic="segments"`` also go to a file of their own.
    """
    logger.add(LogFile(folder / "run.log"), level="DEBUG", format=FILE_FORMAT)
    for topic, name in (("prior", "llm_prior.log"), ("segments", "segments.log")):
        logger.add(
            LogFile(folder / name),
            level="DEBUG",
            format="{time:YYYY-MM-DD HH:mm:ss.SSS} {message}",
            filter=functools.partial(_has_topic, topic),
        )


def _has_topic(topic: str, record: Any) -> bool:
    return record["extra"].get("topic") == topic


# ---- how far a run is ----


class Progress:
    """How far a run is: the status of the live line on a terminal, a log line every few iterations otherwise.

    Args:
        max_iter: iterations of the whole run.
        max_env_step: environment steps of the whole run; it ends at whichever comes first.
        every: iterations between log lines.
        env_steps: returns the environment steps so far, also during an iteration; None to show those of the last
            iteration.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        *,
        max_iter: int,
        max_env_step: int,
        every: int,
        env_steps: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_iter = max_iter
        self._max_env_step = max_env_step
        self._every = every
        self._env_steps = env_steps
        self._clock = clock
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=MAX_MARKS)  # time, iteration, environment steps
        self._learned = ""  # return and losses

    def start(self, *, iteration: int, env_step: int) -> None:
        """The iterations begin. Speed and time left are measured from here on. Later calls have no effect."""
        if self._marks:
            return
        self._marks.append((self._clock(), iteration, env_step))
        if _display is not None:
            _display.status = self.status

    def show(
        self,
        *,
        iteration: int,
        env_step: int,
        episode_return: float | None,
        world_model_loss: float | None,
        llm_loss: float | None,
    ) -> None:
        """An iteration has ended; log a line if it is due.

        Args:
            iteration: iterations so far.
            env_step: environment steps so far.
            episode_return: mean return of the latest episodes; None before the first ends.
            world_model_loss: the latest loss of the world model; None before its first update.
            llm_loss: the latest loss of the LLM; None before its first update, or without an LLM.
        """
        self._marks.append((self._clock(), iteration, env_step))
        losses = {"world model": world_model_loss, "LLM": llm_loss}
        known = [f"{name} {loss:.3g}" for name, loss in losses.items() if loss is not None]
        self._learned = f"return {'-' if episode_return is None else f'{episode_return:.2f}'}"
        if known:
            self._learned += f"  loss: {', '.join(known)}"
        if iteration % self._every == 0 or iteration == self._max_iter:
            logger.bind(topic="progress").info(self.status())

    def status(self) -> str:
        """One line: iterations, environment steps, time left, return, losses, environment steps per second."""
        _, iteration, env_step = self._marks[-1]
        ends_by_steps = env_step / self._max_env_step > iteration / self._max_iter
        now = env_step if self._env_steps is None else self._env_steps()
        is_finished = self._share(iteration, env_step) >= 1
        speed = self._speed()
        parts = (
            f"iteration {iteration}/{self._max_iter}",
            f"env steps {now}" + (f"/{self._max_env_step}" if ends_by_steps else ""),
            "" if is_finished else f"left {_duration(self._seconds_left())}",
            self._learned,
            "" if speed is None else f"{speed:.2f} env steps/s",
        )
        return "  ".join(part for part in parts if part)

    def end(self) -> None:
        """The iterations have ended; the live line does not show them any longer."""
        if _display is not None:
            _display.status = str

    def _speed(self) -> float | None:
        """Environment steps per second; None before the first iteration ends."""
        (first_time, _, first), (last_time, _, last) = self._marks[0], self._marks[-1]
        return (last - first) / (last_time - first_time) if last_time > first_time else None

    def _seconds_left(self) -> float:
        """Estimated from the latest iterations of this process; infinite before the first ends."""
        (first_time, *first), (last_time, *last) = self._marks[0], self._marks[-1]
        done = self._share(*last) - self._share(*first)
        if done <= 0:
            return math.inf
        at_last = (1 - self._share(*last)) * (last_time - first_time) / done
        return max(0.0, at_last - (self._clock() - last_time))

    def _share(self, iteration: int, env_step: int) -> float:
        """The fraction of the run that is done."""
        return max(iteration / self._max_iter, env_step / self._max_env_step)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
