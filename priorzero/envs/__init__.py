"""Text games by name. ``make_game`` opens a game in this process, ``make_worker`` in a worker process."""

from priorzero.envs.conformance import check_game
from priorzero.envs.games import GameSpec, check_max_score, check_names, make_game, resolve_game, resolve_games
from priorzero.envs.registry import check_parameters, read_parameter, register_game, registered_games
from priorzero.envs.validation import check_action
from priorzero.envs.worker import GameWorker, make_worker, make_workers, try_registered_games

__all__ = [
    "GameSpec",
    "GameWorker",
    "check_action",
    "check_game",
    "check_max_score",
    "check_names",
    "check_parameters",
    "make_game",
    "make_worker",
    "make_workers",
    "read_parameter",
    "register_game",
    "registered_games",
    "resolve_game",
    "resolve_games",
    "try_registered_games",
]
