"""Functions that Numba compiles and keeps on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loguru import logger
from numba import njit


def cached_njit(function: Callable[..., Any]) -> Any:
    """Compile a function at its first use, without Python's lock, and keep the result on disk.

    Numba writes next to the module, or to the user's cache folder. If neither is writable, each process compiles.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError as error:  # Numba finds no folder that it may write to
        logger.debug(f"{function.__name__} is compiled in each process ({error})")
        return njit(nogil=True)(function)
