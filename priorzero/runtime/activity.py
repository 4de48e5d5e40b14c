"""What the process is doing at the moment. :mod:`priorzero.runs.progress` shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

FIRST_REPORTS_S = (10.0, 30.0, 60.0)  # when an activity is reported that has not ended; later, once a minute


@dataclass
class Activity:
    """Something that the process is doing since ``start``, in seconds of the clock, and the time of its last report."""

    name: str
    start: float
    reported_s: float = 0.0


class Activities:
    """The activities of a process. They can begin and end in any thread.

    Args:
        clock: returns the time in seconds.

    Attributes:
        seconds: total duration of the activities that have ended, by name.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[object, Activity] = {}  # in the order in which they began
        self._longest: dict[str, float] = {}  # duration in seconds, by name
        self.seconds: dict[str, float] = {}
        self._reset_at = clock()

    @contextmanager
    def announced(self, name: str) -> Iterator[None]:
        """Within the block, the process is doing ``name``, for example ``"loading the LLM"``."""
        key, start = object(), self._clock()
        self._open[key] = Activity(name, start)
        try:
            yield
        finally:
            del self._open[key]
            duration = self._clock() - start
            self._longest[name] = max(duration, self._longest.get(name, 0.0))
            self.seconds[name] = self.seconds.get(name, 0.0) + duration

    def reset(self) -> None:
        """Forget the durations of the activities that have ended; :attr:`elapsed_s` counts from here on."""
        self._longest.clear()
        self.seconds.clear()
        self._reset_at = self._clock()

    @property
    def elapsed_s(self) -> float:
        """Seconds since :meth:`reset`."""
        return self._clock() - self._reset_at

    def current(self) -> dict[str, float]:
        """The names of the activities that have not ended, in the order in which they began, and their seconds.

        Activities of the same name count once, from the first.
        """
        now, current = self._clock(), dict[str, float]()
        for activity in list(self._open.values()):
            current.setdefault(activity.name, now - activity.start)
        return current

    def report(self) -> str | None:
        """A message if the activity that began last is due to be reported: after 10, 30 and 60 s, then every minute.

        An activity that recurs, such as an update, is reported only if it takes longer than it ever took before.
        """
        activities = list(self._open.values())
        if not activities:
            return None
        activity = activities[-1]
        elapsed = self._clock() - activity.start
        due = max((seconds for seconds in FIRST_REPORTS_S if seconds <= elapsed), default=0.0)
        if elapsed >= 60.0:
            due = elapsed // 60.0 * 60.0
        if due <= max(activity.reported_s, self._longest.get(activity.name, 0.0)):
            return None
        activity.reported_s = due
        return f"still {activity.name} ({elapsed:.0f} s)"


# Those of this process.
activities = Activities()
announced = activities.announced
