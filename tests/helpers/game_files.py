"""Where the tests of games find story files and keep the games that they generate."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def story(name: str) -> Path:
    """A story file from ``$PRIORZERO_GAMES``; skips the test if it is not there."""
    folder = os.environ.get("PRIORZERO_GAMES")
    if not folder:
        pytest.skip("PRIORZERO_GAMES is not set: no story files")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"no {name} in PRIORZERO_GAMES={folder}")
    return path


def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for a whole test session: generating a game takes seconds."""
    return tmp_path_factory.getbasetemp() / "cache"
