"""The known rooms of a game: their commands, and where each command led."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from priorzero.play.novelty import NoveltyCounts
from priorzero.types import GameState, HistoryStep, Place, Plain


class Target(NamedTuple):
    """A command that is to be tried in a room."""

    room: str
    action: str


class Route(NamedTuple):
    """The shortest known way to a room.

    Attributes:
        distance: number of commands.
        first: the first of them; "" if the distance is 0.
    """

    distance: int
    first: str


@dataclass
class RoomMap:
    """What is known of the rooms of one game.

    Attributes:
        probs: for each room, the actions that were valid at the last visit, and their prior probabilities.
        exits: for each room, the actions that left it when they were last taken there, and the rooms they led to.
        counts: for each place, how often each action was taken there.

    Rooms of the same name, as in a maze, are one room.
    """

    probs: dict[str, dict[str, float]] = field(default_factory=dict)
    exits: dict[str, dict[str, str]] = field(default_factory=dict)
    counts: dict[Place, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def visit(self, state: GameState, prior_probs: np.ndarray) -> None:
        """Store the valid actions of a state and their prior, ``[K]``."""
        self.probs[state.room] = dict(zip(state.valid_actions, prior_probs.tolist(), strict=True))

    def add_step(self, step: HistoryStep, *, after: GameState) -> None:
        """Count an action, and store which room it led to.

        One that stayed in the room, ended the game or lost points is no exit.
        """
        self.counts[step.place][step.action] += 1
        exits = self.exits.setdefault(step.room, {})
        if after.terminated or after.room == step.room or step.reward < 0:
            exits.pop(step.action, None)
        else:
            exits[step.action] = after.room

    def routes(self, state: GameState) -> dict[str, Route]:
        """The shortest known way to each room that can be reached from a state, by room."""
        routes = {state.room: Route(0, "")}
        queue = deque([state.room])
        while queue:
            room = queue.popleft()
            distance, first = routes[room]
            for action, following in self.exits.get(room, {}).items():
                if following not in routes and (distance > 0 or action in state.valid_actions):
                    routes[following] = Route(distance + 1, first or action)
                    queue.append(following)
        return routes

    def sample_target(
        self, state: GameState, counts: NoveltyCounts, *, routes: Mapping[str, Route], rng: np.random.Generator
    ) -> Target:
        """Sample an action of a room in ``routes``, which are those from ``state``. The state was visited.

        The probability is proportional to the square of ``prior / ((1 + distance) (1 + n)^1.5 (1 + m)^1.5)``. The
        distance is the number of commands to the room. n is how often the action was taken in its room with the present
        score, and m how often in the present place. For other rooms m is n, since the place there is not known.
        """
        targets: list[Target] = []
        weights: list[float] = []
        here = self.counts.get(state.place, Counter())
        for room, route in routes.items():
            for action, prob in self.probs.get(room, {}).items():
                n = counts.actions[room, state.score, action]
                m = here[action] if room == state.room else n
                targets.append(Target(room, action))
                weights.append((prob / (1 + route.distance)) ** 2 / ((1 + n) * (1 + m)) ** 3)
        probs = np.array(weights)
        return targets[int(rng.choice(len(targets), p=probs / probs.sum()))]

    def state_dict(self) -> Plain:
        return {
            "probs": {room: dict(own) for room, own in self.probs.items()},
            "exits": {room: dict(own) for room, own in self.exits.items()},
            "counts": [(place, dict(own)) for place, own in self.counts.items()],
        }

    def load_state_dict(self, state: Plain) -> None:
        """The inverse of :meth:`state_dict`."""
        self.probs = {room: dict(own) for room, own in state["probs"].items()}
        self.exits = {room: dict(own) for room, own in state["exits"].items()}
        self.counts = defaultdict(Counter, {place: Counter(own) for place, own in state["counts"]})
