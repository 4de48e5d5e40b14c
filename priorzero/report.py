"""The report of a run: ``python -m priorzero.report RUN`` writes ``RUN/report.html``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from priorzero.runs.folder import given_folder
from priorzero.runs.report import write_report
from priorzero.runtime.streams import print_error, print_output, standard_streams
from priorzero.types import UserError


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.report",
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
    with standard_streams():
        arguments = build_parser().parse_args(argv)
        try:
            print_output(str(write_report(given_folder(arguments.run, what="report "))))
        except UserError as error:
            print_error(str(error))
            return 2
        except OSError as error:
            print_error(f"{arguments.run}: the report cannot be written ({error})")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
