"""Games that tests register. Worker processes import this module."""

from __future__ import annotations

from priorzero.envs import check_action
from priorzero.types import GameState, UserError

NOT_A_FUNCTION = 3


class CountingGame:
    """Counts up to a number: each ``add one`` is a point, ``stop`` loses."""

    def __init__(self, goal: int, *, max_episode_steps: int) -> None:
        self.goal, self.max_episode_steps = goal, max_episode_steps
        self.now: GameState | None = None

    def reset(self) -> GameState:
        self.now = self.state(0.0, moves=0)
        return self.now

    def step(self, action: str) -> tuple[GameState, float]:
        before = check_action(self.now, action)
        reward = 1.0 if action == "add one" else 0.0
        self.now = self.state(before.score + reward, moves=before.moves + 1, lost=action == "stop")
        return self.now, reward

    def state(self, score: float, *, moves: int, lost: bool = False) -> GameState:
        won = score == self.goal
        truncated = not (won or lost) and moves >= self.max_episode_steps
        done = won or lost or truncated
        return GameState(
            feedback=f"The number is {score:g}.",
            valid_actions=() if done else ("add one", "stop", "wait"),
            score=score,
            max_score=float(self.goal),
            moves=moves,
            done=done,
            won=won,
            truncated=truncated,
            max_moves=self.max_episode_steps,
        )

    def close(self) -> None: ...


def make_counter(level, parameters, *, max_episode_steps, **arguments):
    """``counting:9`` counts up to 9."""
    return CountingGame(int(level or "3"), max_episode_steps=max_episode_steps)


def make_broken(level, parameters, **arguments):
    """Raises an error of a program."""
    return 1 / 0


def make_refusing(level, parameters, **arguments):
    """Raises an error of the user."""
    raise UserError("type another level")
