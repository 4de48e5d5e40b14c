"""BabyAI's levels by name: ``babyai:LEVEL?seed=N``."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Unpack

from priorzero.envs.babyai_game import BabyAIGame, check_installed, make_env, reset_env
from priorzero.envs.names import did_you_mean
from priorzero.envs.registry import check_parameters
from priorzero.types import GameArguments, UserError

MAX_SEED = 2**32 - 1
NUM_LAYOUTS = 10  # whose limits of moves are compared if a name has no seed
_ID = re.compile(r"BabyAI-(.+)-v\d+")
_EXAMPLE = "'babyai:GoToLocal?seed=1'"


def make_babyai(level: str, parameters: Mapping[str, str], **arguments: Unpack[GameArguments]) -> BabyAIGame:
    """Open a level; the factory of ``babyai:`` in the registry of games. Raises as :func:`check_level` does."""
    level_id, layout = check_level(level, parameters)
    return BabyAIGame(level_id, layout=layout, **arguments)


def check_level(level: str, parameters: Mapping[str, str]) -> tuple[str, int | None]:
    """minigrid's name of the level, and the seed of its layout; None if no seed is given.

    Raises:
        UserError: minigrid is not installed, the level is unknown, or a parameter is not allowed.
    """
    levels = level_ids()
    if level not in levels:
        given = match[1] if (match := _ID.fullmatch(level)) else level
        raise UserError(
            f"Unknown BabyAI level {level!r}.{did_you_mean(given, levels)} A level is named as in {_EXAMPLE}. minigrid "
            f"has: {', '.join(levels)}"
        )
    check_parameters(parameters, ["seed"])
    if "seed" not in parameters:
        return levels[level], None
    seed = parameters["seed"]
    if not (seed.isascii() and seed.isdigit() and int(seed) <= MAX_SEED):
        raise UserError(f"seed={seed!r} is not allowed. Allowed: a whole number from 0 to {MAX_SEED}.")
    return levels[level], int(seed)


@functools.cache
def level_ids() -> dict[str, str]:
    """The levels by name, in minigrid's order: ``{"GoToLocal": "BabyAI-GoToLocal-v0"}``.

    Raises:
        UserError: minigrid is not installed.
    """
    check_installed()
    import gymnasium
    import minigrid  # noqa: F401  registers the levels

    return {match[1]: name for name in gymnasium.registry if (match := _ID.fullmatch(name))}


def max_moves(level: str, parameters: Mapping[str, str]) -> int:
    """The number of moves after which the level itself truncates an episode.

    It depends on the mission. Without a seed, it is the largest of the first :data:`NUM_LAYOUTS` layouts; see
    :func:`check_level` for errors.
    """
    level_id, layout = check_level(level, parameters)
    env = make_env(level_id)
    limits = []
    for seed in range(NUM_LAYOUTS) if layout is None else [layout]:
        reset_env(env, seed)
        limits.append(int(env.max_steps))
    env.close()
    return max(limits)
