"""Games that tests register. Worker processes import this module."""

from __future__ import annotations

import dataclasses
import os
import signal

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


def make_crashing(level, parameters, **arguments):
    """Crashes as C code may."""
    os.kill(os.getpid(), signal.SIGSEGV)


def make_exiting(level, parameters, **arguments):
    """Ends the process as a program may."""
    raise SystemExit(3)


def make_nothing(level, parameters, **arguments):
    """Returns no game."""


class EndlessGame(CountingGame):
    """Ignores the limit of steps, and has no end."""

    def state(self, score, *, moves, lost=False):
        state = super().state(score, moves=0)
        return dataclasses.replace(state, moves=moves, max_score=0.0, max_moves=0)


def make_endless(level, parameters, **arguments):
    """A game that never ends."""
    return EndlessGame(10**6, max_episode_steps=10**6)


class TextScoreGame(CountingGame):
    """Its score is a text from the command ``first`` on."""

    def __init__(self, goal, *, max_episode_steps, first):
        super().__init__(goal, max_episode_steps=max_episode_steps)
        self.first = first

    def state(self, score, *, moves, lost=False):
        state = super().state(score, moves=moves, lost=lost)
        return dataclasses.replace(state, score=f"{score:g}") if moves >= self.first else state

    def step(self, action):
        before = check_action(self.now, action)
        self.now = self.state(float(before.score), moves=before.moves + 1)
        return self.now, 0.0


def make_wrong_from_the_start(level, parameters, *, max_episode_steps, **arguments):
    """The first state is wrong."""
    return TextScoreGame(9, max_episode_steps=max_episode_steps, first=0)


def make_wrong_later(level, parameters, *, max_episode_steps, **arguments):
    """The state after the third command is wrong."""
    return TextScoreGame(9, max_episode_steps=max_episode_steps, first=3)


def make_different_each_time(level, parameters, *, max_episode_steps, **arguments):
    """Each game object has another goal."""
    make_different_each_time.count = getattr(make_different_each_time, "count", 4) + 1
    return CountingGame(make_different_each_time.count, max_episode_steps=max_episode_steps)


class AcceptingGame(CountingGame):
    """Takes every command."""

    def step(self, action):
        return super().step(action if action in self.now.valid_actions else "wait")


def make_accepting(level, parameters, *, max_episode_steps, **arguments):
    """A game that refuses no command."""
    return AcceptingGame(5, max_episode_steps=max_episode_steps)
