"""What all command lines have in common: exit codes, errors, signals, ``--set``."""

from __future__ import annotations

import argparse
import importlib
import inspect
import signal

import pytest

from priorzero.cli import COMMANDS
from priorzero.runtime.command import add_set_argument, check_positive, run_command
from priorzero.types import UserError


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_run_command_returns_the_exit_code_of_its_action(returned, code):
    assert run_command(argparse.ArgumentParser(), [], lambda _: returned) == code


def test_run_command_reports_an_error_of_the_user(capsys):
    def fail(arguments):
        raise UserError(f"{arguments.name}: type another name")

    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    assert run_command(parser, ["zork"], fail) == 2
    assert capsys.readouterr().err == "error: zork: type another name\n"


def test_run_command_handles_stop_signals_within_its_action_only():
    before, during = signal.getsignal(signal.SIGINT), []
    run_command(argparse.ArgumentParser(), [], lambda _: during.append(signal.getsignal(signal.SIGINT)))
    assert during != [before] and signal.getsignal(signal.SIGINT) == before


def test_add_set_argument_collects_assignments():
    parser = argparse.ArgumentParser()
    add_set_argument(parser, help="change a setting")
    assert parser.parse_args([]).assignments == []
    assert parser.parse_args(["--set", "a.b=1", "--set", "c.d=2"]).assignments == ["a.b=1", "c.d=2"]


def test_check_positive_names_the_flag_and_what_is_allowed():
    check_positive("--episodes", None)
    check_positive("--episodes", 1)
    with pytest.raises(UserError, match=r"--episodes 0: give a whole number of at least 1"):
        check_positive("--episodes", 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_command_lines_share_their_error_handling(name):
    source = inspect.getsource(importlib.import_module(COMMANDS[name].module))
    assert "run_command" in source and "print_error" not in source and "standard_streams" not in source
