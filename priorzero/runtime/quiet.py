"""Imports of third-party packages without their prints, warnings and log messages."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator

from loguru import logger


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


@contextlib.contextmanager
def warnings_in_log(what: str) -> Iterator[None]:
    """Log each different Python warning in the block as one line that begins with ``what``.

    peft's warnings that a merge may be wrong are left out, because :mod:`priorzero.llm.merging` checks each merge.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for text in dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught):
                if "This can lead to complications" not in text:
                    logger.warning(f"{what}: {text[:300]}{'...' if text[300:] else ''}")


def quiet_gguf() -> None:
    """Switch off the progress bars of transformers' conversion of GGUF files, which are not its own ones."""
    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils

    modeling_gguf_pytorch_utils.tqdm = functools.partial(tqdm, disable=True)


def quiet_peft() -> None:
    """Ignore peft's warning, at each save, that the biases of an adapter with ``lora_bias`` are vectors."""
    warnings.filterwarnings("ignore", message=r"Adapter .* LoRA tensor\(s\) have invalid shape")
