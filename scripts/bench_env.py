"""Time to find the valid actions of Jericho games, step by step, and whether the sets are Jericho's. Takes hours.

    python scripts/bench_env.py                                   # twelve games; two to three hours on one core
    python scripts/bench_env.py --games zork1.z5,library.z5       # these games
    python scripts/bench_env.py --quick                           # detective and Zork I, about two minutes

Games that are not found are skipped (see PRIORZERO_GAMES in README.md).

**Play.** Each game is played with ``env.valid_actions=fast`` and without room and inventory, for ``--steps`` steps in
each of two ways. Each begins with an empty cache:

- random: uniform among the valid actions, in episodes of at most 100 steps;
- guided: with probability 0.9 the next command of Jericho's walkthrough, otherwise a random valid action, after which
  the walkthrough goes on with that command. An episode ends with the game or with the walkthrough.

**Seconds a step.** The benchmark measures the wall time of each call that finds the valid actions of a state:

- fast: the sum over all steps, divided by the number of steps;
- exact: the share of steps whose complete state was not met before (only these miss the cache of states), times the
  mean time of the exact search over the sampled states of this kind of play;
- Jericho's own: the mean of ``get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False)`` with
  spaCy's complete pipeline over ``--jericho-states`` states. It has no cache and uses one thread. There is one change:
  the visible objects are sorted. Jericho reads them from a set, so Python's hash seed would decide which of several
  commands with the same effect it returns.

The exact search and Jericho's own run in processes of their own, right after the fast search of the same state, so that
other load on the machine affects all alike. They have no cache and use one thread. ``--threads`` is for the fast one.

**Accuracy.** In ``--exact-states`` states, spread evenly over the steps of both kinds, the fast set is compared with
the exact set, by text and by effect: two commands with the same change of the world have the same effect.

**Gold commands** are those of the walkthrough. One is lost if no fast action has its effect (change of the world and
score), but an exact action has.

The exit code is 1 if a gold command is lost, or if the recall or the precision by effect over all games is below 99.9%.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from bench_tools import RESULTS, Row, at_least, print_table, report, seconds, write_json
from numpy.ctypeslib import as_ctypes

from priorzero.envs.action_cache import CACHE_VARIABLE
from priorzero.envs.child import run_in_fork
from priorzero.envs.frotz import DIFF_WORDS, SPACY_MODEL, EmulatorState, ReproducibleFrotzEnv, jericho_util
from priorzero.envs.frotz_files import FilelessFrotzEnv
from priorzero.envs.games import resolve_game
from priorzero.envs.jericho_game import JerichoGame
from priorzero.envs.probe import Probe
from priorzero.types import UserError, ValidActionsMode

QUICK_GAMES = ("detective.z5", "zork1.z5")
GAMES = (
    *QUICK_GAMES, "acorncourt.z5", "omniquest.z5", "library.z5", "ludicorp.z5", "pentari.z5", "balances.z5",
    "deephome.z5", "zork3.z5", "anchor.z8", "snacktime.z8",
)  # fmt: skip
DEFAULTS = {"steps": 300, "exact_states": 100, "jericho_states": 10, "gold_states": 100}
QUICK = {"steps": 60, "exact_states": 20, "jericho_states": 4, "gold_states": 20}
KINDS = ("random", "guided")
EPISODE_STEPS = 100  # of random play
GUIDANCE = 0.9  # probability of the walkthrough's command in guided play
NEVER = 10**9  # the benchmark ends the episodes
MIN_ACCURACY = 0.999  # recall and precision by effect over all games
GOAL, GOAL_PER_GAME = 5, 2  # ratio of the times of exact and fast


# ---- figures ----


@dataclass
class Overlap:
    """Sizes of the fast and the exact set and of their intersection, summed over states."""

    fast: int = 0
    exact: int = 0
    common: int = 0

    def add(self, fast: Collection[Any], exact: Collection[Any]) -> None:
        """Add the two sets of a state."""
        self.fast += len(set(fast))
        self.exact += len(set(exact))
        self.common += len(set(fast) & set(exact))

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(self.fast + other.fast, self.exact + other.exact, self.common + other.common)

    @property
    def recall(self) -> float:
        return self.common / self.exact if self.exact else 1.0

    @property
    def precision(self) -> float:
        return self.common / self.fast if self.fast else 1.0


@dataclass
class PlayFigures:
    """Times of one kind of play of one game.

    Attributes:
        num_actions: the number of valid actions in each step.
        texts: the different action texts of all steps.
        new_states: number of steps whose complete state was not met before.
        fast_s: seconds of the fast search, of all steps.
        exact_s: seconds of the exact search in each sampled state.
        jericho_s: seconds of Jericho's own search in each of its sampled states.
    """

    num_actions: list[int] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    new_states: int = 0
    fast_s: float = 0.0
    exact_s: list[float] = field(default_factory=list)
    jericho_s: list[float] = field(default_factory=list)

    @property
    def new_share(self) -> float:
        return self.new_states / len(self.num_actions)

    @property
    def fast_per_step(self) -> float:
        return self.fast_s / len(self.num_actions)

    @property
    def exact_per_step(self) -> float:
        return self.new_share * statistics.fmean(self.exact_s)


@dataclass
class GameFigures:
    """All figures of a game.

    Attributes:
        threads: number of threads of the fast search; None: as many as a run would use.
        plays: times of each kind of play.
        by_text, by_effect: the sampled sets of actions, and of their effects.
        equal: number of sampled states whose two sets are equal.
        gold_states: number of states of the walkthrough.
        gold_found: number of gold commands whose effect a fast action has.
        gold_lost: the gold commands that are lost.
    """

    threads: int | None
    plays: dict[str, PlayFigures] = field(default_factory=lambda: {kind: PlayFigures() for kind in KINDS})
    by_text: Overlap = field(default_factory=Overlap)
    by_effect: Overlap = field(default_factory=Overlap)
    equal: int = 0
    gold_states: int = 0
    gold_found: int = 0
    gold_lost: list[str] = field(default_factory=list)

    @property
    def sampled(self) -> int:
        return sum(len(play.exact_s) for play in self.plays.values())

    @property
    def fast_s(self) -> float:
        return statistics.fmean(play.fast_per_step for play in self.plays.values())

    @property
    def exact_s(self) -> float:
        return statistics.fmean(play.exact_per_step for play in self.plays.values())

    def times(self) -> dict[str, float]:
        """Seconds a step, and ratios."""
        jericho_s = [value for play in self.plays.values() for value in play.jericho_s]
        ratios = {kind: play.exact_per_step / play.fast_per_step for kind, play in self.plays.items()}
        return {
            "Jericho's own": statistics.fmean(jericho_s) if jericho_s else float("nan"),
            "exact": self.exact_s,
            "fast": self.fast_s,
            **{f"ratio, {kind}": ratio for kind, ratio in ratios.items()},
            "ratio": self.exact_s / self.fast_s,
        }

    def sizes(self) -> dict[str, float]:
        """Numbers of actions, and shares of new states."""
        counts = [count for play in self.plays.values() for count in play.num_actions]
        texts = set[str]().union(*(play.texts for play in self.plays.values()))
        shares = {f"new, {kind}": play.new_share for kind, play in self.plays.items()}
        return {"mean K": statistics.fmean(counts), "max K": max(counts), "action texts": len(texts), **shares}


def accuracy(games: Iterable[GameFigures]) -> dict[str, float]:
    """Recall, precision and gold commands over some games."""
    games = list(games)
    by_text = sum((game.by_text for game in games), Overlap())
    by_effect = sum((game.by_effect for game in games), Overlap())
    return {
        "states": sum(game.sampled for game in games),
        "equal": sum(game.equal for game in games),
        "recall, text": by_text.recall,
        "precision, text": by_text.precision,
        "recall, effect": by_effect.recall,
        "precision, effect": by_effect.precision,
        "gold states": sum(game.gold_states for game in games),
        "gold found": sum(game.gold_found for game in games),
        "gold lost": sum(len(game.gold_lost) for game in games),
    }


# ---- searches ----


class Search(NamedTuple):
    """The valid actions that were found in a state, and how long it took."""

    state: EmulatorState
    actions: tuple[str, ...]
    seconds: float


class Effect(NamedTuple):
    """What a command changes in a state. Where the game waits for a key, ``change`` is the command."""

    change: bytes
    score: int


class RecordingGame(JerichoGame):
    """A game that remembers its last search for valid actions, so that its time can be measured."""

    last_search: Search

    def _valid_actions(self, state: EmulatorState) -> tuple[str, ...]:
        find = functools.partial(super()._valid_actions, state)
        duration, actions = seconds(find, repeats=1)
        self.last_search = Search(state, actions, duration)
        return actions


def open_game(path: Path, *, mode: ValidActionsMode, cache: str, threads: int | None) -> RecordingGame:
    """A game.

    Args:
        path: the story file.
        mode: as ``env.valid_actions``.
        cache: the file of the cache on disk, or ``off``.
        threads: see :class:`JerichoGame`.
    """
    with mock.patch.dict(os.environ, {CACHE_VARIABLE: cache}):
        return RecordingGame(
            path,
            seed=0,
            max_episode_steps=NEVER,
            look_and_inventory=False,
            valid_actions=mode,
            num_threads=threads,
        )


class JerichosOwn(FilelessFrotzEnv):
    """Jericho's own search, with the visible objects in sorted order. It runs in the child process of a ``Probe``."""

    isolated = False
    on_progress: Callable[[], None]

    def __init__(self, path: Path) -> None:
        import spacy

        super().__init__(str(path), seed=0)
        self.reset()
        self._pipeline = spacy.load(SPACY_MODEL)  # complete, in contrast to the package's

    def find_actions(self, state: EmulatorState) -> tuple[str, ...]:
        jericho_util.spacy_nlp = self._pipeline
        self.set_state(state.saved)
        return tuple(self.get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False))

    def _score_object_names(self, interactive_objs: dict[str, Any]) -> list[str]:
        ordered = {text: sorted(interactive_objs[text]) for text in sorted(interactive_objs)}
        return list(super()._score_object_names(ordered))


class References:
    """What the fast search of a game is compared with."""

    def __init__(self, path: Path, *, threads: int | None) -> None:
        self._exact = open_game(path, mode="exact", cache="off", threads=threads)
        self._jericho = Probe(JerichosOwn(path), name=path.name)  # type: ignore[arg-type]
        self._env = ReproducibleFrotzEnv(path, seed=0)
        self.threads = threads
        self.walkthrough = self._exact.walkthrough()

    def exact(self, state: EmulatorState) -> Search:
        """The exact search of a state, even if it was searched before."""
        self._exact._known_actions.clear()
        self._exact._valid_actions(state)
        return self._exact.last_search

    def jericho_s(self, state: EmulatorState) -> float:
        """Seconds of Jericho's own search."""
        return seconds(lambda: self._jericho.find_actions(state), repeats=1)[0]

    def effects(self, state: EmulatorState, commands: Collection[str]) -> list[Effect]:
        """The effect of each command in ``state``."""
        effects = run_in_fork(functools.partial(self._effects, state, tuple(commands)), otherwise=None)
        if effects is None:
            raise RuntimeError(f"one of the commands {commands} crashes Jericho's emulator")
        return effects

    def close(self) -> None:
        """End all processes."""
        self._exact.close()
        self._jericho.close()
        self._env.close_emulators()

    def _effects(self, state: EmulatorState, commands: Sequence[str]) -> list[Effect]:
        env = self._env
        env.restore(state)
        if env.waits_for_key():
            return [Effect(command.encode(), 0) for command in commands]
        effects = []
        for command in commands:
            env.restore(state)
            env.step(command)
            change = np.zeros(DIFF_WORDS, dtype=np.uint16)
            objects, destinations = change[: DIFF_WORDS // 2], change[DIFF_WORDS // 2 :]
            env.frotz_lib.get_cleaned_world_diff(as_ctypes(objects), as_ctypes(destinations))
            effects.append(Effect(change.tobytes(), env.get_score()))
        return effects


# ---- play ----


def play(
    game: RecordingGame, *, steps: int, rng: np.random.Generator, walkthrough: Sequence[str] = ()
) -> Iterator[Search]:
    """Play a game, at random if there is no walkthrough; yield the search of each step before its command is taken."""
    state, position = game.reset(), 0
    for _ in range(steps):
        yield game.last_search
        if walkthrough and rng.random() < GUIDANCE:
            state, _ = game.step_unchecked(walkthrough[position])
            position += 1
        else:
            state, _ = game.step(state.valid_actions[rng.integers(len(state.valid_actions))])
        is_over = position == len(walkthrough) if walkthrough else state.moves == EPISODE_STEPS
        if state.done or is_over:
            state, position = game.reset(), 0


def measure_play(
    kind: str, searches: Iterable[Search], *, figures: GameFigures, references: References, options: argparse.Namespace
) -> None:
    """Add the times of one kind of play to ``figures``, and compare the sampled states."""
    times, seen = figures.plays[kind], set[bytes]()
    for number, search in enumerate(searches, 1):
        times.num_actions.append(len(search.actions))
        times.texts.update(search.actions)
        times.fast_s += search.seconds
        key = search.state.digest()
        if key in seen:
            continue
        seen.add(key)
        times.new_states += 1
        progress = number / options.steps / len(KINDS)
        if len(times.exact_s) < progress * options.exact_states:
            exact = references.exact(search.state)
            times.exact_s.append(exact.seconds)
            compare(search.actions, exact, figures=figures, references=references)
        if len(times.jericho_s) < progress * options.jericho_states:
            times.jericho_s.append(references.jericho_s(search.state))


def compare(fast: tuple[str, ...], exact: Search, *, figures: GameFigures, references: References) -> None:
    """Compare the two sets of a state."""
    figures.by_text.add(fast, exact.actions)
    figures.equal += set(fast) == set(exact.actions)
    changes = [
        [effect.change for effect in references.effects(exact.state, actions)] for actions in (fast, exact.actions)
    ]
    figures.by_effect.add(*changes)


def measure_gold(game: RecordingGame, *, figures: GameFigures, references: References, num_states: int) -> None:
    """Check in the first states of the walkthrough that the effect of its command is not lost."""
    state = game.reset()
    for command in references.walkthrough[:num_states]:
        if state.done:
            break
        search = game.last_search
        figures.gold_states += 1
        gold, *fast = references.effects(search.state, (command, *search.actions))
        if gold in fast:
            figures.gold_found += 1
        elif gold in references.effects(search.state, references.exact(search.state).actions):
            figures.gold_lost.append(f"{figures.gold_states}: {command}")
        state, _ = game.step_unchecked(command)


def measure_game(path: Path, *, options: argparse.Namespace) -> GameFigures:
    """All figures of a game."""
    references = References(path, threads=options.threads)
    figures = GameFigures(references.threads)
    with tempfile.TemporaryDirectory() as folder:
        games = {
            kind: open_game(path, mode="fast", cache=f"{folder}/{kind}.sqlite3", threads=options.threads)
            for kind in KINDS
        }
        for number, (kind, game) in enumerate(games.items()):
            walkthrough = references.walkthrough if kind == "guided" else ()
            rng = np.random.default_rng([options.seed, number])
            searches = play(game, steps=options.steps, rng=rng, walkthrough=walkthrough)
            measure_play(kind, searches, figures=figures, references=references, options=options)
            print(f"{path.name}: measured {kind} play", file=sys.stderr, flush=True)
        measure_gold(games["random"], figures=figures, references=references, num_states=options.gold_states)
        for game in games.values():
            game.close()
    references.close()
    return figures


# ---- the script ----


def without_torch() -> None:
    """Keep spaCy from importing torch, which it does not need, as in worker processes."""
    sys.modules["torch"] = None  # type: ignore[assignment]


def measure_games(paths: Mapping[str, Path], *, options: argparse.Namespace) -> dict[str, GameFigures]:
    """The figures of each game. The figures of a game are written when it is finished."""
    measure = functools.partial(measure_game, options=options)
    figures = {}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), without_torch) as executor:
        results = (map if options.jobs == 1 else executor.map)(measure, paths.values())
        for name, result in zip(paths, results, strict=True):
            figures[name] = result
            write_json(RESULTS / "env_games" / f"{name}.json", details(result))
            print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in result.times().items()), flush=True)
    return figures


def details(game: GameFigures) -> dict[str, Any]:
    """The figures of a game for the JSON file."""
    plays = {
        kind: {"exact": play.exact_per_step, "fast": play.fast_per_step, "exact, sampled": play.exact_s}
        for kind, play in game.plays.items()
    }
    others = {"lost gold commands": game.gold_lost, "threads": game.threads, "plays": plays}
    return {**game.times(), **accuracy([game]), **game.sizes(), **others}


def geometric_means(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The geometric mean of each column."""
    rows = list(rows)
    return {key: statistics.geometric_mean(row[key] for row in rows) for key in rows[0]}


def report_games(figures: Mapping[str, GameFigures], *, options: argparse.Namespace) -> int:
    """Print and write all figures; returns the exit code."""
    times = {name: game.times() for name, game in figures.items()}
    means = geometric_means(times.values())
    total = accuracy(figures.values())
    print_table("seconds a step", {**times, "geometric mean": means})
    print_table("accuracy", {**{name: accuracy([game]) for name, game in figures.items()}, "all": total})
    print_table("sizes", {name: game.sizes() for name, game in figures.items()})
    for name, game in figures.items():
        if game.gold_lost:
            print(f"{name}: lost gold commands: {', '.join(game.gold_lost)}")
    is_accurate = min(total["recall, effect"], total["precision, effect"]) >= MIN_ACCURACY and not total["gold lost"]
    rows = [
        Row(f"{name}: a step", game.fast_s, game.exact_s, GOAL_PER_GAME, not game.gold_lost)
        for name, game in figures.items()
    ]
    rows.append(Row("geometric mean", means["fast"], means["exact"], GOAL, is_accurate))
    games = {name: details(game) for name, game in figures.items()}
    return report("env", rows, games=games, means=means, accuracy=total, options=vars(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``--quick`` replaces the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--games", help=f"story files, separated by commas (default: {','.join(GAMES)})")
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(QUICK_GAMES)} with few steps and states")
    parser.add_argument("--steps", type=at_least(1), help="steps of each kind of play (default: 300)")
    parser.add_argument("--exact-states", type=at_least(2), help="states with an exact search (default: 100)")
    parser.add_argument("--jericho-states", type=at_least(2), help="states with Jericho's own search (default: 10)")
    parser.add_argument("--gold-states", type=at_least(0), help="first states of the walkthrough (default: 100)")
    parser.add_argument("--threads", type=at_least(1), help="threads of a fast search (default: as in a run)")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="games measured at the same time (default: 1)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the play (default: 0)")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.games = options.games.split(",") if options.games else (QUICK_GAMES if options.quick else GAMES)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if the fast search is not accurate enough, 2 if no game was found."""
    options = parse(arguments)
    paths = {}
    for name in options.games:
        try:
            spec = resolve_game(name)
            if spec.kind != "jericho":
                raise UserError("It is not a Jericho game.")
            paths[spec.name] = spec.story
        except UserError as error:
            print(f"{name} is skipped. {error}", file=sys.stderr)
    if not paths:
        print("bench_env: no game was found (see above).", file=sys.stderr)
        return 2
    return report_games(measure_games(paths, options=options), options=options)


if __name__ == "__main__":
    without_torch()
    sys.exit(main())
