"""Opens registered games."""

from __future__ import annotations

from typing import Unpack

from priorzero.envs.protocol import CheckedGame
from priorzero.envs.registry import GameRequest, load_factory
from priorzero.runtime.paths import shown
from priorzero.types import GameArguments, TextGame, UserError


def open_registered_game(request: GameRequest, **arguments: Unpack[GameArguments]) -> TextGame:
    """Call the factory of a registered game. The game's states are checked as long as it is played.

    Raises:
        UserError: the factory cannot be imported, raises an exception, or returns something else than a game.
    """
    factory = load_factory(request.game)
    try:
        game = factory(request.level, dict(request.parameters), **arguments)
    except UserError as error:
        raise UserError(f"The game {shown(request.env_id)!r}: {error}") from error
    except Exception as error:
        raise UserError(
            f"The game {shown(request.env_id)!r}: its factory {request.game.factory!r} raised "
            f"{type(error).__name__}: {error}{location(error)}"
        ) from error
    return CheckedGame(game, name=request.env_id, max_episode_steps=arguments["max_episode_steps"])


def location(error: BaseException) -> str:
    """Where an exception was raised, for a message: `` (mazes.py, line 12, in make)``; "" if this is not known."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    code = trace.tb_frame.f_code
    return f" ({code.co_filename}, line {trace.tb_lineno}, in {code.co_name})"
