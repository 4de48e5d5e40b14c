"""What a run remembers of the commands that were given and of the answers to them, for exploration alone."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from priorzero.prompts import without_loops
from priorzero.types import GameState, HistoryStep

Standing = tuple[str, float]
Given = tuple[str, float, str]  # a command in a standing


class CommandMemory:
    """How often each command was given in a room with a score (:attr:`GameState.standing`), and which ones led on; and
    how often the game gave each answer, word by word.

    With ``return_first`` a command leads on while it is part of the shortest known way to more points, from the points
    before. Collection goes back along such commands without detours and explores where none is known, as Go-Explore
    does (Ecoffet et al. 2021, "First return, then explore"), but with the agent's own search in place of saved states.
    Evaluation knows nothing of this memory.

    Args:
        return_first: take note of what led on; otherwise commands are only counted.
    """

    def __init__(self, *, return_first: bool = False) -> None:
        self._return_first = return_first
        self._times: Counter[Given] = Counter()
        self._answers: Counter[str] = Counter()
        self._ways: dict[tuple[Standing, Given], tuple[Given, ...]] = {}  # from where, what earned -> the shortest way
        self._leading: frozenset[Given] = frozenset()  # what is on any of them
        self._farthest = 0  # commands of an episode after which points were earned, at most

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
            "farthest": self._farthest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._times = Counter({(place, score, command): times for place, score, command, times in state["times"]})
        self._answers = Counter(dict(state["answers"]))
        self._ways, self._leading = {}, frozenset()
        for way in state["ways"]:
            self._learn_way(way)
        self._farthest = state["farthest"]

    def add(self, standing: Standing, command: str) -> int:
        """Count a command; returns how often it was given in this standing by now."""
        self._times[(*standing, command)] += 1
        return self._times[(*standing, command)]

    def add_answer(self, feedback: str) -> int:
        """Count what the game said; returns how often it has said just this by now."""
        self._answers[feedback] += 1
        return self._answers[feedback]

    def earned(self, history: Sequence[HistoryStep], *, now: GameState) -> None:
        """Points were earned by the last decision: the way to them from the points before leads on, if none is shorter.

        Args:
            history: all decisions of the episode, at least one; loops in it lead nowhere and are left out.
            now: the state after them.
        """
        if not self._return_first:
            return
        self._farthest = max(self._farthest, len(history))
        *before, last = without_loops(history, now=now)
        steps = [last, *itertools.takewhile(lambda step: step.reward <= 0, reversed(before))]
        self._learn_way(tuple((*step.standing, step.action) for step in reversed(steps)))

    def _learn_way(self, way: tuple[Given, ...]) -> None:
        """Keep it if it is the shortest from where it begins to what it ends with."""
        ends = way[0][:2], way[-1]
        if ends not in self._ways or len(way) < len(self._ways[ends]):
            self._ways[ends] = way
            self._leading = frozenset(itertools.chain.from_iterable(self._ways.values()))

    def draw_leave(self, rng: np.random.Generator, *, share: float) -> int | None:
        """When an episode that begins now leaves the known way.

        Args:
            rng: draws.
            share: of the episodes leave it, after a number of commands drawn uniformly from those to the farthest
                points that were ever earned.

        Returns:
            That number; None: it follows the known way to its end.
        """
        if share == 0.0 or rng.random() >= share:
            return None
        return int(rng.integers(self._farthest + 1))

    def tries(self, standing: Standing, commands: Sequence[str], *, in_vain: bool) -> np.ndarray:
        """How often each command was given in this standing, ``[K]``; ``in_vain``: 0 for those that led on."""
        keys = [(*standing, command) for command in commands]
        return np.array([0 if in_vain and key in self._leading else self._times[key] for key in keys])

    def knows_the_way(self, standing: Standing, commands: Sequence[str]) -> bool:
        """Whether one of these commands led on from this standing."""
        return any((*standing, command) in self._leading for command in commands)
