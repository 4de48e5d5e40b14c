"""The report of a run: ``python -m priorzero.report RUN`` writes ``RUN/report.html``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from priorzero.runs.folder import given_folder
from priorzero.runs.report import write_report
from priorzero.runtime.command import program_name, run_command
from priorzero.runtime.streams import print_output
from priorzero.types import UserError


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("priorzero.report"),
        description="Write report.html into a run's folder: results, learning curve, losses, and the last evaluation "
        "step by step. Every run writes it at its end; this command writes it again, or while the run is going on.",
    )
    parser.add_argument("run", help="the run's folder, such as data_priorzero/NAME")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 2 after an error that the user can correct.
    """
    return run_command(build_parser(), argv, _report)


def _report(arguments: argparse.Namespace) -> None:
    try:
        print_output(str(write_report(given_folder(arguments.run, what="report "))))
    except OSError as error:
        raise UserError(f"{arguments.run}: the report cannot be written ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
