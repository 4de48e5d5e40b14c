"""Signs of life of a game that takes long."""

from __future__ import annotations

from collections.abc import Callable

_listener: Callable[[str], None] | None = None


def report_progress(activity: str) -> None:
    """Say that this game has not hung, although it takes long.

    A worker process may take longer than its time limit as long as this is called often enough. Games call it between
    the parts of their work, in the thread that was called, so that a part which hangs is noticed.

    Args:
        activity: what the game does, as a part of a sentence: "the search for valid actions".
    """
    if _listener is not None:
        _listener(activity)


def set_progress_listener(listener: Callable[[str], None] | None) -> None:
    """``listener`` gets the activities that are reported in this process; None: nobody gets them."""
    global _listener
    _listener = listener
