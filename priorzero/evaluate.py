"""The evaluation of a trained agent: ``python -m priorzero.evaluate RUN_OR_CHECKPOINT``."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from priorzero.config import parse_assignments
from priorzero.runs.evaluation_table import PROTOCOLS, STANDARD, TALES, result_lines, result_table
from priorzero.runs.progress import terminal_output
from priorzero.runs.saved import find_agent, was_removed
from priorzero.runtime.activity import announced
from priorzero.runtime.command import add_set_argument, check_positive, program_name, run_command
from priorzero.runtime.concurrency import only_run_of_process
from priorzero.runtime.paths import replace_text, shown, user_path
from priorzero.runtime.streams import print_output
from priorzero.settings import EVAL_MODES, MAX_SEED, EvalMode
from priorzero.types import UserError

if TYPE_CHECKING:
    from priorzero.preflight import AgentPreparation

COMMAND = "evaluate "  # how messages begin
EXAMPLES = """examples:
  python -m priorzero.evaluate data_priorzero/NAME                         as the run's own evaluations
  python -m priorzero.evaluate data_priorzero/NAME --episodes 20 --modes world_model_with_prior,prior,random
  python -m priorzero.evaluate data_priorzero/NAME/checkpoints/iteration_500 --games zork1.z5,detective.z5
  python -m priorzero.evaluate data_priorzero/NAME --protocol tales --out results.jsonl
  python -m priorzero.evaluate data_priorzero/NAME --set search.num_simulations=50

A line of JSON for each game and mode goes to the standard output, or into the file of --out. The table goes to the
standard error. docs/evaluation.md explains the modes, the intervals and the protocols.
"""

Layer = Mapping[str, Mapping[str, Any]]


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("priorzero.evaluate"),
        description="Let a trained agent play whole episodes, without exploration and without learning.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("agent", metavar="RUN_OR_CHECKPOINT", help="the folder of a run, or of one of its checkpoints")
    parser.add_argument("--games", metavar="A,B", help="the games, also others than it was trained on (default: its)")
    parser.add_argument(
        "--modes", metavar="A,B", help=f"the agents: {', '.join(EVAL_MODES)} (default: eval.modes of the run)"
    )
    parser.add_argument("--episodes", type=int, metavar="N", help="episodes per game and mode (default: as the run)")
    parser.add_argument("--seed", type=int, help="seed of the games and of sampling (default: that of the run)")
    parser.add_argument(
        "--protocol",
        choices=tuple(PROTOCOLS),
        default=STANDARD,
        help="standard: score at the end of an episode; tales: best score in 100 steps, as in the benchmark TALES",
    )
    parser.add_argument("--out", metavar="FILE", help="write the lines of JSON into this file")
    add_set_argument(parser, help="change a setting of the agent; may be given several times")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 2 after an error that the user can correct.
    """
    return run_command(build_parser(), argv, _evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    out = None if arguments.out is None else _writable(arguments.out)
    flags = _flags(arguments)
    with terminal_output():
        with announced("preparing"):
            prepared = _prepare(arguments, flags)
        with announced("loading the libraries"):
            # Late, since it imports torch and LightZero, which takes seconds.
            from priorzero.saved_agent import agent_errors, evaluate_agent
        if was_removed(prepared.checkpoint):
            prepared = _prepare(arguments, flags)
        settings, checkpoint = prepared.settings, prepared.checkpoint
        with only_run_of_process(), agent_errors(prepared):
            evaluations = asyncio.run(evaluate_agent(prepared, step_limit=PROTOCOLS[arguments.protocol]))
    counters = checkpoint.manifest.get("counters", {})
    about = {
        "checkpoint": str(checkpoint.folder),
        "iteration": counters.get("iteration"),
        "env_step": counters.get("env_step"),
        "protocol": arguments.protocol,
        "seed": settings.run.seed,
    }
    lines = result_lines(evaluations, about=about, protocol=arguments.protocol, seed=settings.run.seed)
    _write(lines, out=out)
    _print_table(lines, protocol=arguments.protocol, seed=settings.run.seed)
    expected = len(prepared.games) * len(settings.eval.modes)
    if len(lines) < expected:
        raise UserError(
            f"{expected - len(lines)} of {expected} evaluations failed, since their games could not be played; the "
            "messages above say why"
        )


# ---- checks, before anything is loaded ----


def _flags(arguments: argparse.Namespace) -> list[Layer]:
    """The settings that the command line gives.

    Raises:
        UserError: a value is not allowed, or a setting is given two values.
    """
    given: dict[str, dict[str, Any]] = {}
    check_positive("--episodes", arguments.episodes)
    if arguments.episodes is not None:
        given["eval"] = {"episodes": arguments.episodes}
    if arguments.seed is not None:
        if not 0 <= arguments.seed <= MAX_SEED:
            raise UserError(f"--seed {arguments.seed}: give a whole number between 0 and {MAX_SEED}")
        given["run"] = {"seed": arguments.seed}
    if arguments.protocol == TALES:
        given["env"] = {"max_episode_steps": PROTOCOLS[TALES]}
    assigned = parse_assignments(arguments.assignments)
    for group, values in given.items():
        for key, value in values.items():
            other = assigned.get(group, {}).get(key, value)
            if other != value:
                flag = "--protocol tales" if group == "env" else f"--{key} {getattr(arguments, key)}"
                raise UserError(f"{flag} and --set {group}.{key}={other} contradict each other; leave one out")
    if assigned.get("run", {}).keys() & {"env_id"} or assigned.get("eval", {}).keys() & {"unseen"}:
        raise UserError("--set run.env_id and --set eval.unseen have no effect here; name the games with --games A,B")
    if "modes" in assigned.get("eval", {}):
        raise UserError("--set eval.modes has no effect here; name the modes with --modes A,B")
    return [assigned, given]


def _modes(text: str) -> list[EvalMode]:
    modes = [cast(EvalMode, mode.strip()) for mode in text.split(",")]
    if not text.strip():
        raise UserError(
            f"--modes is empty; give one or more of {', '.join(EVAL_MODES)}, separated by commas, or leave --modes out "
            "for those of the run"
        )
    unknown = [mode for mode in modes if mode not in EVAL_MODES]
    if unknown:
        raise UserError(
            f"--modes {shown(text)}: {unknown[0]!r} is not a mode; give one or more of {', '.join(EVAL_MODES)}, "
            "separated by commas"
        )
    if len(set(modes)) < len(modes):
        raise UserError(f"--modes {shown(text)} names a mode twice; name each mode once")
    return modes


def _writable(text: str) -> Path:
    """The path of ``--out``, whose folder can be written. An existing file is not changed yet."""
    path = user_path(text, what="--out ")
    if path.exists() and not path.is_file():
        raise UserError(f"--out {shown(text)}: this is not a file; give the name of a file, such as results.jsonl")
    if not path.parent.is_dir():
        raise UserError(f"--out {shown(text)}: there is no folder {path.parent}; create it, or give another file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--out {shown(text)}: cannot be written ({error.strerror}); give another file") from error
    return path


def _prepare(arguments: argparse.Namespace, flags: Sequence[Layer]) -> AgentPreparation:
    """Find the agent, and check its games and modes."""
    from priorzero.preflight import prepare_agent

    if arguments.games is not None and not arguments.games.strip():
        raise UserError("--games is empty; name a game, such as zork1.z5, or leave --games out for those of the run")
    modes = None if arguments.modes is None else _modes(arguments.modes)
    checkpoint = find_agent(arguments.agent, what=COMMAND)
    return prepare_agent(
        checkpoint,
        what=COMMAND,
        games=arguments.games,
        modes=modes or checkpoint.settings.eval.modes,
        overrides=flags,
    )


# ---- output ----


def _write(lines: Sequence[Mapping[str, Any]], *, out: Path | None) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if out is None:
        print_output(text.rstrip("\n"))
        return
    try:
        replace_text(out, text)
    except OSError as error:
        print_output(text.rstrip("\n"))
        raise UserError(f"--out {out}: cannot be written ({error}); the results were printed instead") from error


def _print_table(lines: Sequence[Mapping[str, Any]], *, protocol: str, seed: int) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=140)  # a file has no width
    if lines:
        console.print(result_table(lines, protocol=protocol, seed=seed))


if __name__ == "__main__":
    sys.exit(main())
