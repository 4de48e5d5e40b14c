"""Reads the files of JSON lines that a run writes: its episodes and its evaluations. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priorzero.types import UserError

FIRST_EVALUATION_SEED = 10_000  # seeds of games: collection counts from run.seed, evaluation from run.seed + this
EVALUATION_KEYS = ("env_step", "mode", "game", "returns", "scores", "wins", "max_score")


@dataclass(frozen=True)
class Result:
    """The evaluation of one mode at one time, over all games.

    Attributes:
        mode: the evaluated mode.
        unseen: on the games of ``eval.unseen``.
        env_step: environment steps of the run at that time.
        mean_return, mean_score: means over all episodes.
        max_score: the largest possible score, mean over the games; 0 if a game does not say.
        wins: number of episodes that ended with a win.
        num_episodes: number of episodes.
    """

    mode: str
    unseen: bool
    env_step: int
    mean_return: float
    mean_score: float
    max_score: float
    wins: int
    num_episodes: int


def read_lines(path: Path, *, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file; [] if it does not exist. A last line without an end is left out."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    found = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):  # what follows the last line's end is unfinished
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: is not valid JSON ({error}); remove the line") from error
        if not isinstance(entry, dict) or any(key not in entry for key in keys):
            raise UserError(f"{path}, line {number}: lacks one of {', '.join(keys)}; the file is not from a run")
        found.append(entry)
    return found


def results_from(lines: Sequence[Mapping[str, Any]]) -> list[Result]:
    """One result for each evaluation and mode, over its games. A later evaluation at the same time wins."""
    groups: dict[tuple[int, str, bool], dict[str, Mapping[str, Any]]] = {}
    for line in lines:
        key = line["env_step"], line["mode"], line.get("unseen", False)
        groups.setdefault(key, {})[line["game"]] = line
    results = []
    for (env_step, mode, unseen), of_games in groups.items():
        scores = [value for line in of_games.values() for value in line["scores"]]
        returns = [value for line in of_games.values() for value in line["returns"]]
        maxima = [line["max_score"] for line in of_games.values()]
        results.append(
            Result(
                mode=mode,
                unseen=unseen,
                env_step=env_step,
                mean_return=sum(returns) / len(returns),
                mean_score=sum(scores) / len(scores),
                max_score=sum(maxima) / len(maxima) if all(maxima) else 0.0,
                wins=sum(line["wins"] for line in of_games.values()),
                num_episodes=len(scores),
            )
        )
    return results
