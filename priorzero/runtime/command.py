"""What the command lines have in common."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

from priorzero.runtime.concurrency import exit_immediately_on_signal
from priorzero.runtime.streams import print_error, standard_streams
from priorzero.types import UserError

_program: ContextVar[str] = ContextVar("program", default="")


@contextlib.contextmanager
def called_as(program: str) -> Iterator[None]:
    """Within this block, usage messages begin with ``program``, such as ``priorzero games``."""
    token = _program.set(program)
    try:
        yield
    finally:
        _program.reset(token)


def program_name(module: str) -> str:
    """What the user typed to run ``module``: ``python -m MODULE``, or the name given by :func:`called_as`."""
    return _program.get() or f"python -m {module}"


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    action: Callable[[argparse.Namespace], int | None],
) -> int:
    """Parse the arguments and call ``action`` with them. A stop signal ends the process with exit code 130.

    Args:
        parser: of the command line.
        argv: the arguments; None for those of the process.
        action: does the work. It may return an exit code.

    Returns:
        The exit code: that of ``action``; 0 if it returns None; 2 after an error that the user can correct.
    """
    with standard_streams(), exit_immediately_on_signal():
        arguments = parser.parse_args(argv)
        try:
            return action(arguments) or 0
        except UserError as error:
            print_error(str(error))
            return 2


def add_set_argument(parser: argparse.ArgumentParser, *, help: str) -> None:
    """Add ``--set GROUP.KEY=VALUE``; :func:`priorzero.config.parse_assignments` reads ``assignments``."""
    parser.add_argument("--set", action="append", default=[], dest="assignments", metavar="GROUP.KEY=VALUE", help=help)


def check_positive(flag: str, value: int | None) -> None:
    """Raise UserError if the value of a flag such as ``--episodes`` was given and is less than 1."""
    if value is not None and value < 1:
        raise UserError(f"{flag} {value}: give a whole number of at least 1")
