"""Jericho games whose search for valid actions takes long or hangs. Worker processes import this module."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

from priorzero.envs import frotz
from priorzero.envs.frotz import ChunkResult
from priorzero.envs.jericho_game import JerichoGame

PAUSE_S = 0.15
CHUNK_COMMANDS = 16  # small chunks, so that there are many pauses


def make_slow_game(path: Path, *, hangs_at: int | None = None) -> JerichoGame:
    """A game that pauses before each chunk of commands.

    Args:
        path: the story file.
        hangs_at: index of the chunk in which the emulator hangs in C code.
    """
    frotz.MAX_CHUNK_COMMANDS = CHUNK_COMMANDS
    game = JerichoGame(path, seed=0, max_episode_steps=9, look_and_inventory=True, num_threads=1)
    try_in_c = game._env._try_in_c
    count = 0

    def attempt(commands: list[bytes]) -> ChunkResult:
        nonlocal count
        if count == hangs_at:
            ctypes.CDLL(None).sleep(1000)
        count += 1
        time.sleep(PAUSE_S)
        return try_in_c(commands)

    game._env._try_in_c = attempt  # type: ignore[method-assign]
    return game
