"""What a run tells: TensorBoard scalars, log files, a progress line on the terminal, a summary at the end."""

from __future__ import annotations

import functools
import math
import resource
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from loguru import logger


class MetricsWriter:
    """Writes scalars for TensorBoard and keeps the last value of each.

    A value that is not finite is not written; it is counted and logged, so that a chart never hides it.

    Args:
        folder: where the event file goes.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        # Not SummaryWriter: its thread writes later (nobody knows how much), and does not outlive a full disk.
        number = len(self._files(folder))
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{number}" if number else "")
        self._folder = folder
        self.last: dict[str, float] = {}
        self.num_not_finite = 0

    def write(self, scalars: Mapping[str, float], *, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in scalars.items():
            if not math.isfinite(value):
                self.num_not_finite += 1
                logger.error(f"{name} is {value} at step {step}")
                continue
            self.last[name] = float(value)
            summary = scalar(name, float(value))
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def sizes(self) -> dict[str, int]:
        """Bytes of each event file of the run."""
        return {path.name: path.stat().st_size for path in self._files(self._folder)}

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        return sorted(folder.glob("events.out.tfevents.*"))

    def close(self) -> None:
        self._writer.close()


def open_logs(folder: Path, *, terminal: TextIO | None = None) -> None:
    """Send the log to ``folder/run.log`` and, shorter, to the terminal.

    Messages bound to ``topic="prior"`` or ``topic="segments"`` go to files of their own as well.
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


def peak_memory_mb() -> float:
    """The most main memory that this process has held so far, in MB (10^6 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in KiB


class Progress:
    """One line that says how far a run is: rewritten in place on a terminal, a log line otherwise.

    Args:
        max_iter: iterations in all.
        max_env_step: environment steps in all; the run ends at whichever comes first.
        every: iterations between lines.
        spent_s: seconds that the run has taken before.
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
        """
        Args:
            iteration: iterations done.
            env_step: environment steps done.
            episode_return: mean return of the latest episodes, None before the first ends.
            loss: the latest total loss, None before the first update.
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
        if self._in_place:
            self._terminal.write("\n")


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def table(rows: Mapping[str, Any]) -> str:
    """Two aligned columns."""
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


def fingerprint(parameters: Mapping[str, Any]) -> dict[str, int]:
    """A checksum (CRC-32) of each tensor's bytes.

    Args:
        parameters: name to tensor.
    """
    return {
        name: zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        for name, tensor in parameters.items()
    }


def count_moved(before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """How many tensors differ between two fingerprints."""
    return sum(before[name] != after[name] for name in before)
