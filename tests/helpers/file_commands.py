"""A Jericho game that accepts every command, and that tries commands which use files."""

from __future__ import annotations

from pathlib import Path

from priorzero.envs.jericho_game import JerichoGame
from priorzero.types import GameState

FILE_COMMANDS = ("save", "pause", "script", "recording on", "restore", "unscript", "recording off", "replay", "#record")


class UncheckedGame(JerichoGame):
    """``step`` accepts every command; a search tries :data:`FILE_COMMANDS` and "wait"."""

    def step(self, action: str) -> tuple[GameState, float]:
        return self.step_unchecked(action)


def open_unchecked_game(path: Path, *, look_and_inventory: bool = True) -> UncheckedGame:
    """Open a game, which a worker process can do, too."""
    game = UncheckedGame(path, seed=0, max_episode_steps=100, look_and_inventory=look_and_inventory)
    game._env.act_gen.generate_actions = lambda objects: ["wait", *FILE_COMMANDS]
    return game
