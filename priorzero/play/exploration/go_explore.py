"""Go-Explore as an exploration strategy (Ecoffet et al. 2021, "First return, then explore").

The archive of a game stores the best trajectory known from each cell. A cell is a score together with a room or with a
place (room description and inventory). The best trajectory is the one to the highest score; of several, the shortest.

- Return: if the archive has a trajectory from the present cell to a higher score, the episode takes one of its actions.
  If it has one from another room with the present score, the episode goes to the nearest of these rooms. After
  :data:`MAX_VISITS` such decisions in the same place, the episode explores there, so that it does not go in a circle.
- Explore: if there is none, the episode explores until it gains points. It chooses a target, goes there and tries it. A
  target is a command of a known room, sampled with a probability proportional to the square of ``prior / ((1 +
  distance) (1 + count)^3)``; see :meth:`.room_map.RoomMap.sample_target`.
- The episode takes these actions whatever the search prefers; the search chooses only among several actions of a known
  trajectory. They are also root noise, which raises their visit counts, the target of the world model's policy.
- Deviate: with the probability ``search.deviation_prob``, an episode explores in a random interval of its actions even
  if it could return. Its targets are commands of the present room. The interval ends early once the episode has gained
  points that no known trajectory has.
- A trajectory has the score that its episode has reached; after the end of the episode, it has the final score. So a
  trajectory to points that are lost again, for example by death, is worth less than one that keeps them.

The original restores saved states of the game, and explores by random actions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from priorzero.envs.history import without_loops
from priorzero.play.exploration.base import Exploration, RootNoise
from priorzero.play.exploration.room_map import RoomMap, Route, Target
from priorzero.play.novelty import NoveltyCounts
from priorzero.types import GameState, HistoryStep, Place, Plain

MAX_VISITS = 2
MAX_DEVIATION = 5

Cell = tuple[Place | str, float]  # a place or a room, and a score


@dataclass(frozen=True)
class Trajectory:
    """A trajectory, as it is stored for one of its cells."""

    score: float  # that it reached
    length: int  # number of actions from the beginning of the episode to that score, without loops
    actions: frozenset[str]  # that were taken in the cell

    def is_better_than(self, other: Trajectory | None) -> bool:
        """A higher score is better, then a shorter trajectory."""
        return other is None or (self.score, -self.length) > (other.score, -other.length)


@dataclass(frozen=True)
class Plan:
    """What the archive suggests in a state.

    Attributes:
        actions: True for the valid actions that are on the best known trajectory, ``[K]`` bool; all False if no
            trajectory to a higher score is known.
    """

    actions: np.ndarray
    expected_gain: float = 0.0  # points that the trajectory gains from here on


class Archive:
    """The best trajectories of one game, by cell."""

    def __init__(self) -> None:
        self._provisional: dict[Cell, Trajectory] = {}  # with the score reached during the episode
        self._confirmed: dict[Cell, Trajectory] = {}  # with the final score of the episode

    @property
    def num_actions(self) -> int:
        """Number of actions on known trajectories, summed over all rooms and scores."""
        return sum(len(trajectory.actions) for trajectory in self._from_rooms())

    def best(self) -> Trajectory | None:
        """The best trajectory from any room; None if there is none."""
        return max(self._from_rooms(), key=lambda t: (t.score, -t.length), default=None)

    def add_reward(self, history: Sequence[HistoryStep], *, now: GameState) -> None:
        """Store the trajectory to the points that the last decision gained, in each cell where it is the best so far.

        Cells whose score is not below the present one are left out. So points that were lost and are gained again are
        not stored as progress. ``history`` is all decisions of the episode, at least one, and ``now`` the state after
        them.
        """
        path = without_loops(history, now=now)
        for cell, actions in _actions_by_cell(path, below=now.score):
            trajectory = Trajectory(now.score, len(path), actions)
            if trajectory.is_better_than(self._known(cell)):
                self._provisional[cell] = trajectory

    def add_episode(self, history: Sequence[HistoryStep], *, now: GameState) -> None:
        """Store the trajectory of an episode that has ended: the actions to its highest score, with its final score.

        The trajectories that :meth:`add_reward` stored for points which the episode lost again are removed.
        """
        scores = [*(step.score for step in history), now.score]

        def path_to(t: int) -> list[HistoryStep]:
            return without_loops(history[:t], now=history[t] if t < len(history) else now)

        for t in range(1, len(scores)):
            if scores[t - 1] < scores[t] > now.score:
                self._remove_lost(path_to(t), lost_score=scores[t], final_score=now.score)
        path = path_to(scores.index(max(scores)))
        for cell, actions in _actions_by_cell(path, below=now.score):
            trajectory = Trajectory(now.score, len(path), actions)
            if trajectory.is_better_than(self._confirmed.get(cell)):
                self._confirmed[cell] = trajectory

    def _remove_lost(self, path: Sequence[HistoryStep], *, lost_score: float, final_score: float) -> None:
        for cell, actions in _actions_by_cell(path, below=lost_score):
            known = self._provisional.get(cell)
            if known is not None and final_score < known.score <= lost_score and actions & known.actions:
                del self._provisional[cell]

    def plan(self, state: GameState, *, off_path_reward: float = 0.0) -> Plan:
        """The known trajectory from a state to more points.

        ``off_path_reward`` is the number of points that this episode has gained off the known trajectories. The cells
        whose score is lower by this amount are looked up as well, and the trajectory with the larger gain is taken. If
        that trajectory contains some of these points itself, they are counted twice.
        """
        best = Plan(np.zeros(len(state.valid_actions), dtype=bool))
        for score in dict.fromkeys((state.score, state.score - off_path_reward)):
            for cell in (state.place, score), (state.room, score):
                known = self._known(cell)
                if known is None or known.score <= state.score:
                    continue
                actions = np.array([action in known.actions for action in state.valid_actions], dtype=bool)
                if actions.any():
                    if known.score - score > best.expected_gain:
                        best = Plan(actions, known.score - score)
                    break
        return best

    def rooms(self, score: float) -> set[str]:
        """The rooms in which a trajectory from ``score`` to a higher score is known."""
        cells = [*self._provisional, *self._confirmed]
        known = {where: self._known((where, own)) for where, own in cells if own == score and isinstance(where, str)}
        return {room for room, trajectory in known.items() if trajectory is not None and trajectory.score > score}

    def state_dict(self) -> Plain:
        return {"provisional": _to_plain(self._provisional), "confirmed": _to_plain(self._confirmed)}

    def load_state_dict(self, state: Plain) -> None:
        self._provisional = _from_plain(state["provisional"])
        self._confirmed = _from_plain(state["confirmed"])

    def _known(self, cell: Cell) -> Trajectory | None:
        provisional, confirmed = self._provisional.get(cell), self._confirmed.get(cell)
        if confirmed is None or (provisional is not None and not confirmed.is_better_than(provisional)):
            return provisional
        return confirmed

    def _from_rooms(self) -> Iterator[Trajectory]:
        for cell in self._provisional | self._confirmed:
            known = self._known(cell)
            if isinstance(cell[0], str) and known is not None:
                yield known


@dataclass
class _EpisodeProgress:
    """The strategy's state in one episode.

    Attributes:
        deviation: the interval of actions, counted from 0, in which the episode deviates: the first one, and the first
            one after it. None: it does not deviate.
        off_path_reward: points gained and lost since the deviation began, without those that the archive expected.
            Once the sum is positive, the deviation is over.
        explores: the episode explores until it gains points.
        returns: the present decision follows a trajectory, or goes to a room from which one is known.
        visits: number of such decisions in each place since the last change of the score.
        dead_ends: rooms in which no action of a trajectory was valid, since the last change of the score.
        target: the command that the episode goes to; None: the next exploring decision chooses one.
        give_up_at: number of actions in the episode after which the target is given up.
    """

    deviation: tuple[int, int] | None
    off_path_reward: float = 0.0
    num_actions: int = 0  # so far
    explores: bool = False
    returns: bool = False
    visits: Counter[Place] = field(default_factory=Counter)
    dead_ends: set[str] = field(default_factory=set)
    target: Target | None = None
    give_up_at: int = 0
    plan: Plan | None = None  # the archive's plan for the present decision; None between decisions

    @property
    def deviates(self) -> bool:
        if self.deviation is None or self.off_path_reward > 0:
            return False
        return self.deviation[0] <= self.num_actions < self.deviation[1]

    def state_dict(self) -> Plain:
        """Everything but ``plan`` and ``returns``, which belong to the present decision."""
        return {
            "deviation": self.deviation,
            "off_path_reward": self.off_path_reward,
            "num_actions": self.num_actions,
            "explores": self.explores,
            "visits": list(self.visits.items()),
            "dead_ends": sorted(self.dead_ends),
            "target": None if self.target is None else tuple(self.target),
            "give_up_at": self.give_up_at,
        }

    @classmethod
    def from_state_dict(cls, state: Plain) -> _EpisodeProgress:
        target = state["target"]
        changed = {
            "visits": Counter(dict(state["visits"])),
            "dead_ends": set(state["dead_ends"]),
            "target": None if target is None else Target(*target),
        }
        return cls(**{**state, **changed})


class GoExplore(Exploration):
    """The strategy, see the module's docstring. Environment ``e`` plays the game of ``counts[e % len(counts)]``."""

    def __init__(self, counts: Sequence[NoveltyCounts], *, deviation_prob: float) -> None:
        self._counts = counts
        self._deviation_prob = deviation_prob
        self.archives = [Archive() for _ in counts]
        self.maps = [RoomMap() for _ in counts]
        self._progress: dict[int, _EpisodeProgress] = {}

    def _archive(self, env: int) -> Archive:
        return self.archives[env % len(self.archives)]

    def _map(self, env: int) -> RoomMap:
        return self.maps[env % len(self.maps)]

    def begin_episode(self, env: int, state: GameState, *, rng: np.random.Generator) -> None:
        deviation = self._sample_deviation(self._archive(env), max_score=state.max_score, rng=rng)
        self._progress[env] = _EpisodeProgress(deviation)

    def _sample_deviation(
        self, archive: Archive, *, max_score: float, rng: np.random.Generator
    ) -> tuple[int, int] | None:
        """A value of :attr:`_EpisodeProgress.deviation`.

        The interval begins after 0 to L actions, where L is the length of the best trajectory. It contains 1 to
        :data:`MAX_DEVIATION` actions, but at most L. Both numbers are uniformly distributed. There is none before a
        trajectory is known, nor after one has reached ``max_score``.
        """
        if self._deviation_prob == 0.0 or rng.random() >= self._deviation_prob:
            return None
        best = archive.best()
        if best is None or 0 < max_score <= best.score:
            return None
        begin = int(rng.integers(best.length + 1))
        return begin, begin + 1 + int(rng.integers(min(best.length, MAX_DEVIATION)))

    def root_noise(
        self, env: int, state: GameState, prior_probs: np.ndarray | None, *, rng: np.random.Generator
    ) -> RootNoise:
        progress = self._progress[env]
        progress.plan = self._archive(env).plan(state, off_path_reward=progress.off_path_reward)
        if prior_probs is None:
            prior_probs = np.full(len(state.valid_actions), 1.0 / len(state.valid_actions))
        self._map(env).visit(state, prior_probs)
        chosen = progress.plan.actions
        goes_in_circle = progress.visits[state.place] >= MAX_VISITS
        progress.returns = not (progress.deviates or progress.explores or goes_in_circle)
        if not (progress.returns and chosen.any()):
            action = self._next_action(env, state, rng=rng)
            chosen = np.array([valid == action for valid in state.valid_actions])
        if progress.returns:
            progress.target = None
        return RootNoise(chosen / chosen.sum(), only=chosen)

    def _next_action(self, env: int, state: GameState, *, rng: np.random.Generator) -> str:
        """The next action of an episode that is not on a known trajectory, or does not follow it."""
        progress, archive = self._progress[env], self._archive(env)
        routes = self._map(env).routes(state)
        if progress.returns:
            progress.dead_ends.add(state.room)
            known = archive.rooms(state.score) | archive.rooms(state.score - progress.off_path_reward)
            nearest = min((routes[room] for room in known - progress.dead_ends if room in routes), default=None)
            if nearest is not None:
                return nearest.first
            progress.returns = False
            # After points off the trajectories, the episode may still come to a room from which it can return.
            progress.explores = progress.off_path_reward <= 0
        if progress.deviates:  # the episode does not go far from its trajectory
            routes = {state.room: routes[state.room]}
        return self._next_to_target(env, state, routes, rng=rng)

    def _next_to_target(
        self, env: int, state: GameState, routes: Mapping[str, Route], *, rng: np.random.Generator
    ) -> str:
        """The next command on the way to the target, or the target itself. Chooses a target if there is none."""
        progress, target = self._progress[env], self._progress[env].target
        if (
            target is None
            or progress.num_actions >= progress.give_up_at
            or target.room not in routes
            or (target.room == state.room and target.action not in state.valid_actions)
        ):
            counts = self._counts[env % len(self._counts)]
            target = self._map(env).sample_target(state, counts, routes=routes, rng=rng)
            progress.target = target
            progress.give_up_at = progress.num_actions + 2 * routes[target.room].distance + 1
        return target.action if target.room == state.room else routes[target.room].first

    def observe(self, env: int, *, position: int, after: GameState, history: Sequence[HistoryStep]) -> None:
        progress, last, reward = self._progress[env], history[-1], history[-1].reward
        assert progress.plan is not None
        expected_gain = progress.plan.expected_gain if progress.plan.actions[position] else 0.0
        began = progress.deviation is not None and progress.num_actions >= progress.deviation[0]
        if began and expected_gain <= max(reward, 0.0):
            progress.off_path_reward += reward
        progress.num_actions += 1
        progress.plan = None
        self._map(env).add_step(last, after=after)
        if reward or progress.target == (last.room, last.action):
            progress.target = None
        if progress.returns:
            progress.visits[last.place] += 1
        if reward:
            progress.visits.clear()
            progress.dead_ends.clear()
        if reward > 0:
            progress.explores = False
            self._archive(env).add_reward(history, now=after)

    def end_episode(self, env: int, state: GameState, history: Sequence[HistoryStep]) -> None:
        self._archive(env).add_episode(history, now=state)

    def scalars(self) -> dict[str, float]:
        return {"collector_iter/commands_leading_on": float(sum(archive.num_actions for archive in self.archives))}

    def state_dict(self) -> Plain:
        return {
            "archives": [archive.state_dict() for archive in self.archives],
            "maps": [own.state_dict() for own in self.maps],
            "progress": {env: progress.state_dict() for env, progress in self._progress.items()},
        }

    def load_state_dict(self, state: Plain) -> None:
        for archive, own in zip(self.archives, state["archives"], strict=True):
            archive.load_state_dict(own)
        for room_map, own in zip(self.maps, state["maps"], strict=True):
            room_map.load_state_dict(own)
        self._progress = {env: _EpisodeProgress.from_state_dict(own) for env, own in state["progress"].items()}


def _actions_by_cell(path: Sequence[HistoryStep], *, below: float) -> Iterator[tuple[Cell, frozenset[str]]]:
    """The actions that a path took at scores below ``below``, for each cell."""
    actions: dict[Cell, set[str]] = {}
    for step in path:
        if step.score < below:
            actions.setdefault((step.place, step.score), set()).add(step.action)
            actions.setdefault((step.room, step.score), set()).add(step.action)
    for cell, own in actions.items():
        yield cell, frozenset(own)


def _to_plain(trajectories: dict[Cell, Trajectory]) -> list[tuple[Place | str, float, float, int, list[str]]]:
    return [(*cell, t.score, t.length, sorted(t.actions)) for cell, t in trajectories.items()]


def _from_plain(plain: Sequence[tuple[Place | str, float, float, int, list[str]]]) -> dict[Cell, Trajectory]:
    return {
        (where, cell_score): Trajectory(score, length, frozenset(actions))
        for where, cell_score, score, length, actions in plain
    }
