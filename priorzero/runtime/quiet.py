"""Imports of third-party packages without their prints, warnings and log messages."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress output while a third-party package is imported or builds a model. Errors are still raised.

    LightZero prints while it builds a model, gym and DI-engine warn when they are imported, and LightZero's world model
    sets the root logger to DEBUG.
    """
    root = logging.getLogger()
    level = root.level
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        root.setLevel(level)


def quiet_transformers() -> None:
    """Switch off transformers' progress bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
