"""Limits that depend on the games of a run: the steps of an episode and the size of the action vocabulary.

``env.max_episode_steps`` and ``env.action_space_size`` are ``auto`` by default. When a run starts,
:func:`resolve_limits` replaces ``auto`` by numbers, which are saved with the run's settings. A resumed run keeps them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from priorzero.envs.games import GameSpec
from priorzero.envs.registry import own_max_moves
from priorzero.settings import AUTO, EnvSettings, steps_by_game, steps_text
from priorzero.types import UserError

MIN_STEPS, MAX_STEPS = 100, 500
Z_MACHINE = ("jericho", "story")  # kinds of games
# For a game of the Z-machine whose walkthrough is not known: the median of the games whose walkthrough is.
UNKNOWN_STEPS = 250
MIN_ACTIONS, JERICHO_ACTIONS, MAX_DEFAULT_ACTIONS = 256, 2048, 4096


def default_steps(walkthrough_length: int) -> int:
    """``env.max_episode_steps=auto`` for a game whose walkthrough has this many commands.

    A quarter more than the walkthrough, rounded up to a multiple of 50, at least 100 and at most 500.

    An agent takes detours, so it needs more commands than the walkthrough. The upper limit is for the beginning of the
    training: random play gains most of its points in the first part of an episode, and a longer episode then adds
    little but time.
    """
    rounded_up = 50 * -(-5 * walkthrough_length // (4 * 50))
    return min(MAX_STEPS, max(MIN_STEPS, rounded_up))


def walkthrough_length(game: GameSpec) -> int | None:
    """Number of commands of the walkthrough that comes with Jericho or TextWorld; None if there is none."""
    commands: list[str] = []
    if game.kind == "textworld":
        data = game.story.with_suffix(".json")
        if data.is_file():  # a missing file is reported when the game is opened
            commands = json.loads(data.read_text(encoding="utf-8")).get("metadata", {}).get("walkthrough", [])
    elif game.kind == "jericho":
        from jericho.defines import BINDINGS_DICT

        text = BINDINGS_DICT.get(game.md5, {}).get("walkthrough", "")
        commands = text.split("/") if text else []
    return len(commands) or None


def episode_steps(env: EnvSettings, game: GameSpec) -> int:
    """The number of commands after which an episode of ``game`` is truncated."""
    setting = env.max_episode_steps
    if isinstance(setting, int):
        return setting
    given = {} if setting == AUTO else steps_by_game(setting)
    if game.name in given:
        return given[game.name]
    if game.request is not None and (own := own_max_moves(game.request)) is not None:
        return min(MAX_STEPS, own)
    length = walkthrough_length(game)
    if length is None:
        return UNKNOWN_STEPS if game.kind in Z_MACHINE else MIN_STEPS
    return default_steps(length)


def check_step_names(env: EnvSettings, games: Sequence[GameSpec]) -> None:
    """Raise a UserError if ``env.max_episode_steps`` names a game that is not among ``games``."""
    given = env.max_episode_steps
    if isinstance(given, int) or given == AUTO:
        return
    names = [game.name for game in games]
    if unknown := steps_by_game(given).keys() - set(names):
        raise UserError(
            f"env.max_episode_steps names {', '.join(sorted(unknown))}, but the games of this run are "
            f"{', '.join(names)}. Correct the name or leave it out."
        )


def resolve_limits(env: EnvSettings, games: Sequence[GameSpec], *, unseen: Sequence[GameSpec] = ()) -> None:
    """Replace ``auto`` in ``env.max_episode_steps`` and ``env.action_space_size``.

    Args:
        env: is changed. The steps are given by game afterwards, as in ``zork1=500, detective=100``, unless they were
            one number for all games.
        games: the games that are trained on.
        unseen: the games that are only evaluated. They may change when a run is resumed, so their ``auto`` is not
            replaced; :func:`episode_steps` computes it.
    """
    if isinstance(env.max_episode_steps, str):
        given = {} if env.max_episode_steps == AUTO else steps_by_game(env.max_episode_steps)
        env.max_episode_steps = steps_text({**given, **{game.name: episode_steps(env, game) for game in games}})
    if env.action_space_size == AUTO:
        env.action_space_size = default_action_space_size(sum(game.kind in Z_MACHINE for game in games))


def default_action_space_size(num_z_machine: int) -> int:
    """``env.action_space_size=auto``: 2048 for each game of the Z-machine, at most 4096; 256 without one.

    The states of Zork I's walkthrough have 457 different valid actions, those of Infidel's 1192. With 2048 entries
    instead of 256, a search takes about 5% longer, and an update of the world model 10%.
    """
    return min(MAX_DEFAULT_ACTIONS, max(MIN_ACTIONS, JERICHO_ACTIONS * num_z_machine))
