"""The command line: ``python -m priorzero.entry``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from priorzero.runtime.concurrency import exit_immediately_on_signal
from priorzero.types import UserError

EXAMPLES = """examples:
  python -m priorzero.entry --quick_test                          minutes on a CPU, a game made on the spot
  python -m priorzero.entry --quick_test --env_id zork1.z5        the same on Zork (needs the story file)
  python -m priorzero.entry --env_id zork1.z5 --seed 0            full training
  python -m priorzero.entry --quick_test --engine vllm            with vLLM in a process of its own
  python -m priorzero.entry --config configs/pure_unizero.yaml    UniZero without a language model
  python -m priorzero.entry --quick_test --set llm.micro_batch_size=1 --set search.num_simulations=20

games: a Jericho story file (name or path), or textworld:simple, textworld:coin-collector, textworld:treasure-hunter,
textworld:cooking, each with parameters such as ?seed=7&level=5
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.entry",
        description="Train an agent for a text game: a language model proposes, a world model searches, both learn.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="DIR|auto",
        help="go on with a run: its folder, or auto: the one that saved last, of the given --env_id, --seed and "
        "--exp_name; where there is none yet and a game is given, auto starts a new one",
    )
    return parser


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What every way to train takes; :func:`layers_from` reads it."""
    parser.add_argument("--env_id", help="the game to play")
    parser.add_argument(
        "--quick_test", action="store_true", help="small models and few steps: see that everything works"
    )
    parser.add_argument("--seed", type=int, help="where all randomness comes from (default 0)")
    parser.add_argument("--max_iter", type=int, help="stop after so many iterations (collect, then learn)")
    parser.add_argument("--exp_name", help="name of the run's folder (default: a new one from game, seed and time)")
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "transformers"),
        help="what runs the language model for the prior (default: vllm on a GPU, transformers on a CPU)",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings, such as those in configs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="GROUP.KEY=VALUE",
        help="change one setting; may be given several times and wins over --config",
    )
    parser.add_argument("--help_config", action="store_true", help="list every setting with its default and meaning")


Layers = list[dict[str, dict[str, Any]]]


def layers_from(arguments: argparse.Namespace) -> tuple[Layers, Layers]:
    """What the settings are made of: preset and file, and the flags that win over them."""
    from priorzero.config import PRESETS, parse_assignments, read_config_file

    flags = {
        key: value
        for key in ("env_id", "seed", "max_iter", "exp_name")
        if (value := getattr(arguments, key)) is not None
    }
    if flags.get("exp_name") == "":
        raise UserError("--exp_name '' is empty; leave the flag out to get a new name")
    base = [PRESETS["quick_test" if arguments.quick_test else "standard"]]
    if arguments.config is not None:
        base.append(read_config_file(arguments.config))
    engine = {"prior": {"engine": arguments.engine}} if arguments.engine is not None else {}
    return base, [parse_assignments(arguments.assignments), {"run": flags}, engine]


def settings_from(arguments: argparse.Namespace) -> Any:
    """Flags over file over preset over defaults."""
    from priorzero.config import resolve_settings

    base, flags = layers_from(arguments)
    return resolve_settings(*base, *flags)


def resume_from(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The settings and the checkpoint to go on from; None if a new run begins.

    The run has the settings that it had. Those that are given win; where they matter they must be the same, which
    :func:`priorzero.runs.checkpoint.check_same` sees to.
    """
    from priorzero.config import resolve_settings
    from priorzero.runs.checkpoint import find_checkpoint
    from priorzero.runs.folder import set_unsaved_aside

    base, flags = layers_from(arguments)
    says_all = arguments.quick_test or arguments.config is not None
    given = {key: value for layer in flags for key, value in layer.get("run", {}).items()}
    # The group run alone: whether the rest fits together depends on the run that is found.
    run = resolve_settings(*({"run": layer.get("run", {})} for layer in [*base, *flags])).run
    wanted = {key: run[key] for key in ("env_id", "seed") if says_all or key in given}
    where = run.output_dir
    checkpoint = find_checkpoint(arguments.resume, output_dir=where, exp_name=run.exp_name, wanted=wanted)
    if checkpoint is None:
        if "env_id" not in wanted:
            raise UserError(f"--resume auto: no run is saved under {where}; name a run's folder, or an --env_id")
        settings = settings_from(arguments)
        print(f"--resume auto: nothing is saved under {where} yet; a new run begins", file=sys.stderr)
        aside = set_unsaved_aside(Path(where, run.exp_name)) if run.exp_name else None
        if aside is not None:
            print(f"what a run of this name left that ended before it saved is in {aside}", file=sys.stderr)
        return settings, None
    if says_all:
        return settings_from(arguments), checkpoint
    llm = checkpoint.settings.llm
    if llm.trust_remote_code and not any("trust_remote_code" in layer.get("llm", {}) for layer in flags):
        # A checkpoint may come from anyone, and its configuration with it.
        raise UserError(
            f"{checkpoint.folder}: its configuration runs code that comes with a model ({llm.path}); if you trust "
            "it, type --set llm.trust_remote_code=true"
        )
    follows = {"llm": {"gradient_accumulation_steps": 0}}  # is worked out again, from the micro-batch size
    return resolve_settings(checkpoint.settings, follows, *flags), checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, or stopped and saved; 2 something to put right.

    A signal that comes before the run has begun, or after its last save, ends the process with exit code 130.
    """
    arguments = build_parser().parse_args(argv)
    with exit_immediately_on_signal():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.help_config:
            from priorzero.config import describe_options

            print(describe_options())
            return 0
        if arguments.resume is None:
            settings, checkpoint = settings_from(arguments), None
        else:
            settings, checkpoint = resume_from(arguments)
        from priorzero.train import run_training

        run_training(settings, checkpoint=checkpoint)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
