"""Writes docs/games-table.md: the games that Jericho supports, and what was measured where the story file is found.

    python scripts/games_table.py --states 0                        # walkthroughs only: seconds
    python scripts/games_table.py --states 10                       # and valid actions: up to an hour
    python scripts/games_table.py --states 10 --games zork1.z5      # valid actions of one game

Jericho's walkthrough of each game is played with the seed 0. Room and inventory are not observed, and valid actions are
not searched. It is played a second time to search the valid actions of some of its states, without the cache on disk.

The results are kept in bench_results/games_table.json. Valid actions that were searched before with the same arguments
are not searched again (--fresh searches them), so a run that was stopped can be continued. --states 0 keeps them, too.
Everything in the table except for the seconds is reproducible.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_tools import RESULTS, ROOT, at_least, exit_code, names_from, write_json

from priorzero.envs.action_cache import CACHE_VARIABLE
from priorzero.envs.games import GameSpec, resolve_game, supported_games
from priorzero.envs.jericho_game import JerichoGame
from priorzero.envs.limits import default_action_space_size, episode_steps, walkthrough_length
from priorzero.settings import EnvSettings
from priorzero.types import UserError

PAGE = ROOT / "docs" / "games-table.md"
RESULT_FILE = RESULTS / "games_table.json"
HEADER = ("story file", "maximum", "walkthrough", "score", "won", "steps", "K mean", "K max", "seconds", "remarks")

# Oddities that a walkthrough does not show. Each was checked by running the game.
NOTES = {
    **dict.fromkeys(
        ("ballyhoo.z3", "plundered.z3", "seastalker.z3", "sherlock.z5"),
        "in many states a tried command halts the emulator, and Jericho does not try those after it",
    ),
    "afflicted.z8": "more points than the maximum are possible: 105 were reached with further `note` commands",
    "hollywood.z3": "`look` crashes the emulator in four places of the walkthrough",
    "sherbet.z5": "Jericho has no walkthrough",
}


@dataclass(frozen=True)
class Replay:
    """What the walkthrough of a game does.

    Attributes:
        max_score: Jericho's maximum.
        first_score: the score before the first command.
        score: the score after the last command.
        commands: number of commands that were played. The walkthrough may have more, if the game ends before.
        ended: the game has ended.
        won: it counts as won.
        keys: number of commands that are read as keys.
        losses: number of commands that lose points.
    """

    max_score: int
    first_score: int
    score: int
    commands: int
    ended: bool
    won: bool
    keys: int
    losses: int


@dataclass(frozen=True)
class Sample:
    """The valid actions of some states of a walkthrough.

    Attributes:
        counts: number of valid actions of each state (K). It is 0 where Jericho finds none.
        seconds: mean time of a search.
        crashed: a command that was only tried has crashed the emulator, and was left out.
    """

    counts: list[int]
    seconds: float
    crashed: bool


# ---- measuring ----


def open_game(spec: GameSpec, *, valid_actions: str | None) -> JerichoGame:
    """The game with the seed of its walkthrough.

    Raises:
        UserError: this version cannot search in the way ``valid_actions``.
    """
    mode: dict[str, Any] = {} if valid_actions is None else {"valid_actions": valid_actions}
    try:
        return JerichoGame(spec.story, seed=0, max_episode_steps=10_000, look_and_inventory=False, **mode)
    except (TypeError, ValueError) as error:
        if valid_actions is None:
            raise
        raise UserError(f"--valid_actions {valid_actions}: {error}; leave it out, or give exact or fast") from error


def replay(game: JerichoGame) -> Replay:
    """Play the walkthrough without searching valid actions."""
    game._valid_actions = lambda state: ("wait",)
    state = first = game.reset()
    keys = losses = 0
    for command in game.walkthrough():
        if state.done:
            break
        keys += game._env.waits_for_key()
        state, reward = game.step_unchecked(command)
        losses += reward < 0
    return Replay(
        max_score=int(state.max_score),
        first_score=int(first.score),
        score=int(state.score),
        commands=state.moves,
        ended=state.done,
        won=state.won,
        keys=keys,
        losses=losses,
    )


def positions(num_states: int, *, count: int) -> list[int]:
    """At most ``count`` numbers below ``num_states``, evenly spread: the middles of equal parts."""
    count = min(count, num_states)
    return [num_states * (2 * part + 1) // (2 * count) for part in range(count)]


def sample(game: JerichoGame, *, count: int, commands: int) -> Sample:
    """Search the valid actions of ``count`` states, evenly spread over the ``commands`` commands of the walkthrough."""
    find, wanted, counts, times = game._valid_actions, set(positions(commands, count=count)), list[int](), list[float]()
    position = 0
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]

    def search(state: Any) -> tuple[str, ...]:
        if position == 0:
            find(state)  # warm-up: the first search starts a process
        if position not in wanted:
            return ("wait",)
        game._known_actions.clear()
        started = time.perf_counter()
        actions = find(state)
        times.append(time.perf_counter() - started)
        counts.append(len(actions))
        return actions

    game._valid_actions = search
    probe_log = logging.getLogger("priorzero.envs.probe")
    probe_log.addHandler(handler)
    try:
        game.reset()
        for position, command in enumerate(game.walkthrough()[: commands - 1], start=1):  # noqa: B007
            game.step_unchecked(command)
    finally:
        probe_log.removeHandler(handler)
    return Sample(counts, sum(times) / len(times), crashed=any("crashed" in message for message in messages))


def measure(spec: GameSpec, before: dict[str, Any], *, parameters: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """The :class:`Replay` and the :class:`Sample` of a game, as dictionaries, and the parameters of the sample.

    Args:
        spec: the game.
        before: the result of an earlier call, or an empty dictionary. Its sample is kept if ``parameters`` has no
            states, or if they are the same and ``fresh`` is False.
        parameters: ``states``, ``valid_actions``, and what else a sample depends on.
        fresh: see above.
    """
    if walkthrough_length(spec) is None:
        return {}
    game = open_game(spec, valid_actions=None)
    played = replay(game)
    game.close()
    result = {**before, "replay": dataclasses.asdict(played)}
    if parameters["states"] and (fresh or before.get("parameters") != parameters):
        game = open_game(spec, valid_actions=parameters["valid_actions"])
        try:
            found = sample(game, count=parameters["states"], commands=played.commands)
        finally:
            game.close()
        result |= {"sample": dataclasses.asdict(found), "parameters": parameters}
    return result


# ---- the page ----


def counted(number: int, noun: str) -> str:
    """``1 point``, ``2 points``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def remarks(name: str, played: Replay | None, found: Sample | None, *, steps: int) -> str:
    """What is odd about a game. ``steps`` is ``env.max_episode_steps`` by default."""
    texts = []
    if played is not None:
        if played.commands > steps:
            texts.append("the walkthrough is longer than the default steps")
        if played.first_score:
            texts.append(f"begins with {counted(played.first_score, 'point')}")
        if not played.ended:
            texts.append("does not end with its walkthrough")
        elif not played.won:
            texts.append("its end does not count as won")
        if played.keys:
            texts.append(f"waits for a key at {counted(played.keys, 'command')}")
        if played.losses:
            texts.append(f"loses points at {counted(played.losses, 'command')}")
    if found is not None:
        if missing := found.counts.count(0):
            texts.append(f"no valid action in {missing} of {len(found.counts)} states")
        if found.crashed:
            texts.append("a tried command crashes the emulator")
    if name in NOTES:
        texts.append(NOTES[name])
    return "; ".join(texts)


def row(name: str, spec: GameSpec | None, result: dict[str, Any]) -> list[str]:
    """The cells of a game. ``spec`` is None if there is no story file."""
    known = spec or GameSpec(name, "jericho", Path(name), supported_games()[name], Path(name).stem)
    played = Replay(**result["replay"]) if result.get("replay") else None
    found = Sample(**result["sample"]) if result.get("sample") else None
    steps = episode_steps(EnvSettings(), known)
    cells = [f"`{name}`", "-", str(walkthrough_length(known) or "-"), "-", "-", str(steps)]
    if played is not None:
        score = str(played.score) if played.score >= played.max_score else f"**{played.score}**"
        cells[1], cells[3], cells[4] = str(played.max_score), score, "yes" if played.won else "**no**"
    if found is None:
        cells += ["-"] * 3
    else:
        mean = sum(found.counts) / len(found.counts)
        cells += [f"{mean:.1f}", str(max(found.counts)), f"{found.seconds:.2g}"]
    texts = [remarks(name, played, found, steps=steps), "" if spec else "not measured: no story file"]
    return [*cells, "; ".join(filter(None, texts))]


def page(results: dict[str, dict[str, Any]], specs: dict[str, GameSpec], *, command: str, date: str) -> str:
    """``docs/games-table.md``."""
    rows = [row(name, specs.get(name), results.get(name, {})) for name in sorted(supported_games())]
    sampled = {len(result["sample"]["counts"]) for result in results.values() if result.get("sample")}
    lines = [
        "# Games that Jericho supports",
        "",
        f"This page is generated by `{command}`.",
        f"Measured on {date} with {len(os.sched_getaffinity(0))} cores and Jericho "
        f"{importlib.metadata.version('jericho')}. Story files of {len(specs)} of the {len(rows)} games were found.",
        "",
        "- **maximum**: the largest score, from Jericho.",
        "- **walkthrough**: number of commands of Jericho's walkthrough.",
        "- **score**, **won**: after the walkthrough, played with the seed 0. Bold: less than the maximum, or not won.",
        "- **steps**: `env.max_episode_steps` by default. `env.action_space_size` is by default "
        f"{default_action_space_size(1)} for all of these games.",
        f"- **K**: number of valid actions of a state, in {max(sampled, default=0)} states that are spread evenly over "
        "the walkthrough.",
        "- **seconds**: mean time to find the valid actions of a state that is not in the cache.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]
    return "\n".join(lines) + "\n"


# ---- command line ----


def found_games() -> dict[str, GameSpec]:
    """The supported games whose story file is found.

    Raises:
        UserError: there is none.
    """
    specs: dict[str, GameSpec] = {}
    for name in sorted(supported_games()):
        try:
            specs[name] = resolve_game(name)
        except UserError:
            continue  # the page says that there is no story file
    if not specs:
        raise UserError(
            "no story file of a supported game was found; set PRIORZERO_GAMES to their folder, or type "
            "python scripts/fetch_games.py --all"
        )
    return specs


def load_results(file: Path) -> dict[str, dict[str, Any]]:
    """The results of earlier runs, by game.

    Raises:
        UserError: the file cannot be read.
    """
    if not file.exists():
        return {}
    try:
        loaded: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        return loaded
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); remove it") from error


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Write docs/games-table.md: the games that Jericho supports, and what was measured."
    )
    parser.add_argument("--games", metavar="A,B", help="search valid actions in these story files only (default: all)")
    parser.add_argument(
        "--states", type=at_least(0), default=10, metavar="N", help="states per game for K and seconds (default: 10)"
    )
    parser.add_argument(
        "--valid_actions", metavar="MODE", help="how they are searched, as env.valid_actions (default: the game's own)"
    )
    parser.add_argument("--fresh", action="store_true", help="search valid actions again that were searched before")
    parser.add_argument(
        "--out", type=Path, default=PAGE, metavar="FILE", help="the page (default: docs/games-table.md)"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULT_FILE, metavar="FILE", help="default: bench_results/games_table.json"
    )
    return parser.parse_args(arguments)


def command_line(options: argparse.Namespace) -> str:
    """The command that makes the same page, without paths."""
    words = ["python scripts/games_table.py", f"--states {options.states}"]
    if options.valid_actions is not None:
        words.append(f"--valid_actions {options.valid_actions}")
    return " ".join(words)


def run(options: argparse.Namespace) -> None:
    """Measure and write the page.

    Raises:
        UserError: an argument is wrong, or no story file was found.
    """
    os.environ[CACHE_VARIABLE] = "off"
    specs = found_games()
    names = names_from(options.games, list(specs), flag="--games") if options.games else list(specs)
    results = load_results(options.results)
    parameters = {
        "states": options.states,
        "valid_actions": options.valid_actions,
        "jericho": importlib.metadata.version("jericho"),
    }
    for number, (name, spec) in enumerate(specs.items(), start=1):
        started = time.perf_counter()
        own = parameters if name in names else parameters | {"states": 0}
        results[name] = measure(spec, results.get(name, {}), parameters=own, fresh=options.fresh)
        write_json(options.results, results)
        print(f"{number} of {len(specs)}: {name}, {time.perf_counter() - started:.1f} s", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    options.out.write_text(page(results, specs, command=command_line(options), date=date), encoding="utf-8")
    print(f"written to {options.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error that the user can correct."""
    return exit_code(run, parse(arguments))


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # as in worker processes; spaCy would import it
    sys.exit(main())
