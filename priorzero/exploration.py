"""What a run remembers of the commands that were given and of the answers to them, for exploration alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from priorzero.prompts import without_loops
from priorzero.types import GameState, HistoryStep

Standing = tuple[str, float]
Spot = tuple[tuple[str, ...], float]  # a place with a score
# from where -> the points reached, minus the commands it took, what was given there
Ways = dict[Any, tuple[float, int, frozenset[str]]]


class CommandMemory:
    """How often each command was given in a room with a score (:attr:`GameState.standing`), and which ones led on; and
    how often the game gave each answer, word by word.

    With ``return_first``, the command that was given in a place with a score, on the direct way to the most points ever
    reached from it (or to as many by fewer commands), leads on; in a place that is on no such way, those that were
    given in its room do. Collection goes back along them without detours and explores where none is known, as
    Go-Explore does (Ecoffet et al. 2021, "First return, then explore", which replaces what it keeps by the same rule),
    but with the agent's own search in place of saved states. Evaluation knows nothing of this memory.

    Args:
        return_first: take note of what led on; otherwise commands are only counted.
    """

    def __init__(self, *, return_first: bool = False) -> None:
        self._return_first = return_first
        self._times: Counter[tuple[str, float, str]] = Counter()
        self._answers: Counter[str] = Counter()
        self._from_places: Ways = {}  # by Spot
        self._from_rooms: Ways = {}  # by Standing

    def __len__(self) -> int:
        """Different commands in different standings."""
        return len(self._times)

    @property
    def num_leading(self) -> int:
        """Those that lead on."""
        return sum(len(commands) for *_, commands in self._from_rooms.values())

    def state_dict(self) -> dict[str, Any]:
        return {
            "times": [(*key, times) for key, times in self._times.items()],
            "answers": list(self._answers.items()),
            "from_places": _plain(self._from_places),
            "from_rooms": _plain(self._from_rooms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._times = Counter({(place, score, command): times for place, score, command, times in state["times"]})
        self._answers = Counter(dict(state["answers"]))
        self._from_places = _ways(state["from_places"])
        self._from_rooms = _ways(state["from_rooms"])

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

        Where the score was as high already it does not: points that are lost and earned again lead nowhere.

        Args:
            history: all decisions of the episode, at least one; loops in it lead nowhere and are left out.
            now: the state after them.
        """
        if not self._return_first:
            return
        way = without_loops(history, now=now)
        for known, key_of in (self._from_places, _spot), (self._from_rooms, attrgetter("standing")):
            given: dict[Any, set[str]] = {}
            for step in way:
                if step.standing[1] < now.score:
                    given.setdefault(key_of(step), set()).add(step.action)
            for key, commands in given.items():
                if key not in known or (now.score, -len(way)) > known[key][:2]:
                    known[key] = now.score, -len(way), frozenset(commands)

    def draw_leave(self, rng: np.random.Generator, *, share: float, max_score: float) -> int | None:
        """When an episode that begins now leaves the known way.

        Args:
            rng: draws.
            share: of the episodes leave it, after a number of commands drawn uniformly from none to all of the way to
                the most points.
            max_score: the most points that the game can give, 0 if it does not say. Once a way to them is known,
                there is nothing to leave it for.

        Returns:
            That number; None: it follows the known way to its end.
        """
        if share == 0.0 or rng.random() >= share:
            return None
        reached, minus_length = max((known[:2] for known in self._from_rooms.values()), default=(0.0, 0))
        if 0 < max_score <= reached:
            return None
        return int(rng.integers(1 - minus_length))

    def tries(self, standing: Standing, commands: Sequence[str]) -> np.ndarray:
        """How often each command was given in this standing, ``[K]``."""
        return np.array([self._times[(*standing, command)] for command in commands])

    def leading(self, state: GameState, *, ahead: float = 0.0) -> np.ndarray:
        """Which of the valid actions lead on from here, ``[K]`` of bool; none if no way is known.

        Args:
            state: where to go on from.
            ahead: points that this episode has earned aside from the known way. What is known of here with so many
                points less is asked as well, and followed where more points are still to come by it.
        """
        to_come, best = 0.0, np.zeros(len(state.valid_actions), dtype=bool)
        room, _ = state.standing
        for score in dict.fromkeys((state.score, state.score - ahead)):
            for known, key in (self._from_places, (state.place, score)), (self._from_rooms, (room, score)):
                if key not in known:
                    continue
                reached, _, commands = known[key]
                leads = np.array([action in commands for action in state.valid_actions], dtype=bool)
                if leads.any():
                    if reached - score > to_come:
                        to_come, best = reached - score, leads
                    break
        return best


def _spot(step: HistoryStep) -> Spot:
    return step.place, step.standing[1]


def _plain(ways: Ways) -> list[Any]:
    return [(*key, reached, length, sorted(commands)) for key, (reached, length, commands) in ways.items()]


def _ways(plain: list[Any]) -> Ways:
    return {(where, score): (reached, length, frozenset(given)) for where, score, reached, length, given in plain}
