"""Standard streams that are closed, broken or full."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from priorzero.types import UserError


@contextmanager
def standard_streams() -> Iterator[None]:
    """Within the block, stdin, stdout and stderr exist, also if the process was started without them (``>&-``).

    Otherwise the next files that are opened would get their descriptors, and would receive what C libraries print. At
    the end, what cannot be written any more is dropped: after the terminal or the reader of a pipe has ended, Python
    would exit with code 120.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", encoding="utf-8", closefd=False))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            _flush_or_drop(stream)


def _flush_or_drop(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError:
        _drop_output(stream)


def _drop_output(stream: TextIO) -> None:
    """Drop what the stream holds and what is written to it from now on."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
    stream.flush()


def print_output(text: str) -> None:
    """Write ``text`` to stdout. A reader that has read enough, such as ``head``, may close it.

    Raises:
        UserError: stdout cannot be written.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _drop_output(sys.stdout)
    except OSError as error:
        raise UserError(f"the output cannot be written ({error})") from error


def print_error(message: str) -> None:
    """Write ``error: message`` to stderr, if it can be written."""
    with suppress(OSError):
        print(f"error: {message}", file=sys.stderr, flush=True)
