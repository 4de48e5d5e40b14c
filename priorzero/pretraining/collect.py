"""Makes the data: a file of walkthrough steps for each game, in a folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from loguru import logger

from priorzero.envs.games import resolve_game
from priorzero.envs.walkthrough_steps import write_steps
from priorzero.pretraining.games import PretrainingGame, Split
from priorzero.types import UserError

HELD_OUT_STATES = 30
SECONDS_PER_GAME = 90.0


def collect(
    games: Sequence[PretrainingGame],
    folder: Path,
    *,
    seconds_per_game: float = SECONDS_PER_GAME,
    num_threads: int | None = None,
    require_all: bool = False,
) -> None:
    """Write the walkthrough steps of each game to ``folder``, which has a folder for each split.

    Games whose file exists are not played again. Games whose story file is not found and games that TextWorld cannot
    generate are left out, unless all are required.

    Args:
        games: the games.
        folder: is created.
        seconds_per_game: time for the search of valid actions in a game that is learnt from.
        num_threads: of the search.
        require_all: no game may be missing.

    Raises:
        UserError: a required game is missing, or the folder cannot be written to.
    """
    from priorzero.envs.walkthroughs import collect_walkthrough  # late: imports Jericho, which reading needs not

    missing = []
    for number, game in enumerate(games, start=1):
        try:
            spec = resolve_game(game.env_id)
        except UserError as error:
            if require_all:
                raise
            missing.append(game.env_id)
            logger.debug(f"{game.env_id} is left out: {error}")
            continue
        file = data_file(folder, game.split, spec.name)
        if file.exists():
            continue
        started = time.monotonic()
        is_held_out = game.split == "held_out"
        steps = collect_walkthrough(
            spec,
            max_states=HELD_OUT_STATES if is_held_out else None,
            seconds=None if is_held_out else seconds_per_game,
            num_threads=num_threads,
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        write_steps(file, steps)
        searched = sum(step.valid_actions is not None for step in steps)
        correct = sum(step.correct is not None for step in steps)
        logger.info(
            f"{number} of {len(games)}: {spec.name} ({game.split}), {len(steps)} commands; {searched} states with "
            f"valid actions, which contain the command in {correct}; {time.monotonic() - started:.0f} s"
        )
    if missing:
        logger.warning(
            f"{len(missing)} games are left out, because their story file is not found or TextWorld cannot generate "
            f"them: {', '.join(missing)}"
        )


def data_file(folder: Path, split: Split, name: str) -> Path:
    """The file of a game."""
    return folder / split / f"{name}.jsonl"
