"""Functions that Numba compiles and keeps on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def cached_njit(function: Callable[..., Any]) -> Any:
    """Compile a function at its first use, without Python's lock, and keep the result on disk.

    Numba writes next to the module, or to the user's cache folder. If neither is writable, each process compiles.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # Numba finds no folder that it may write to
        return njit(nogil=True)(function)
