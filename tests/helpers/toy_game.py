"""A small, fast game for tests of the training loop, in place of Jericho and TextWorld."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from priorzero.envs import GameSpec, GameWorker
from priorzero.types import GameState

ROOMS = ("Hall", "Kitchen", "Cellar", "Garden", "Attic")


class ToyGame:
    """Rooms in a circle with a coin in each. Every coin is a point; opening the trapdoor in the cellar loses the game.

    Args:
        name: name of the game, which appears in all texts.
        seed: determines the first room.
        max_episode_steps: the episode is truncated after this many commands.
    """

    def __init__(self, *, name: str, seed: int, max_episode_steps: int) -> None:
        self._name = name
        self._first = seed % len(ROOMS)
        self._max_episode_steps = max_episode_steps

    def reset(self) -> GameState:
        self._room, self._coins, self._moves = self._first, set(range(len(ROOMS))), 0
        return self._state(f"Welcome to {self._name}.", lost=False)

    def step(self, action: str) -> tuple[GameState, float]:
        self._moves += 1
        reward, lost, feedback = 0.0, False, "You wait."
        if action == "take coin":
            self._coins.remove(self._room)
            reward, feedback = 1.0, "Taken."
        elif action in ("go east", "go west"):
            self._room = (self._room + (1 if action == "go east" else -1)) % len(ROOMS)
            feedback = f"You walk to the {ROOMS[self._room]}."
        elif action == "open trapdoor":
            lost, feedback = True, "You fall."
        return self._state(feedback, lost=lost), reward

    def close(self) -> None: ...

    def _state(self, feedback: str, *, lost: bool) -> GameState:
        score = float(len(ROOMS) - len(self._coins))
        ended = lost or not self._coins
        done = ended or self._moves >= self._max_episode_steps
        actions = ["go east", "go west", "wait"]
        if self._room in self._coins:
            actions.append("take coin")
        if ROOMS[self._room] == "Cellar":
            actions.append("open trapdoor")
        return GameState(
            feedback=feedback,
            valid_actions=() if done else tuple(actions),
            score=score,
            max_score=float(len(ROOMS)),
            moves=self._moves,
            done=done,
            won=not self._coins,
            look=f"{ROOMS[self._room]}\nA room of {self._name}.",
            inventory=f"You have {score:g} coins.",
            goal="Find all coins.",
            truncated=done and not ended,
            max_moves=self._max_episode_steps,
        )


class InProcessWorker:
    """A game in this process, with the methods of :class:`GameWorker`."""

    def __init__(self, game: ToyGame) -> None:
        self._game = game

    def launch(self) -> None: ...

    async def start(self) -> None: ...

    async def reset(self) -> GameState:
        return self._game.reset()

    async def step(self, action: str) -> tuple[GameState, float]:
        return self._game.step(action)

    async def restart(self) -> None: ...

    async def close(self) -> None: ...

    def kill(self) -> None: ...


def toy_spec(name: str) -> GameSpec:
    """The toy game with this name."""
    return GameSpec(name, "textworld", Path(name), hashlib.md5(name.encode()).hexdigest(), name)


@contextmanager
def toy_games(*, in_process: bool = True) -> Iterator[None]:
    """Within the block every name in ``run.env_id`` and ``eval.unseen`` is a toy game.

    Args:
        in_process: play in this process; otherwise in worker processes, as real games are.
    """

    def make(spec, *, seed, max_episode_steps, timeout_s, **_):
        arguments = {"name": spec.name, "seed": seed, "max_episode_steps": max_episode_steps}
        if in_process:
            return InProcessWorker(ToyGame(**arguments))
        return GameWorker(ToyGame, arguments, timeout_s=timeout_s, name=spec.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("priorzero.envs.worker.make_worker", make)
        patch.setattr("priorzero.preflight.check_names", lambda names: {n: n for n in names.split(",") if n})
        patch.setattr("priorzero.preflight.resolve_games", lambda names: [toy_spec(n) for n in names.split(",") if n])
        yield
