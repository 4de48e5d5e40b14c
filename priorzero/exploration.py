"""What a run remembers of the commands that were given and of the answers to them, for exploration alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from priorzero.prompts import without_loops
from priorzero.types import GameState, HistoryStep

Standing = tuple[str, float]
Spot = tuple[tuple[str, ...], float]  # a place with a score
# from a spot, or from a standing -> the points reached, minus the commands it took, what was given there
Ways = dict[Spot | Standing, tuple[float, int, frozenset[str]]]


class CommandMemory:
    """How often each command was given in a room with a score (:attr:`GameState.standing`), and which ones led on; and
    how often the game gave each answer, word by word.

    With ``return_first``, the command that was given in a place with a score, on the direct way to the most points ever
    reached from it (or to as many by fewer commands), leads on; in a place that is on no such way, those that were
    given in its room do. Collection goes back along them and explores where none is known, as
    Go-Explore does (Ecoffet et al. 2021, "First return, then explore", which replaces what it keeps by the same rule),
    but with the agent's own search in place of saved states. While an episode lasts its points count as they come; once
    it has ended in the game, as many as it ended with: a way to points that are lost again, by a death soon after, is
    worth less than one that is survived. Evaluation knows nothing of this memory.

    Args:
        return_first: take note of what led on; otherwise commands are only counted.
    """

    def __init__(self, *, return_first: bool = False) -> None:
        self._return_first = return_first
        self._times: Counter[tuple[str, float, str]] = Counter()
        self._answers: Counter[str] = Counter()
        self._hoped: Ways = {}  # as points came
        self._kept: Ways = {}  # as episodes ended

    def __len__(self) -> int:
        """Different commands in different standings."""
        return len(self._times)

    @property
    def num_leading(self) -> int:
        """Those that lead on."""
        return sum(len(commands) for *_, commands in self._from_rooms())

    def state_dict(self) -> dict[str, Any]:
        return {
            "times": [(*key, times) for key, times in self._times.items()],
            "answers": list(self._answers.items()),
            "hoped": _plain(self._hoped),
            "kept": _plain(self._kept),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._times = Counter({(place, score, command): times for place, score, command, times in state["times"]})
        self._answers = Counter(dict(state["answers"]))
        self._hoped = _ways(state["hoped"])
        self._kept = _ways(state["kept"])

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
        for key, commands in _given(way, below=now.score):
            known = self._known(key)
            if known is None or (now.score, -len(way)) > known[:2]:
                self._hoped[key] = now.score, -len(way), commands

    def ended(self, history: Sequence[HistoryStep], *, now: GameState) -> None:
        """The episode is over: the way to its most points is worth what it ended with. Where it lost points, what it
        had hoped of its ways to more is forgotten.

        Args:
            history: all decisions of the episode, at least one.
            now: the state after them.
        """
        if not self._return_first:
            return
        scores = [*(step.standing[1] for step in history), now.score]

        def way_to(t: int) -> list[HistoryStep]:
            return without_loops(history[:t], now=history[t] if t < len(history) else now)

        for t in range(1, len(scores)):
            if scores[t - 1] < scores[t] > now.score:
                for key, commands in _given(way_to(t), below=scores[t]):
                    reached, _, hoped = self._hoped.get(key, (now.score, 0, frozenset()))
                    if now.score < reached <= scores[t] and commands & hoped:
                        del self._hoped[key]
        way = way_to(scores.index(max(scores)))
        for key, commands in _given(way, below=now.score):
            if key not in self._kept or (now.score, -len(way)) > self._kept[key][:2]:
                self._kept[key] = now.score, -len(way), commands

    def draw_detour(self, rng: np.random.Generator, *, share: float, max_score: float) -> tuple[int, int] | None:
        """When an episode that begins now leaves the known way, and when it follows known ways again.

        Args:
            rng: draws.
            share: of the episodes leave it, after a number of commands drawn uniformly from none to all of the way to
                the most points, and for a number drawn from one to all of it.
            max_score: the most points that the game can give, 0 if it does not say. Once a way to them is known,
                there is nothing to leave it for; before any is known, nothing to leave.

        Returns:
            The commands of the episode after which it leaves, and those after which it is back; None: it follows the
            known way to its end.
        """
        if share == 0.0 or rng.random() >= share:
            return None
        reached, minus_length = max((known[:2] for known in self._from_rooms()), default=(0.0, 0))
        if minus_length == 0 or 0 < max_score <= reached:
            return None
        leave = int(rng.integers(1 - minus_length))
        return leave, leave + 1 + int(rng.integers(-minus_length))

    def tries(self, standing: Standing, commands: Sequence[str]) -> np.ndarray:
        """How often each command was given in this standing, ``[K]``."""
        return np.array([self._times[(*standing, command)] for command in commands])

    def way_on(self, state: GameState, *, ahead: float = 0.0) -> tuple[np.ndarray, float]:
        """The way that is known from here.

        Args:
            state: where to go on from.
            ahead: points that this episode has earned aside from the known way. What is known of here with so many
                points less is asked as well, and followed where more points are still to come by it, if it leads to
                more than the episode has: a way to what it has just earned does not. Where the way holds some of those
                points itself, they are expected twice.

        Returns:
            Which of the valid actions lead on, ``[K]`` of bool, none if no way is known; and the points still to come.
        """
        to_come, best = 0.0, np.zeros(len(state.valid_actions), dtype=bool)
        room, _ = state.standing
        for score in dict.fromkeys((state.score, state.score - ahead)):
            for key in (state.place, score), (room, score):
                known = self._known(key)
                if known is None or known[0] <= state.score:
                    continue
                reached, _, commands = known
                leads = np.array([action in commands for action in state.valid_actions], dtype=bool)
                if leads.any():
                    if reached - score > to_come:
                        to_come, best = reached - score, leads
                    break
        return best, to_come

    def _known(self, key: Spot | Standing) -> tuple[float, int, frozenset[str]] | None:
        """The better of what is hoped and what is kept."""
        found = [ways[key] for ways in (self._hoped, self._kept) if key in ways]
        return max(found, key=lambda way: way[:2], default=None)

    def _from_rooms(self) -> Iterator[tuple[float, int, frozenset[str]]]:
        """The ways known from standings, in any place of the room."""
        for key in self._hoped | self._kept:
            known = self._known(key)
            if isinstance(key[0], str) and known is not None:
                yield known


def _given(way: Sequence[HistoryStep], *, below: float) -> Iterator[tuple[Spot | Standing, frozenset[str]]]:
    """What was given on a way with less than so many points, by spot and by standing."""
    given: dict[Spot | Standing, set[str]] = {}
    for step in way:
        room, score = step.standing
        if score < below:
            given.setdefault((step.place, score), set()).add(step.action)
            given.setdefault((room, score), set()).add(step.action)
    for key, commands in given.items():
        yield key, frozenset(commands)


def _plain(ways: Ways) -> list[Any]:
    return [(*key, reached, length, sorted(commands)) for key, (reached, length, commands) in ways.items()]


def _ways(plain: list[Any]) -> Ways:
    return {(where, score): (reached, length, frozenset(given)) for where, score, reached, length, given in plain}
