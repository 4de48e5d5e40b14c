"""Comparing the files of a folder before and after an operation."""

from __future__ import annotations

import hashlib
from pathlib import Path


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """The files in a folder and its subfolders: path to (time of the last change in ns, MD5 of the contents)."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.md5(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
