"""Pretraining of the language model on walkthroughs of other games: ``python -m priorzero.pretrain``."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from priorzero.config import TEXTGAMES_LLM, parse_assignments, read_config_file, resolve_settings
from priorzero.pretraining.plan import PretrainingPlan
from priorzero.runtime.command import add_set_argument, program_name, run_command
from priorzero.runtime.paths import user_cache_dir, user_path
from priorzero.settings import Settings
from priorzero.types import UserError

EXAMPLES = """examples:
  python -m priorzero.pretrain --out my_adapter                               an adapter for SmolLM2-135M-Instruct
  python -m priorzero.pretrain --out my_adapter --minutes 20                  stop after 20 minutes of training
  python -m priorzero.pretrain --out my_adapter --resume                      continue a training that was stopped
  python -m priorzero.pretrain --data DATA --collect_only                     only make the data (an hour on one core)
  python -m priorzero.pretrain --data DATA --out out --config configs/learning_jericho.yaml --set llm.lora_r=16
  python -m priorzero.pretrain --out out --set llm.adapter=my_adapter         train an adapter further

An agent uses the adapter with --set llm.adapter=FOLDER (all parameters: --set llm.path=FOLDER) and the same prompt,
which is in FOLDER/prompt.json (--config takes this file). The training is saved every five minutes and at evaluations.
Ctrl-C ends it at once.
"""

# SmolLM2 with the prompt of the adapter that ships, and how that was trained. A file changes the prompt, --set all
# settings.
PROMPT: dict[str, dict[str, Any]] = {"llm": {**TEXTGAMES_LLM, "adapter": ""}}
LEARNING: dict[str, dict[str, Any]] = {
    "llm": {
        "use_lora": True,
        "lora_r": 6,
        "lora_alpha": 12,
        "learning_rate": 5e-4,
        "batch_size": 16,
        "micro_batch_size": 16,
        "enable_sft": True,
        "enable_rft": False,
        "kl_weight": 0.0,
    }
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("priorzero.pretrain"),
        description="Train the language model on the walkthroughs of text games that agents are not evaluated on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan = PretrainingPlan()
    parser.add_argument("--out", metavar="FOLDER", help="folder of the result; llm.path takes it")
    parser.add_argument("--data", metavar="FOLDER", help="folder of the data (default: in the cache folder)")
    parser.add_argument("--collect_only", action="store_true", help="make the data and stop")
    parser.add_argument("--no_collect", action="store_true", help="use the data as it is; no game is played")
    parser.add_argument(
        "--seconds_per_game", type=float, default=90.0, help="search of valid actions (default: %(default)s)"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the settings of the agent's prompt")
    add_set_argument(parser, help="change a setting; may be given several times and wins over --config")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="the same as --set run.device=")
    parser.add_argument("--seed", type=int, default=0, help="seed of adapters, order and negatives (default: 0)")
    parser.add_argument("--epochs", type=int, default=plan.epochs, help="passes over the data (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop the training after N minutes (default: never)")
    parser.add_argument("--negatives", type=int, default=plan.negatives, help="other actions (default: %(default)s)")
    parser.add_argument(
        "--borrow", type=int, default=plan.borrow, metavar="N",
        help="states without valid actions borrow those of states at most N commands away (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--tokens", choices=("unsearched", "all", "none"), default=plan.tokens,
                        help="decisions whose command is learnt as text (default: %(default)s)")  # fmt: skip
    parser.add_argument("--decay", choices=("cosine", "linear", "none"), default=plan.decay)
    parser.add_argument("--evaluations", type=int, default=plan.evaluations, help="during the training")
    parser.add_argument("--eval_states", type=int, default=plan.eval_states, help="of each game (default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="evaluate on validation games, and do not learn from them")
    parser.add_argument("--games", metavar="A,B", help="learn from these games only")
    parser.add_argument("--workers", type=int, help="processes that render prompts (default: cores - 2, at most 8)")
    parser.add_argument("--resume", action="store_true", help="continue the training in --out from its last save")
    parser.add_argument("--base_model", help="what the adapter names as its base (default: llm.path)")
    parser.add_argument("--save_dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="floating-point type of the adapter's file (default: %(default)s)")  # fmt: skip
    return parser


def settings_from(arguments: argparse.Namespace) -> Settings:
    """``--set`` wins over this module's settings of the training, these over the file, the file over the prompt.

    Raises:
        UserError: the settings are invalid.
    """
    layers = [PROMPT]
    if arguments.config is not None:
        layers.append(read_config_file(arguments.config))
    device = {} if arguments.device is None else {"run": {"device": arguments.device}}
    return resolve_settings(*layers, LEARNING, device, parse_assignments(arguments.assignments))


def plan_from(arguments: argparse.Namespace) -> PretrainingPlan:
    """The plan of the training.

    Raises:
        UserError: a number is not allowed.
    """
    for name, lowest in (
        ("epochs", 1),
        ("minutes", 0),
        ("seconds_per_game", 0),
        ("seed", 0),
        ("workers", 0),
        ("negatives", 1),
        ("borrow", 0),
        ("evaluations", 0),
        ("eval_states", 1),
    ):
        if not lowest <= (getattr(arguments, name) or 0) < math.inf:
            raise UserError(f"--{name} {getattr(arguments, name)}: give a number of at least {lowest}")
    cores = len(os.sched_getaffinity(0))
    return PretrainingPlan(
        epochs=arguments.epochs,
        minutes=arguments.minutes,
        negatives=arguments.negatives,
        borrow=arguments.borrow,
        tokens=arguments.tokens,
        decay=arguments.decay,
        evaluations=arguments.evaluations,
        eval_states=arguments.eval_states,
        seed=arguments.seed,
        num_workers=min(8, max(0, cores - 2)) if arguments.workers is None else arguments.workers,
    )


def _refuse_empty(arguments: argparse.Namespace) -> None:
    """Raise UserError if an argument is an empty text, such as an unset variable of the shell."""
    for name in ("out", "data", "config", "games", "base_model"):
        value = getattr(arguments, name)
        if value is not None and not value.strip(" ,"):
            raise UserError(f"--{name} is empty; give a value, or leave --{name} out")


def _pretrain(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    _refuse_empty(arguments)
    data = user_path(arguments.data, what="--data ") if arguments.data else user_cache_dir() / "pretraining"
    settings, plan = settings_from(arguments), plan_from(arguments)
    if arguments.collect_only and arguments.no_collect:
        raise UserError("--collect_only and --no_collect exclude each other; give one of them")
    if arguments.out is None and not arguments.collect_only:
        raise UserError("--out is missing; give a folder for the result, such as --out my_adapter")
    out = user_path(arguments.out or ".", what="--out ")
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"--out {arguments.out}: {existing} is a file; give another folder")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # prompts are rendered in processes of their own
    from priorzero.pretraining.run import PretrainingRun, make_data, pretrain  # late: imports torch

    if arguments.collect_only:
        make_data(data, seconds_per_game=arguments.seconds_per_game)
        return
    pretrain(
        settings,
        PretrainingRun(
            plan=plan,
            data=data,
            out=out,
            collects=not arguments.no_collect,
            seconds_per_game=arguments.seconds_per_game,
            tune=arguments.tune,
            games=tuple(name.strip() for name in (arguments.games or "").split(",") if name.strip()),
            resume=arguments.resume,
            base_model=arguments.base_model or "",
            save_dtype=arguments.save_dtype,
            command=shlex.join(["python", "-m", "priorzero.pretrain", *argv]),
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 2 after an error that the user can correct.
    """
    given = sys.argv[1:] if argv is None else argv
    return run_command(build_parser(), given, lambda arguments: _pretrain(arguments, given))


if __name__ == "__main__":
    sys.exit(main())
