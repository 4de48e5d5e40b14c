"""Time to find the valid actions of Jericho games, compared with Jericho's own function. Takes less than a minute.

    python scripts/bench_env.py          # 10 states from the walkthrough of each game
    python scripts/bench_env.py --all    # all states of the walkthroughs (some minutes)

Games: zork1.z5 and detective.z5. Games that are not found are skipped (see PRIORZERO_GAMES in README.md).

Reference: ``jericho.FrotzEnv`` with spaCy's complete pipeline and ``get_valid_actions(use_object_tree=True,
use_ctypes=True, use_parallel=False)``. There is one change: the visible objects are sorted. Jericho reads them from a
set, so Python's hash seed would decide which of several commands with the same effect it returns.

The results are equal if both find the same set of commands in every state. Times are wall times, summed over the
states; each is the shorter of two runs (of one run with ``--all``).

For a new state the package uses two threads if two cores are available. This reduces the wall time, but not the CPU
time, which is printed below the table.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_tools import Row, report, seconds

from priorzero.envs.action_cache import CACHE_VARIABLE
from priorzero.envs.frotz import SPACY_MODEL, EmulatorState
from priorzero.envs.games import resolve_game
from priorzero.envs.jericho_game import JerichoGame
from priorzero.types import UserError

GAMES = ("zork1.z5", "detective.z5")
NUM_STATES = 10  # states of each game without --all


def reference_env(path: Path) -> Any:
    """Jericho's environment, with the visible objects in sorted order."""
    import jericho

    class SortedObjects(jericho.FrotzEnv):
        def _score_object_names(self, interactive_objs):
            return super()._score_object_names(
                {text: sorted(interactive_objs[text]) for text in sorted(interactive_objs)}
            )

    return SortedObjects(str(path))


def walkthrough_states(path: Path) -> list[Any]:
    """The state of the emulator before each command of Jericho's walkthrough."""
    env = reference_env(path)
    env.reset()
    states = []
    for command in env.get_walkthrough():
        if env.game_over() or env.victory():
            break
        states.append(env.get_state())
        env.step(command)
    return states


class Measurement:
    """The valid actions that a function finds in each state, and the total time.

    Args:
        find: returns the valid actions of a state.
    """

    def __init__(self, find: Callable[[Any], set[str]]) -> None:
        self._find = find
        self.wall_s = self.cpu_s = 0.0
        self.found: list[set[str]] = []

    def add(self, state: Any, *, repeats: int = 1) -> None:
        """Measure one state."""
        began = time.process_time()
        wall_s, actions = seconds(lambda: self._find(state), repeats=repeats)
        self.cpu_s += (time.process_time() - began) / repeats
        self.wall_s += wall_s
        self.found.append(actions)


def open_game(path: Path) -> JerichoGame:
    """The package's game, with an empty cache in memory."""
    game = JerichoGame(path, seed=0, max_episode_steps=10_000, look_and_inventory=False)
    game.reset()
    game._known_actions.clear()
    return game


def cached_actions(game: JerichoGame, state: Any) -> set[str]:
    """The valid actions of a state through the caches of a game."""
    game._env.set_state(state)
    return set(game._valid_actions(game._env.full_state()))


def measure_new_states(game: JerichoGame, path: Path, states: Sequence[Any], *, repeats: int) -> tuple[Any, Any]:
    """The measurements of the reference and of the package without its caches."""
    import spacy

    util = importlib.import_module("jericho.util")
    env = reference_env(path)
    env.reset()
    package_pipeline, complete_pipeline = util.spacy_nlp, spacy.load(SPACY_MODEL)

    def find_reference(state: Any) -> set[str]:
        util.spacy_nlp = complete_pipeline
        env.set_state(state)
        return set(env.get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False))

    def find_ours(state: Any) -> set[str]:
        util.spacy_nlp = package_pipeline
        return set(game._env.find_actions(EmulatorState(state, b"")))  # without the child process, to measure CPU time

    reference, ours = Measurement(find_reference), Measurement(find_ours)
    for state in states:  # alternately, so that other load on the machine affects both
        reference.add(state, repeats=repeats)
        ours.add(state, repeats=repeats)
    util.spacy_nlp = package_pipeline
    return reference, ours


def measure_caches(
    game: JerichoGame, path: Path, states: Sequence[Any], found: Sequence[set[str]]
) -> tuple[Measurement, Measurement]:
    """The measurements of the caches in memory and on disk, after ``found`` was stored in them."""
    for state, actions in zip(states, found, strict=True):
        game._probe.find_actions = lambda _, actions=actions: tuple(sorted(actions))
        cached_actions(game, state)
    other_game = open_game(path)  # shares only the cache on disk
    game._probe.find_actions = other_game._probe.find_actions = lambda _: ("not cached",)
    memory = Measurement(lambda state: cached_actions(game, state))
    disk = Measurement(lambda state: cached_actions(other_game, state))
    for state in states:
        memory.add(state)
        disk.add(state)
    return memory, disk


def compare(name: str, path: Path, *, num_states: int | None, cache: Path) -> tuple[list[Row], dict[str, float]]:
    """The comparisons for one game, and further figures."""
    states = walkthrough_states(path)
    if num_states is not None:
        states = states[:: max(1, len(states) // num_states)][:num_states]
    os.environ[CACHE_VARIABLE] = str(cache)
    game = open_game(path)
    reference, new = measure_new_states(game, path, states, repeats=1 if num_states is None else 2)
    memory, disk = measure_caches(game, path, states, new.found)
    title = f"{name}, {len(states)} states: valid actions"
    kinds = (("new state", new, 1.5), ("known state (in memory)", memory, 100), ("known state (on disk)", disk, 100))
    rows = [
        Row(f"{title}, {kind}", ours.wall_s, reference.wall_s, goal, ours.found == reference.found)
        for kind, ours, goal in kinds
    ]
    figures = {
        "new_states_per_s": len(states) / new.wall_s,
        "reference_states_per_s": len(states) / reference.wall_s,
        "new_cpu_s": new.cpu_s,
        "reference_cpu_s": reference.cpu_s,
        "threads": game._env._filter_threads,
        "mean_number_of_actions": sum(map(len, reference.found)) / len(states),
    }
    return rows, figures


def main() -> int:
    """Returns the exit code: 0 if all results are equal, 1 if some differ, 2 if no game was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="use all states of the walkthroughs (some minutes)")
    arguments = parser.parse_args()
    sys.modules["torch"] = None  # as in worker processes; otherwise spaCy imports it without need
    paths = {}
    for name in GAMES:
        try:
            paths[name] = resolve_game(name).path
        except UserError as error:
            print(f"{name} is skipped. {error}", file=sys.stderr)
    if not paths:
        print("bench_env: no game was found (see above).", file=sys.stderr)
        return 2
    num_states = None if arguments.all else NUM_STATES
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in paths.items():
            own, figures[name] = compare(name, path, num_states=num_states, cache=Path(folder) / "actions.sqlite3")
            rows += own
    code = report("env", rows, games=figures)
    for name, values in figures.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in values.items()))
    return code


if __name__ == "__main__":
    sys.exit(main())
