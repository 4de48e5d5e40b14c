"""Functions that Numba compiles and keeps on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def cached_njit(function: Callable[..., Any]) -> Any:
    """Compile a function at its first use, without Python's lock, and keep the result on disk.

    Numba writes next to the module, or to the user's cache folder. If neither is writable, each process compiles;
    :func:`compile_now` then says so.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # Numba finds no folder that it may write to
        return njit(nogil=True)(function)


def compile_now(function: Any, *arguments: Any) -> str | None:
    """Call a function of :func:`cached_njit`, so that it is compiled for these types or loaded from disk.

    Returns:
        Why the result is not on disk, so that each process compiles it; None if it is.
    """
    try:
        function(*arguments)
    except OSError as error:  # it is in memory nevertheless
        return str(error)
    return None if function.stats.cache_path else "no folder is writable"
