"""Text games: found or made by name, played in this process (``make_game``) or in their own (``make_worker``)."""

from priorzero.envs.games import GameSpec, make_game, resolve_game, resolve_games
from priorzero.envs.worker import GameWorker, make_worker

__all__ = ["GameSpec", "GameWorker", "make_game", "make_worker", "resolve_game", "resolve_games"]
