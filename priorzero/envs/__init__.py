"""Text games by name. ``make_game`` opens a game in this process, ``make_worker`` in a worker process."""

from priorzero.envs.games import GameSpec, check_max_score, check_names, make_game, resolve_game, resolve_games
from priorzero.envs.worker import GameWorker, make_worker, make_workers

__all__ = [
    "GameSpec",
    "GameWorker",
    "check_max_score",
    "check_names",
    "make_game",
    "make_worker",
    "make_workers",
    "resolve_game",
    "resolve_games",
]
