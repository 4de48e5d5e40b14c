"""When which part of an iteration ran: what overlapped, and for how long nothing ran at all."""

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
    """A part that ran from ``start`` to ``end``, seconds of :func:`time.perf_counter`."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Shares:
    """How a stretch of time was used.

    Attributes:
        wall: its length in seconds.
        busy: seconds in which each part ran; a part that ran twice at the same time counts once.
        overlapped: seconds in which two or more different parts ran.
        idle: seconds in which none did.
    """

    wall: float
    busy: dict[str, float]
    overlapped: float
    idle: float

    def __add__(self, other: Shares) -> Shares:
        busy = {name: self.busy.get(name, 0.0) + other.busy.get(name, 0.0) for name in {**self.busy, **other.busy}}
        return Shares(self.wall + other.wall, busy, self.overlapped + other.overlapped, self.idle + other.idle)

    def scalars(self) -> dict[str, float]:
        """Metrics under ``time/``: seconds of each part; overlap and idleness as shares of the wall time."""
        wall = self.wall or 1.0
        return {
            "time/iteration_s": self.wall,
            **{f"time/{name.replace(' ', '_').replace('-', '_')}_s": seconds for name, seconds in self.busy.items()},
            "time/overlap_share": self.overlapped / wall,
            "time/idle_share": self.idle / wall,
        }

    def describe(self) -> str:
        """One line, parts by size."""
        wall = self.wall or 1.0
        parts = sorted(self.busy.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} {seconds / wall:.0%}" for name, seconds in parts)
        together, nothing = self.overlapped / wall, self.idle / wall
        return f"{listed or 'nothing'}; two or more at once {together:.0%}, nothing {nothing:.1%}"


def shares(spans: Iterable[Span], *, start: float, end: float) -> Shares:
    """Add up ``spans``, clipped to the stretch from ``start`` to ``end``."""
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
    return Shares(wall=end - start, busy=busy, overlapped=overlapped, idle=idle + end - last)


class Timeline:
    """Takes note of what runs, from any thread.

    Args:
        keep: iterations whose spans are kept for :meth:`write_trace`.
    """

    def __init__(self, *, keep: int = 0) -> None:
        self._kept: deque[list[Span]] = deque(maxlen=keep)
        self._open: dict[object, tuple[str, float]] = {}
        self._closed: list[Span] = []
        self._start = time.perf_counter()
        self.total = Shares(0.0, {}, 0.0, 0.0)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Around a part that runs."""
        key = object()
        self._open[key] = (name, time.perf_counter())
        try:
            yield
        finally:
            _, start = self._open.pop(key)
            self._closed.append(Span(name, start, time.perf_counter()))

    def take(self) -> Shares:
        """The shares since the last call (or :meth:`skip`); what still runs counts until now."""
        now = time.perf_counter()
        closed, self._closed = self._closed, []
        spans = closed + [Span(name, start, now) for name, start in list(self._open.values())]
        taken = shares(spans, start=self._start, end=now)
        self._kept.append(closed)
        self._start = now
        self.total += taken
        return taken

    def skip(self) -> None:
        """Leave out what happened since the last call of :meth:`take`."""
        self._closed = []
        self._start = time.perf_counter()

    @property
    def has_trace(self) -> bool:
        """Whether an iteration was kept."""
        return bool(self._kept)

    def write_trace(self, path: Path) -> None:
        """Write the spans of the iterations that were kept as a trace for Perfetto or chrome://tracing."""
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
