"""Finding the valid actions of Jericho's games, against Jericho's own way. Takes under a minute.

    python scripts/bench_env.py          # some states of the walkthrough of each game at hand
    python scripts/bench_env.py --all    # all of them

Games: zork1.z5 and detective.z5, those that are found (see PRIORZERO_GAMES in README.md).

Plain is what a straightforward user writes: a ``jericho.FrotzEnv``, spaCy's whole pipeline, and
``get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False)``. One thing is changed in it: it gets
the objects in sight in alphabetical order (some microseconds). In Jericho they come out of a set, and so Python's hash
seed chooses among commands that have the same effect; two plain runs differ. Equal means the same set of commands in
every state. Seconds are wall time, summed over the states, the fastest of two runs of each (of one with ``--all``).

In a new state ours uses two threads where it may use two cores: what it gains there is wall time, not CPU time (printed
below the table), and nothing while other processes keep the cores busy.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.modules["torch"] = None  # type: ignore[assignment]  # as in worker processes: spaCy would import it, for nothing
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from bench_tools import Row, report, seconds

from priorzero.envs.action_cache import CACHE_VARIABLE
from priorzero.envs.frotz import SPACY_MODEL
from priorzero.envs.games import resolve_game
from priorzero.envs.jericho_game import JerichoGame
from priorzero.types import UserError

GAMES = ("zork1.z5", "detective.z5")
SAMPLE = 10  # states of each game


def plain_env(path: Path) -> Any:
    import jericho

    class Ordered(jericho.FrotzEnv):
        def _score_object_names(self, interactive_objs):
            return super()._score_object_names(
                {text: sorted(interactive_objs[text]) for text in sorted(interactive_objs)}
            )

    return Ordered(str(path))


def walkthrough_states(path: Path) -> list[Any]:
    """The state of the machine before each command of Jericho's own solution."""
    env = plain_env(path)
    env.reset()
    states = []
    for command in env.get_walkthrough():
        if env.game_over() or env.victory():
            break
        states.append(env.get_state())
        env.step(command)
    return states


class Stopwatch:
    """Adds up what a way to find valid actions takes, and keeps what it found in each state."""

    def __init__(self, find: Callable[[Any], set[str]]) -> None:
        self.find = find
        self.wall_s = self.cpu_s = 0.0
        self.found: list[set[str]] = []

    def ask(self, state: Any, *, repeats: int) -> None:
        began = time.process_time()
        wall_s, actions = seconds(lambda: self.find(state), repeats=repeats)
        self.cpu_s += (time.process_time() - began) / repeats
        self.wall_s += wall_s
        self.found.append(actions)


def open_ours(path: Path) -> JerichoGame:
    game = JerichoGame(path, seed=0, max_episode_steps=10_000, look_and_inventory=False)
    game.reset()
    game._known_actions.clear()
    return game


def ask(game: JerichoGame, state: Any) -> set[str]:
    game._env.set_state(state)
    return set(game._valid_actions())


def compare(name: str, path: Path, *, sample: int | None, cache: Path) -> tuple[list[Row], dict[str, float]]:
    import spacy

    util = importlib.import_module("jericho.util")
    states = walkthrough_states(path)
    if sample is not None:
        states = states[:: max(1, len(states) // sample)][:sample]

    os.environ[CACHE_VARIABLE] = str(cache)
    game = open_ours(path)  # loads ours of spaCy where none is there
    env = plain_env(path)
    env.reset()
    our_language, whole_language = util.spacy_nlp, spacy.load(SPACY_MODEL)

    def find_plain(state: Any) -> set[str]:
        util.spacy_nlp = whole_language
        env.set_state(state)
        return set(env.get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False))

    def find_new(state: Any) -> set[str]:
        util.spacy_nlp = our_language
        game._env.set_state(state)
        return set(game._find_valid_actions())

    plain, new = Stopwatch(find_plain), Stopwatch(find_new)
    for state in states:  # in turn, so that what else the machine does meets both
        plain.ask(state, repeats=2 if sample else 1)
        new.ask(state, repeats=2 if sample else 1)
    util.spacy_nlp = our_language
    for state, actions in zip(states, new.found, strict=True):  # into memory and file
        game._find_valid_actions = lambda actions=actions: tuple(sorted(actions))  # type: ignore[method-assign]
        ask(game, state)
    fresh = open_ours(path)
    fresh._find_valid_actions = game._find_valid_actions = lambda: ("was asked",)  # type: ignore[method-assign]
    memory, disk = Stopwatch(lambda state: ask(game, state)), Stopwatch(lambda state: ask(fresh, state))
    for state in states:
        memory.ask(state, repeats=1)
        disk.ask(state, repeats=1)

    title = f"{name}, {len(states)} states: valid actions"
    kinds = (("new state", new, 1.5), ("seen before (in memory)", memory, 100), ("seen before (on disk)", disk, 100))
    rows = [
        Row(f"{title}, {kind}", ours.wall_s, plain.wall_s, goal, ours.found == plain.found)
        for kind, ours, goal in kinds
    ]
    details = {
        "new_states_per_s": len(states) / new.wall_s,
        "plain_states_per_s": len(states) / plain.wall_s,
        "new_cpu_s": new.cpu_s,
        "plain_cpu_s": plain.cpu_s,
        "threads": game._env._filter_threads,
        "mean_number_of_actions": sum(map(len, plain.found)) / len(states),
    }
    return rows, details


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every state of the walkthroughs (some minutes)")
    arguments = parser.parse_args()
    paths = {}
    for name in GAMES:
        try:
            paths[name] = resolve_game(name).path
        except UserError as error:
            print(f"{name} is left out. {error}", file=sys.stderr)
    if not paths:
        print("bench_env: none of its games is at hand (see above).", file=sys.stderr)
        return 2
    rows, details = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in paths.items():
            sample = None if arguments.all else SAMPLE
            more, details[name] = compare(name, path, sample=sample, cache=Path(folder) / "valid_actions.sqlite3")
            rows += more
    code = report("env", rows, games=details)
    for name, figures in details.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures.items()))
    return code


if __name__ == "__main__":
    sys.exit(main())
