"""The cache folder of games, and a digest for cache keys."""

from __future__ import annotations

import hashlib
from pathlib import Path

from priorzero.runtime.paths import user_cache_dir


def cache_dir() -> Path:
    """The folder of downloaded and generated games: ``games`` in the user's cache folder."""
    return user_cache_dir() / "games"


def digest(*fields: bytes) -> bytes:
    """A 32-byte hash of a sequence of fields. It depends on where one field ends and the next begins."""
    result = hashlib.blake2b(digest_size=32)
    for field in fields:
        result.update(len(field).to_bytes(8, "big"))
        result.update(field)
    return result.digest()
