"""Story files for tests, and a cache folder for generated games."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from priorzero.envs.games import supported_games


def story(name: str) -> Path:
    """The path of a story file in ``$PRIORZERO_GAMES``. Skips the test if the file does not exist."""
    folder = os.environ.get("PRIORZERO_GAMES")
    if not folder:
        pytest.skip("PRIORZERO_GAMES is not set, so there are no story files")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"there is no {name} in PRIORZERO_GAMES={folder}")
    return path


def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of the whole test session. Tests share it because generating a game takes seconds."""
    return tmp_path_factory.getbasetemp() / "cache"


def supported_stories() -> list[str]:
    """The names of all story files in ``$PRIORZERO_GAMES`` that Jericho supports."""
    supported = supported_games()
    folder = os.environ.get("PRIORZERO_GAMES")
    files = sorted(Path(folder).iterdir()) if folder and Path(folder).is_dir() else []
    return [
        file.name
        for file in files
        if file.name in supported and hashlib.md5(file.read_bytes()).hexdigest() == supported[file.name]
    ]
