"""Opens registered games."""

from __future__ import annotations

from typing import Unpack

from priorzero.envs.protocol import CheckedGame
from priorzero.envs.registry import GameRequest, load_factory
from priorzero.runtime.paths import shown
from priorzero.types import GameArguments, TextGame, UserError


def open_registered_game(request: GameRequest, **arguments: Unpack[GameArguments]) -> TextGame:
    """Open a registered game. Its states are checked as long as it is played.

    Raises:
        UserError: the factory cannot be imported, raises an exception, or returns something else than a game.
    """
    game = call_factory(request, **arguments)
    return CheckedGame(game, name=request.env_id, max_episode_steps=arguments["max_episode_steps"])


def call_factory(request: GameRequest, **arguments: Unpack[GameArguments]) -> TextGame:
    """What the factory of a registered game returns. Raises a UserError if it cannot be imported or raises an error."""
    factory = load_factory(request.game)
    try:
        return factory(request.level, dict(request.parameters), **arguments)
    except UserError as error:
        raise UserError(f"The game {shown(request.env_id)!r}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(
            f"The game {shown(request.env_id)!r}: its factory {request.game.factory!r} raised "
            f"{type(error).__name__}: {error}{location(error)}"
        ) from error


def location(error: BaseException) -> str:
    """Where an exception was raised, for a message: `` (mazes.py, line 12, in make)``; "" if this is not known."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    code = trace.tb_frame.f_code
    return f" ({code.co_filename}, line {trace.tb_lineno}, in {code.co_name})"
