"""Coins in a corridor: ``--env_id 'example:small?seed=7'``. An example of a game for PriorZero."""

import random

from priorzero.envs import check_action, check_parameters, read_parameter
from priorzero.types import GameState, UserError

LEVELS = {"small": (3, 2), "large": (8, 4)}  # rooms, coins


class Corridor:
    def __init__(self, *, rooms: int, coins: int, seed: int, max_episode_steps: int) -> None:
        self.rooms, self.coins, self.max_steps = rooms, coins, max_episode_steps
        self.places = random.Random(seed).sample(range(rooms), coins)
        self.state: GameState | None = None

    def reset(self) -> GameState:
        self.room, self.left = 0, set(self.places)
        return self.observe("You enter a corridor.", moves=0)

    def step(self, action: str) -> tuple[GameState, float]:
        before = check_action(self.state, action)  # raises ValueError
        if action == "take coin":
            self.left.remove(self.room)
        else:
            self.room += 1 if action == "go east" else -1
        after = self.observe("Taken." if action == "take coin" else "You walk on.", moves=before.moves + 1)
        return after, after.score - before.score

    def close(self) -> None: ...

    def observe(self, feedback: str, *, moves: int) -> GameState:
        possible = {
            "go west": self.room > 0,
            "go east": self.room < self.rooms - 1,
            "take coin": self.room in self.left,
        }
        won, done = not self.left, not self.left or moves >= self.max_steps
        self.state = GameState(
            feedback=feedback,
            valid_actions=() if done else tuple(action for action, is_valid in possible.items() if is_valid),
            score=self.coins - len(self.left),
            max_score=self.coins,
            moves=moves,
            done=done,
            won=won,
            truncated=done and not won,
            look=f"Room {self.room}\n{'A coin is here.' if possible['take coin'] else 'Nothing is here.'}",
            goal="Take all coins.",
            max_moves=self.max_steps,
        )
        return self.state


def make(level: str, parameters: dict[str, str], *, max_episode_steps: int, **_: object) -> Corridor:
    if level not in LEVELS:
        raise UserError(f"unknown level {level!r}. Allowed are: {', '.join(LEVELS)}")
    check_parameters(parameters, ["seed"])
    rooms, coins = LEVELS[level]
    seed = read_parameter(parameters, "seed", 0)
    return Corridor(rooms=rooms, coins=coins, seed=seed, max_episode_steps=max_episode_steps)
