"""What a run remembers of the commands that were given and of the answers to them, for exploration alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from priorzero.prompts import without_loops
from priorzero.types import GameState, HistoryStep

Standing = tuple[str, float]


class CommandMemory:
    """How often each command was given in a room with a score (:attr:`GameState.standing`), and which ones led on; and
    how often the game gave each answer, word by word.

    With ``return_first``, of the commands of a standing those lead on that were given there on the direct way to the
    most points ever reached from it, or to as many by fewer commands. Collection goes back along them without detours
    and explores where none is known, as Go-Explore does (Ecoffet et al. 2021, "First return, then explore", which
    replaces what it keeps by the same rule), but with the agent's own search in place of saved states. Evaluation knows
    nothing of this memory.

    Args:
        return_first: take note of what led on; otherwise commands are only counted.
    """

    def __init__(self, *, return_first: bool = False) -> None:
        self._return_first = return_first
        self._times: Counter[tuple[str, float, str]] = Counter()
        self._answers: Counter[str] = Counter()
        # what leads on, with the points reached and minus the commands that it took
        self._leading: dict[Standing, tuple[float, int, frozenset[str]]] = {}

    def __len__(self) -> int:
        """Different commands in different standings."""
        return len(self._times)

    @property
    def num_leading(self) -> int:
        """Those that lead on."""
        return sum(len(commands) for *_, commands in self._leading.values())

    def state_dict(self) -> dict[str, Any]:
        return {
            "times": [(*key, times) for key, times in self._times.items()],
            "answers": list(self._answers.items()),
            "leading": [
                (*standing, score, length, sorted(commands))
                for standing, (score, length, commands) in self._leading.items()
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._times = Counter({(place, score, command): times for place, score, command, times in state["times"]})
        self._answers = Counter(dict(state["answers"]))
        self._leading = {
            (place, score): (reached, length, frozenset(commands))
            for place, score, reached, length, commands in state["leading"]
        }

    def add(self, standing: Standing, command: str) -> int:
        """Count a command; returns how often it was given in this standing by now."""
        self._times[(*standing, command)] += 1
        return self._times[(*standing, command)]

    def add_answer(self, feedback: str) -> int:
        """Count what the game said; returns how often it has said just this by now."""
        self._answers[feedback] += 1
        return self._answers[feedback]

    def earned(self, history: Sequence[HistoryStep], *, now: GameState) -> None:
        """Points were earned by the last decision: the way here leads on wherever it is the best so far.

        Args:
            history: all decisions of the episode, at least one; loops in it lead nowhere and are left out.
            now: the state after them.
        """
        if not self._return_first:
            return
        way = without_loops(history, now=now)
        given: dict[Standing, set[str]] = {}
        for step in way:
            given.setdefault(step.standing, set()).add(step.action)
        for standing, commands in given.items():
            known = self._leading.get(standing)
            if known is None or (now.score, -len(way)) > known[:2]:
                self._leading[standing] = now.score, -len(way), frozenset(commands)

    def draw_leave(self, rng: np.random.Generator, *, share: float) -> int | None:
        """When an episode that begins now leaves the known way.

        Args:
            rng: draws.
            share: of the episodes leave it, after a number of commands drawn uniformly from none to all of the way to
                the most points.

        Returns:
            That number; None: it follows the known way to its end.
        """
        if share == 0.0 or rng.random() >= share:
            return None
        _, minus_length = max((known[:2] for known in self._leading.values()), default=(0.0, 0))
        return int(rng.integers(1 - minus_length))

    def tries(self, standing: Standing, commands: Sequence[str], *, in_vain: bool) -> np.ndarray:
        """How often each command was given in this standing, ``[K]``; ``in_vain``: 0 for those that lead on."""
        leading = self._leading_from(standing) if in_vain else ()
        return np.array([0 if command in leading else self._times[(*standing, command)] for command in commands])

    def knows_the_way(self, standing: Standing, commands: Sequence[str]) -> bool:
        """Whether one of these commands leads on from this standing."""
        return not self._leading_from(standing).isdisjoint(commands)

    def _leading_from(self, standing: Standing) -> frozenset[str]:
        return self._leading[standing][2] if standing in self._leading else frozenset()
