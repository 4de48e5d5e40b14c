"""Standard streams that are closed, broken or full when a command line is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import os, sys
from priorzero.runtime.streams import print_error, print_output, standard_streams
from priorzero.types import UserError

with standard_streams():
    try:
        if sys.argv[1:] != ["no output"]:
            print_output("output")
    except UserError as error:
        print_error(str(error))
        sys.exit(2)
    print("more")  # not flushed
    with open(os.devnull) as file:
        print_error(f"{file.fileno() > 2}")
    sys.exit(7)
"""


def run_in_shell(redirections):
    """Run the program with redirections of a shell; returns stdout, stderr and the exit code."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" {redirections}', sys.executable, PROGRAM],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout, done.stderr, done.returncode


@pytest.mark.parametrize(
    ("redirections", "result"),
    [
        ("", ("output\nmore\n", "error: True\n", 7)),
        (">&- 2>&- <&-", ("", "", 7)),
        (">&-", ("", "error: True\n", 7)),  # a file that is opened does not get the descriptor 1
        ("2>&-", ("output\nmore\n", "", 7)),
        ("2>/dev/full", ("output\nmore\n", "", 7)),
        ("'no output' >/dev/full", ("", "error: True\n", 7)),
        (">/dev/full", ("", "error: the output cannot be written ([Errno 28] No space left on device)\n", 2)),
    ],
)
def test_standard_streams_keep_the_exit_code(redirections, result):
    assert run_in_shell(redirections) == result


def test_standard_streams_keep_the_exit_code_when_the_reader_of_a_pipe_has_ended():
    assert run_in_shell("| true") == ("", "error: True\n", 7)
