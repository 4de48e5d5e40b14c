"""The command line: ``python -m priorzero.entry``."""

from __future__ import annotations

import argparse
import gc
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from priorzero.config import (
    PRESETS,
    describe_settings,
    parse_assignments,
    read_config_file,
    resolve_settings,
)
from priorzero.runs.progress import terminal_output
from priorzero.runtime.activity import announced
from priorzero.runtime.command import add_set_argument, program_name, run_command
from priorzero.runtime.paths import shown, user_path
from priorzero.runtime.streams import print_output
from priorzero.settings import RunSettings, Settings
from priorzero.types import UserError

if TYPE_CHECKING:
    from priorzero.runs.checkpoint import Checkpoint

EXAMPLES = """examples:
  python -m priorzero.entry --quick_test                          minutes on a CPU, with a generated game
  python -m priorzero.entry --quick_test --env_id zork1.z5        the same on Zork I (needs the story file)
  python -m priorzero.entry --env_id zork1.z5 --seed 0            full training
  python -m priorzero.entry --quick_test --engine vllm            with vLLM in a process of its own
  python -m priorzero.entry --preset pure_unizero                 UniZero without a language model
  python -m priorzero.entry --quick_test --set llm.micro_batch_size=1 --set search.num_simulations=20

games: a Jericho story file (name or path), or textworld:simple, textworld:coin-collector, textworld:treasure-hunter,
textworld:cooking, each with parameters such as ?seed=7&level=5; textworld:file=PATH; babyai:GoToLocal?seed=1;
gymnasium:ENV_ID; or NAME:LEVEL?KEY=VALUE of a game that an installed package registers (docs/own-games.md)
"""

MIN_ADDRESS_SPACE = 2_000_000 * 1024  # bytes, without a GPU and an LLM

Layers = list[dict[str, dict[str, Any]]]

# Flags that set one setting: the name of the argument to group and key.
FLAGS = {
    "env_id": ("run", "env_id"),
    "seed": ("run", "seed"),
    "max_iter": ("run", "max_iter"),
    "exp_name": ("run", "exp_name"),
    "engine": ("prior", "engine"),
}


class LastValue(argparse.Action):
    """Stores a value, as argparse does by default. If it replaces another one, a warning is shown.

    A second ``--config`` is refused, since the first file would be ignored as a whole.
    """

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, flag: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        if before not in (None, value) and self.dest != "preset":
            if self.dest == "config":
                raise argparse.ArgumentError(self, f"{before} and {value} are given; put all settings into one file")
            print(f"warning: {flag} is given twice; {shown(str(value))} replaces {shown(str(before))}", file=sys.stderr)
        setattr(namespace, self.dest, value)


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("priorzero.entry"),
        description="Train an agent for a text game: UniZero searches from a language model's prior, and both learn.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="DIR|auto",
        help="resume a run: its folder; or auto: the run of the given --env_id, --seed and --exp_name that saved last. "
        "If there is none and a game is given, auto starts a new run",
    )
    return parser


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of all training command lines; :func:`layers_from` reads them."""
    parser.register("action", None, LastValue)  # for arguments without an action
    parser.add_argument("--env_id", help="the game, or several, separated by commas")
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--preset", choices=tuple(PRESETS), help="settings to start from (default: standard)")
    preset.add_argument(
        "--quick_test",
        action="store_const",
        const="quick_test",
        dest="preset",
        help="small models and few steps, to check that everything works; the same as --preset quick_test",
    )
    parser.add_argument("--seed", type=int, help="seed of all random numbers (default 0)")
    parser.add_argument("--max_iter", type=int, help="stop after this many iterations (collect, then learn)")
    parser.add_argument("--exp_name", help="name of the run's folder (default: made from game, seed and time)")
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "transformers"),
        help="prior engine (default: vllm on a GPU, transformers on a CPU)",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings, such as those in configs/")
    add_set_argument(
        parser, help="change a setting; may be given several times and wins over --config. Text is used as it is typed"
    )
    parser.add_argument("--help_config", action="store_true", help="list all settings with defaults and meanings")


def layers_from(
    arguments: argparse.Namespace, *, flags: Mapping[str, tuple[str, str]] = FLAGS
) -> tuple[Layers, Layers]:
    """The layers of settings: preset and file, and those of the command line, which win over them.

    Args:
        arguments: of a parser with :func:`add_common_arguments`.
        flags: as :data:`FLAGS`.

    Raises:
        UserError: the file cannot be read, a flag is malformed, or the command line gives a setting two values.
    """
    base = [PRESETS[arguments.preset or "standard"]]
    if arguments.config is not None:
        base.append(read_config_file(arguments.config))
    assigned = parse_assignments(arguments.assignments)
    given: dict[str, dict[str, Any]] = {}
    for name, (group, key) in flags.items():
        value = getattr(arguments, name)
        if value is None:
            continue
        if value == "":
            raise UserError(f"--{name} '' is empty; leave the flag out, or give a value")
        other = assigned.get(group, {}).get(key, value)
        if other != value:
            raise UserError(f"--{name} {value} and --set {group}.{key}={other} contradict each other; leave one out")
        given.setdefault(group, {})[key] = value
    return base, [assigned, given]


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Flags win over the file, the file over the preset, the preset over the defaults.

    Raises:
        UserError: the settings are invalid.
    """
    base, flags = layers_from(arguments)
    return resolve_settings(*base, *flags)


def resume_from(arguments: argparse.Namespace) -> tuple[Settings, Checkpoint | None]:
    """The settings of a resumed run and its checkpoint; None if a new run starts.

    The run keeps its settings. Flags win over them; :func:`priorzero.runs.resume.check_same_settings` refuses those
    that may not change.

    Raises:
        UserError: there is no such run, or the settings are invalid.
    """
    from priorzero.runs.folder import rename_unsaved  # late, since most runs are not resumed
    from priorzero.runs.resume import check_trusted, find_checkpoint

    base, flags = layers_from(arguments)
    gives_all_settings = arguments.preset is not None or arguments.config is not None
    given = {key for layer in flags for key in layer.get("run", {})}
    # The group run only: whether the others are consistent depends on the run that is found.
    run = resolve_settings(*({"run": layer.get("run", {})} for layer in [*base, *flags])).run
    wanted = {key: getattr(run, key) for key in ("env_id", "seed") if gives_all_settings or key in given}
    checkpoint = find_checkpoint(arguments.resume, output_dir=run.output_dir, exp_name=run.exp_name, wanted=wanted)
    if checkpoint is None:
        where = user_path(run.output_dir, what="run.output_dir=")
        if "env_id" not in wanted:
            raise UserError(f"--resume auto: no run is saved under {where}; name a run's folder, or an --env_id")
        settings = settings_from(arguments)
        print(f"--resume auto: no run is saved under {where}; a new run starts", file=sys.stderr)
        renamed = rename_unsaved(where, run.exp_name)
        if renamed is not None:
            print(f"an unsaved run of this name was renamed to {renamed}", file=sys.stderr)
        return settings, None
    if arguments.resume != "auto":
        _check_same_folder(checkpoint.run_folder, run, given=given)
    if gives_all_settings:
        return settings_from(arguments), checkpoint
    check_trusted(checkpoint, flags)
    return resolve_settings(checkpoint.settings, *flags), checkpoint


def _check_same_folder(folder: Path, run: RunSettings, *, given: set[str]) -> None:
    """Raise UserError if the command line names another folder than that of the resumed run."""
    names = {"exp_name": run.exp_name == folder.name}
    if "output_dir" in given:
        names["output_dir"] = user_path(run.output_dir, what="run.output_dir=").resolve() == folder.parent.resolve()
    wrong = [name for name, is_same in names.items() if name in given and not is_same]
    if wrong:
        raise UserError(
            f"--resume {folder} continues the run in this folder, but run.{wrong[0]}={getattr(run, wrong[0])} names "
            "another one; leave it out, or copy the run's folder and resume the copy"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 if the run is done, or stopped and saved; 2 after an error that the user can correct. A signal
        before the run begins, or after its last checkpoint, ends the process with exit code 130.
    """
    gc.disable()  # until the imports are done: it would search the growing set of modules again and again
    try:
        return run_command_line(build_parser(), argv, train=_train)
    finally:
        gc.enable()


def run_command_line(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, *, train: Callable[[argparse.Namespace], None]
) -> int:
    """Parse the arguments and ``train``; returns the exit code, as :func:`main` describes."""

    def action(arguments: argparse.Namespace) -> None:
        check_interpreter()
        if arguments.help_config:
            print_output(describe_settings())
        else:
            with terminal_output():
                train(arguments)

    return run_command(parser, argv, action)


def check_interpreter() -> None:
    """Raise UserError if the libraries could not be imported, which would fail with unrelated messages."""
    if sys.flags.optimize > 1:
        raise UserError("python -OO removes the docstrings, which transformers needs; type python -O, or python")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < MIN_ADDRESS_SPACE:
        raise UserError(
            f"ulimit -v is {limit // 1024} kB, but the libraries alone need {MIN_ADDRESS_SPACE // 1024} kB of address "
            "space; type ulimit -v unlimited"
        )


def _train(arguments: argparse.Namespace) -> None:
    if arguments.resume is None:
        settings, checkpoint = settings_from(arguments), None
        logger.info(f"starting: {shown(settings.run.env_id)}, seed {settings.run.seed}")
    else:
        logger.info(f"starting: --resume {shown(arguments.resume)}")
        settings, checkpoint = resume_from(arguments)
    from priorzero.preflight import prepare  # late, since --help does not need it

    with prepare(settings, checkpoint=checkpoint) as prepared:
        with announced("loading the libraries"):
            from priorzero.train import run_prepared  # late: imports torch and LightZero, which takes seconds
        gc.enable()
        gc.freeze()  # the modules stay, so later collections need not search them
        run_prepared(prepared)


if __name__ == "__main__":
    sys.exit(main())
