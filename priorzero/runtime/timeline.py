"""Measures how the wall time of an iteration is used: which parts ran, how much they overlapped, and idle time."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Span:
    """A part that ran from ``start`` to ``end``, in seconds of :func:`time.perf_counter`."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class TimeUsage:
    """How an interval of wall time was used, in seconds.

    Attributes:
        wall: length of the interval.
        busy: time in which each part ran; a part that ran twice at the same time counts once.
        overlapped: time in which two or more different parts ran.
        idle: time in which no part ran.
    """

    wall: float
    busy: dict[str, float]
    overlapped: float
    idle: float

    def __add__(self, other: TimeUsage) -> TimeUsage:
        busy = {name: self.busy.get(name, 0.0) + other.busy.get(name, 0.0) for name in {**self.busy, **other.busy}}
        return TimeUsage(self.wall + other.wall, busy, self.overlapped + other.overlapped, self.idle + other.idle)

    def scalars(self) -> dict[str, float]:
        """Metrics under ``time/``: seconds of each part; overlap and idle time as fractions of the wall time."""
        wall = self.wall or 1.0
        return {
            "time/iteration_s": self.wall,
            **{f"time/{name.replace(' ', '_').replace('-', '_')}_s": seconds for name, seconds in self.busy.items()},
            "time/overlap_share": self.overlapped / wall,
            "time/idle_share": self.idle / wall,
        }

    def describe(self) -> str:
        """One line of text; the parts are sorted by time, longest first."""
        wall = self.wall or 1.0
        parts = sorted(self.busy.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} {seconds / wall:.0%}" for name, seconds in parts)
        return f"{listed or 'nothing ran'}; overlap {self.overlapped / wall:.0%}, idle {self.idle / wall:.1%}"


def time_usage(spans: Iterable[Span], *, start: float, end: float) -> TimeUsage:
    """Sum up ``spans``, clipped to the interval from ``start`` to ``end``."""
    edges: list[tuple[float, int, str]] = []
    for span in spans:
        low, high = max(span.start, start), min(span.end, end)
        if low < high:
            edges += [(low, 1, span.name), (high, -1, span.name)]
    running: dict[str, int] = {}
    busy: dict[str, float] = {}
    overlapped, idle, last = 0.0, 0.0, start
    for at, change, name in sorted(edges):
        active = [n for n, count in running.items() if count]
        for n in active:
            busy[n] = busy.get(n, 0.0) + at - last
        overlapped += (at - last) * (len(active) > 1)
        idle += (at - last) * (not active)
        running[name] = running.get(name, 0) + change
        last = at
    return TimeUsage(wall=end - start, busy=busy, overlapped=overlapped, idle=idle + end - last)


class Timeline:
    """Records when the parts of an iteration run. Spans can be recorded from any thread.

    Args:
        keep: number of most recent intervals whose spans are kept for :meth:`write_trace`.

    Attributes:
        total: the sum over all finished intervals.
    """

    def __init__(self, *, keep: int = 0) -> None:
        self._kept: deque[list[Span]] = deque(maxlen=keep)
        self._open: dict[object, tuple[str, float]] = {}
        self._closed: list[Span] = []
        self._start = time.perf_counter()
        self.total = TimeUsage(0.0, {}, 0.0, 0.0)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the duration of the block as a span of the part ``name``."""
        key = object()
        self._open[key] = (name, time.perf_counter())
        try:
            yield
        finally:
            _, start = self._open.pop(key)
            self._closed.append(Span(name, start, time.perf_counter()))

    def finish_interval(self) -> TimeUsage:
        """End the current interval, in which open spans count up to now, and start the next one."""
        now = time.perf_counter()
        closed, self._closed = self._closed, []
        spans = closed + [Span(name, start, now) for name, start in list(self._open.values())]
        usage = time_usage(spans, start=self._start, end=now)
        self._kept.append(closed)
        self._start = now
        self.total += usage
        return usage

    def discard_interval(self) -> None:
        """Start the next interval and drop what was recorded in the current one."""
        self._closed = []
        self._start = time.perf_counter()

    def write_trace(self, path: Path) -> None:
        """Write the spans of the kept intervals, if there are any, as a trace for Perfetto or chrome://tracing."""
        if not self._kept:
            return
        spans = [span for closed in self._kept for span in closed]
        rows = {name: row for row, name in enumerate(dict.fromkeys(span.name for span in spans), start=1)}
        origin = min((span.start for span in spans), default=0.0)
        names = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": name}}
            for name, row in rows.items()
        ]
        events = [
            {
                "name": span.name,
                "ph": "X",
                "pid": 1,
                "tid": rows[span.name],
                "ts": round((span.start - origin) * 1e6),
                "dur": round((span.end - span.start) * 1e6),
            }
            for span in spans
        ]
        path.write_text(json.dumps({"traceEvents": names + events}), encoding="utf-8")
