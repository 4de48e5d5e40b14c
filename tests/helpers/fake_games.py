"""Games that hang, crash or raise errors on command. Worker processes import this module."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

from priorzero.envs.progress import report_progress
from priorzero.types import GameState, UserError

ACTIONS = (
    "go",
    "hang",
    "hang in C",
    "crash",
    "raise",
    "user error",
    "print",
    "big",
    "modules",
    "pause",
    "long",
    "stuck",
)


class FakeGame:
    """Each ``go`` scores one point. If ``start`` is an action, the constructor performs it."""

    def __init__(self, *, start: str | None = None) -> None:
        self._score = 0.0
        if start is not None:
            self._act(start)

    def reset(self) -> GameState:
        self._score = 0.0
        return self._state("")

    def step(self, action: str) -> tuple[GameState, float]:
        if action == "go":
            self._score += 1.0
            return self._state("ok"), 1.0
        return self._state(self._act(action)), 0.0

    def close(self) -> None:
        pass

    def _state(self, feedback: str) -> GameState:
        return GameState(feedback=feedback, valid_actions=ACTIONS, score=self._score, max_score=9.0, moves=0)

    def _act(self, action: str) -> str:
        if action == "hang":
            time.sleep(1000)
        elif action == "hang in C":
            ctypes.CDLL(None).sleep(1000)
        elif action == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif action == "raise":
            raise KeyError("the lamp is gone")
        elif action == "user error":
            raise UserError("type something else")
        elif action == "print":
            print("GARBAGE", flush=True)
            os.write(1, b"GARBAGE")
        elif action == "big":
            return "x" * 3_000_000
        elif action == "modules":
            return " ".join(name if module else f"no-{name}" for name, module in sys.modules.items())
        elif action == "pause":
            time.sleep(0.5)
        elif action == "long":
            for _ in range(8):
                report_progress("a long calculation")
                time.sleep(0.25)
        elif action == "stuck":
            report_progress("a long calculation")
            ctypes.CDLL(None).sleep(1000)
        return ""


class NotAGame:
    """Its constructor takes no arguments."""
