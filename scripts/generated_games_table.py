"""Writes docs/generated-games-table.md: levels of TextWorld and BabyAI, and the scores of a random agent on them.

    python scripts/generated_games_table.py                               # all levels: half an hour
    python scripts/generated_games_table.py --families cooking,babyai     # some of them

A random agent plays 50 episodes of each level: each valid action has the same probability. This is what the mode
``random`` of an evaluation does, without loading any model. The levels of TextWorld have the seed 0. BabyAI's are named
without a seed, and the episodes have the layouts 0 to 49.

The results are kept in bench_results/generated_games_table.json. A level that was measured before with the same
arguments is not measured again (--fresh does), so a run that was stopped can be continued.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_tools import RESULTS, ROOT, at_least, exit_code, names_from, write_json

from priorzero.envs.games import GameSpec, make_game, resolve_game
from priorzero.envs.limits import episode_steps, walkthrough_length
from priorzero.settings import EnvSettings
from priorzero.types import TextGame, UserError

PAGE = ROOT / "docs" / "generated-games-table.md"
RESULT_FILE = RESULTS / "generated_games_table.json"
HEADER = ("level", "`--env_id`", "maximum", "solution", "steps", "K mean", "random score", "won at random")

COOKING = "split=train&open=1"
# By family, and by the name that the papers use.
LEVELS: dict[str, dict[str, str]] = {
    "coin-collector": {
        "easy, level 5": "textworld:coin-collector?level=5",
        "easy, level 10": "textworld:coin-collector?level=10",
        "easy, level 20": "textworld:coin-collector?level=20",
        "medium, level 5": "textworld:coin-collector?level=105",
        "medium, level 10": "textworld:coin-collector?level=110",
        "medium, level 20": "textworld:coin-collector?level=120",
        "hard, level 5": "textworld:coin-collector?level=205",
        "hard, level 10": "textworld:coin-collector?level=210",
        "hard, level 20": "textworld:coin-collector?level=220",
    },
    "treasure-hunter": {
        f"{mode}, level {level}": f"textworld:treasure-hunter?level={level}"
        for mode, levels in (("easy", (1, 5, 10)), ("medium", (11, 15, 20)), ("hard", (21, 25, 30)))
        for level in levels
    },
    "cooking": {
        "GATA level 1": f"textworld:cooking?recipe=1&take=1&cut=1&{COOKING}",
        "GATA level 2": f"textworld:cooking?recipe=1&take=1&cut=1&cook=1&{COOKING}",
        "GATA level 3": f"textworld:cooking?recipe=1&take=1&go=9&{COOKING}",
        "GATA level 4": f"textworld:cooking?recipe=3&take=3&cut=1&cook=1&go=6&{COOKING}",
        "largest of FTWP": f"textworld:cooking?recipe=3&take=3&cut=1&cook=1&drop=1&go=12&{COOKING}",
    },
    "babyai": {
        level: f"babyai:{level}"
        for level in ("GoToRedBallNoDists", "GoToObj", "GoToRedBall", "GoToLocal", "PickupLoc", "PutNextLocal")
    },
}  # fmt: skip


@dataclass(frozen=True)
class Played:
    """What the random agent did.

    Attributes:
        max_score: the largest possible score.
        scores: the score of each episode.
        wins: number of episodes that were won.
        mean_actions: number of valid actions of a state (K), the mean over all decisions.
        seconds: time for all episodes.
    """

    max_score: float
    scores: list[float]
    wins: int
    mean_actions: float
    seconds: float


def play(spec: GameSpec, *, episodes: int, drop_inert_commands: bool) -> Played:
    """Let the random agent play ``episodes`` episodes."""
    started = time.perf_counter()
    rng = np.random.default_rng(0)
    scores: list[float] = []
    counts: list[int] = []
    wins = 0
    game: TextGame | None = None
    steps = episode_steps(EnvSettings(), spec)
    for episode in range(episodes):
        if game is None or spec.request is not None:  # a game of BabyAI has one layout
            game = make_game(
                spec,
                seed=episode,
                max_episode_steps=steps,
                look_and_inventory=False,
                drop_inert_commands=drop_inert_commands,
                valid_actions="exact",
            )
        state = game.reset()
        while not state.done:
            counts.append(len(state.valid_actions))
            state, _ = game.step(state.valid_actions[rng.integers(len(state.valid_actions))])
        scores.append(state.score)
        wins += state.won
        if spec.request is not None or episode == episodes - 1:
            game.close()
    return Played(state.max_score, scores, wins, float(np.mean(counts)), time.perf_counter() - started)


def row(name: str, env_id: str, played: Played | None) -> list[str]:
    """The cells of a level; ``played`` is None if it was not measured."""
    if played is None:
        return [name, f"`{env_id}`", *["-"] * (len(HEADER) - 2)]
    spec = resolve_game(env_id)
    solution = walkthrough_length(spec) if spec.kind == "textworld" else None
    return [
        name,
        f"`{env_id}`",
        f"{played.max_score:g}",
        str(solution or "-"),
        str(episode_steps(EnvSettings(), spec)),
        f"{played.mean_actions:.1f}",
        f"{np.mean(played.scores):.2f} ± {np.std(played.scores):.2f}",
        f"{played.wins} of {len(played.scores)}",
    ]


def page(results: dict[str, Any], *, episodes: int, date: str) -> str:
    """``docs/generated-games-table.md``."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("textworld", "minigrid"))
    lines = [
        "# Generated games: levels and random scores",
        "",
        "This page is generated by `python scripts/generated_games_table.py`.",
        f"Measured on {date} with {versions}. [games.md](games.md) explains the names.",
        "",
        "- **maximum**: the largest score.",
        "- **solution**: number of commands of TextWorld's own solution.",
        "- **steps**: `env.max_episode_steps` by default.",
        "- **K mean**: number of valid actions of a state, the mean over the states that the random agent met.",
        f"- **random score**: mean and standard deviation over {episodes} episodes of an agent that takes each valid "
        "action",
        "  with the same probability.",
        "- Cooking games were measured with `env.drop_inert_commands=false`, the others with the default.",
        "- TextWorld: one game for each level, with the seed 0. BabyAI: another layout in each episode.",
    ]
    for family, levels in LEVELS.items():
        lines += ["", f"## {family}", "", "| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
        for name, env_id in levels.items():
            found = results.get(env_id)
            lines.append("| " + " | ".join(row(name, env_id, Played(**found["played"]) if found else None)) + " |")
    return "\n".join(lines) + "\n"


def load_results(file: Path) -> dict[str, Any]:
    """The results of earlier runs, by ``env_id``.

    Raises:
        UserError: the file cannot be read.
    """
    if not file.exists():
        return {}
    try:
        loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return loaded
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); remove it") from error


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Write docs/generated-games-table.md: levels of TextWorld and BabyAI, and random scores."
    )
    parser.add_argument("--families", metavar="A,B", help=f"measure these only (of {', '.join(LEVELS)}; default: all)")
    parser.add_argument(
        "--episodes", type=at_least(1), default=50, metavar="N", help="episodes for each level (default: 50)"
    )
    parser.add_argument("--fresh", action="store_true", help="measure levels again that were measured before")
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE", help="the page")
    parser.add_argument("--results", type=Path, default=RESULT_FILE, metavar="FILE", help="the results as JSON")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure and write the page.

    Raises:
        UserError: an argument is wrong, or a game cannot be made.
    """
    families = names_from(options.families, list(LEVELS), flag="--families") if options.families else list(LEVELS)
    results = load_results(options.results)
    for family in families:
        for name, env_id in LEVELS[family].items():
            spec = resolve_game(env_id)
            key = {"md5": spec.md5, "episodes": options.episodes, "steps": episode_steps(EnvSettings(), spec)}
            known = results.get(env_id, {})
            if options.fresh or known.get("key") != key:
                played = play(spec, episodes=options.episodes, drop_inert_commands=family != "cooking")
                results[env_id] = {"key": key, "played": asdict(played)}
                write_json(options.results, results)
                print(f"{family}, {name}: {np.mean(played.scores):.2f}, {played.seconds:.0f} s", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    options.out.write_text(page(results, episodes=options.episodes, date=date), encoding="utf-8")
    print(f"written to {options.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error that the user can correct."""
    return exit_code(run, parse(arguments))


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # as in worker processes; spaCy would import it
    sys.exit(main())
