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


def total(states: list[Any], find: Callable[[Any], set[str]], *, repeats: int) -> tuple[float, float, list[set[str]]]:
    """Wall seconds and CPU seconds over all states, and what was found in each."""
    wall, found = 0.0, []
    began = time.process_time()
    for state in states:
        wall_s, actions = seconds(lambda state=state: find(state), repeats=repeats)
        wall += wall_s
        found.append(actions)
    return wall, (time.process_time() - began) / repeats, found


def open_ours(path: Path) -> JerichoGame:
    game = JerichoGame(path, seed=0, max_episode_steps=10_000, look_and_inventory=False)
    game.reset()
    game._remembered.clear()
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
    first = open_ours(path)  # loads ours of spaCy where none is there
    our_language = util.spacy_nlp

    def new(state: Any) -> set[str]:
        first._env.set_state(state)
        return set(first._find_valid_actions())

    util.spacy_nlp = spacy.load(SPACY_MODEL)
    env = plain_env(path)
    env.reset()

    def plain(state: Any) -> set[str]:
        env.set_state(state)
        return set(env.get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False))

    repeats = 2 if sample else 1
    plain_s, plain_cpu_s, expected = total(states, plain, repeats=repeats)
    util.spacy_nlp = our_language
    new_s, new_cpu_s, new_found = total(states, new, repeats=repeats)
    for state in states:
        ask(first, state)  # fills memory and file
    memory_s, _, in_memory = total(states, lambda state: ask(first, state), repeats=1)
    fresh = open_ours(path)
    fresh._find_valid_actions = lambda: ("was asked",)  # type: ignore[method-assign]
    disk_s, _, on_disk = total(states, lambda state: ask(fresh, state), repeats=1)

    title = f"{name}, {len(states)} states: valid actions"
    rows = [
        Row(f"{title}, new state", new_s, plain_s, 1.5, new_found == expected),
        Row(f"{title}, seen before (in memory)", memory_s, plain_s, 100, in_memory == expected),
        Row(f"{title}, seen before (on disk, another object)", disk_s, plain_s, 100, on_disk == expected),
    ]
    details = {
        "new_states_per_s": len(states) / new_s,
        "plain_states_per_s": len(states) / plain_s,
        "new_cpu_s": new_cpu_s,
        "plain_cpu_s": plain_cpu_s,
        "threads": first._env._filter_threads,
        "mean_number_of_actions": sum(map(len, expected)) / len(states),
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
