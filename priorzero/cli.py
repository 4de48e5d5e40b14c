"""The command ``priorzero``: one command line in front of the modules that ``python -m`` runs.

This module imports no other module of the package until a command is chosen, so its help appears at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        module: has ``main(argv) -> int``. Shell completion also uses its ``build_parser()``, if it has one.
        purpose: one line of the help.
    """

    module: str
    purpose: str


COMMANDS = {
    "train": Command("priorzero.entry", "train an agent, or resume a run"),
    "evaluate": Command("priorzero.evaluate", "evaluate a run or a checkpoint on any games"),
    "watch": Command("priorzero.watch", "show an episode step by step, or play beside the agent"),
    "report": Command("priorzero.report", "write report.html into a run's folder"),
    "pretrain": Command("priorzero.pretrain", "train the language model on solutions of other games"),
    "export": Command("priorzero.export", "write a run's models as files that other programs can load"),
    "games": Command("priorzero.games", "list the games that are found and those that can be fetched"),
    "doctor": Command("priorzero.doctor", "check whether training can start with these settings"),
    "config": Command("priorzero.config", "list all settings"),
}

EXAMPLES = """examples:
  priorzero doctor                             is everything installed?
  priorzero train --quick_test                 train on a small generated game, on a CPU
  priorzero train --env_id zork1.z5 --seed 0   full training
  priorzero COMMAND --help                     the arguments of a command

priorzero COMMAND is the same as python -m priorzero.COMMAND (train: python -m priorzero.entry).
python -m priorzero.ray_entry trains on a Ray cluster.
"""


def build_parser(*, arguments_of: str = "") -> argparse.ArgumentParser:
    """The parser of the commands. What follows a command is passed on to its module.

    Args:
        arguments_of: a command whose own arguments are added, for shell completion; "" for none.
    """
    parser = argparse.ArgumentParser(
        prog="priorzero",
        description="Agents for text games: a language model's prior guides a UniZero search, and both learn.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        module = importlib.import_module(command.module) if name == arguments_of else None
        parents = [module.build_parser()] if module is not None and hasattr(module, "build_parser") else []
        commands.add_parser(name, help=command.purpose, parents=parents, add_help=False, conflict_handler="resolve")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code of the command; 2 if there is no such command.
    """
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    first, *rest = arguments
    if first in COMMANDS:
        return _run(first, rest)
    if first == "help" and rest and rest[0] in COMMANDS:
        return _run(rest[0], ["--help"])
    if first == "--version":
        print(f"priorzero {importlib.metadata.version('priorzero')}")
        return 0
    if first in ("-h", "--help") or arguments == ["help"]:
        parser.print_help()
        return 0
    if first == "help":  # of something that is no command
        first = rest[0]
    print(f"error: {_unknown(first, arguments)}", file=sys.stderr)
    return 2


def _run(name: str, arguments: Sequence[str]) -> int:
    """Run a command. Returns its exit code."""
    command = importlib.import_module("priorzero.runtime.command")  # late, as the modules of the commands
    with command.called_as(f"priorzero {name}"):
        exit_code: int = importlib.import_module(COMMANDS[name].module).main(arguments)
    return exit_code


def _unknown(first: str, arguments: Sequence[str]) -> str:
    """The message if the first argument is not a command."""
    if first.startswith("-"):
        return f"{first}: the command is missing; to train, type priorzero train {shlex.join(arguments)}"
    close = difflib.get_close_matches(first, COMMANDS, n=1)
    hint = f"did you mean priorzero {close[0]}?" if close else "type priorzero --help"
    return f"{first!r} is not a command; the commands are {', '.join(COMMANDS)}; {hint}"


def _complete() -> None:
    """Answer a shell that asks for completions, by argcomplete, and exit. Without argcomplete, do nothing."""
    if importlib.util.find_spec("argcomplete") is None:
        return
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    command = words[1] if len(words) > 1 and words[1] in COMMANDS else ""
    argcomplete.autocomplete(build_parser(arguments_of=command))


if __name__ == "__main__":
    sys.exit(main())
