"""What a run remembers of the commands that were given, for exploration alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from priorzero.prompts import without_loops
from priorzero.types import GameState, HistoryStep

Standing = tuple[str, float]
Given = tuple[str, float, str]  # a command in a standing


class CommandMemory:
    """How often each command was given in a room with a score (:attr:`GameState.standing`), and which ones led on.

    With ``return_first`` a command leads on if it is part of the shortest way that was found from points to the next
    ones (one way for each standing in which it begins and each command that earned points at its end). Collection goes
    back along such commands without detours and explores where none is known, as Go-Explore does (Ecoffet et al. 2021,
    "First return, then explore"), but with the agent's own search in place of saved states. Evaluation knows nothing
    of this memory.

    Args:
        return_first: take note of what led on; otherwise commands are only counted.
    """

    def __init__(self, *, return_first: bool = False) -> None:
        self._return_first = return_first
        self._times: Counter[Given] = Counter()
        self._answers: Counter[str] = Counter()
        self._ways: dict[tuple[Standing, Given], tuple[Given, ...]] = {}  # by begin and end
        self._leading: set[Given] = set()  # all commands of all ways
        self._most = (-math.inf, 0)  # points ever had, and commands of the shortest way to them, negative

    def __len__(self) -> int:
        """Different commands in different standings."""
        return len(self._times)

    @property
    def num_leading(self) -> int:
        """Those that led on."""
        return len(self._leading)

    def state_dict(self) -> dict[str, Any]:
        return {
            "times": [(*key, times) for key, times in self._times.items()],
            "answers": list(self._answers.items()),
            "ways": list(self._ways.values()),
            "most": self._most,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._times = Counter({(place, score, command): times for place, score, command, times in state["times"]})
        self._answers = Counter(dict(state["answers"]))
        self._ways = {(way[0][:2], way[-1]): tuple(way) for way in state["ways"]}
        self._leading = set().union(*self._ways.values())
        self._most = tuple(state["most"])

    def add(self, standing: Standing, command: str) -> int:
        """Count a command; returns how often it was given in this standing by now."""
        self._times[(*standing, command)] += 1
        return self._times[(*standing, command)]

    def add_answer(self, feedback: str) -> int:
        """Count what the game said; returns how often it has said just this by now."""
        self._answers[feedback] += 1
        return self._answers[feedback]

    def earned(self, history: Sequence[HistoryStep], *, now: GameState) -> None:
        """Points were earned by the last decision: what led to them from the points before leads on, if it is shortest.

        Args:
            history: all decisions of the episode, at least one; loops in it lead nowhere and are left out.
            now: the state after them.
        """
        if not self._return_first:
            return
        *before, last = without_loops(history, now=now)
        self._most = max(self._most, (now.score, -len(before) - 1))
        since = len(before) - next((n for n, step in enumerate(reversed(before)) if step.reward > 0), len(before))
        way = tuple((*step.standing, step.action) for step in (*before[since:], last))
        known = self._ways.get((way[0][:2], way[-1]))
        if known is None or len(way) < len(known):
            self._ways[way[0][:2], way[-1]] = way
            self._leading = set().union(*self._ways.values())

    def draw_leave(self, rng: np.random.Generator, *, share: float) -> int | None:
        """When an episode that begins now leaves the known way.

        Args:
            rng: draws.
            share: of the episodes leave it, after a number of commands drawn uniformly from those of the shortest way
                to the most points that an episode ever had.

        Returns:
            That number; None: it follows the known way to its end.
        """
        if share == 0.0 or rng.random() >= share:
            return None
        return int(rng.integers(1 - self._most[1]))

    def tries(self, standing: Standing, commands: Sequence[str], *, in_vain: bool) -> np.ndarray:
        """How often each command was given in this standing, ``[K]``; ``in_vain``: 0 for those that led on."""
        keys = [(*standing, command) for command in commands]
        return np.array([0 if in_vain and key in self._leading else self._times[key] for key in keys])

    def knows_the_way(self, standing: Standing, commands: Sequence[str]) -> bool:
        """Whether one of these commands led on from this standing."""
        return any((*standing, command) in self._leading for command in commands)
