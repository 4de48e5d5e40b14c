"""Coins in a corridor: ``--env_id 'example:small?seed=7'``."""

import random

from priorzero.envs import check_action, check_parameters, read_parameter
from priorzero.types import GameState, UserError

LEVELS = {"small": 4, "large": 9}  # number of rooms


class Corridor:
    def __init__(self, num_rooms: int, *, seed: int, max_episode_steps: int) -> None:
        self.num_rooms, self.max_episode_steps = num_rooms, max_episode_steps
        self.coins = random.Random(seed).sample(range(num_rooms), 2)
        self.state: GameState | None = None

    def reset(self) -> GameState:
        self.room, self.left = 0, set(self.coins)
        return self.observe("You enter a corridor.", moves=0)

    def step(self, action: str) -> tuple[GameState, float]:
        before = check_action(self.state, action)  # raises ValueError
        self.left -= {self.room} if action == "take coin" else set()
        self.room += {"go west": -1, "go east": 1}.get(action, 0)
        after = self.observe(f"You {action}.", moves=before.moves + 1)
        return after, after.score - before.score

    def close(self) -> None: ...

    def observe(self, feedback: str, *, moves: int) -> GameState:
        here = {
            "go west": self.room > 0,
            "go east": self.room < self.num_rooms - 1,
            "take coin": self.room in self.left,
        }
        actions, score, won = tuple(filter(here.get, here)), float(2 - len(self.left)), not self.left
        done = won or moves >= self.max_episode_steps
        ends = {"done": done, "won": won, "truncated": done and not won, "max_moves": self.max_episode_steps}
        look = f"Room {self.room}\n{'A coin is here.' if here['take coin'] else 'Nothing is here.'}"
        self.state = GameState(feedback, actions, score, 2.0, moves, look=look, goal="Take all coins.", **ends)
        return self.state


def make(level: str, parameters: dict[str, str], *, max_episode_steps: int, **_: object) -> Corridor:
    if level not in LEVELS:
        raise UserError(f"unknown level {level!r}. Allowed are: {', '.join(LEVELS)}")
    check_parameters(parameters, ["seed"])
    return Corridor(LEVELS[level], seed=read_parameter(parameters, "seed", 0), max_episode_steps=max_episode_steps)
