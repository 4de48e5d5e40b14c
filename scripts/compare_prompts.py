"""Compare prompts by the rank of the correct command in the language model's prior, in games with a known solution.

    python scripts/compare_prompts.py                             # about ten minutes on two cores
    python scripts/compare_prompts.py --llm FOLDER --goals detailed --prompts walkthrough,question

The prior is computed in every state of the solutions of generated games, with each prompt and each kind of goal. The
history in a prompt is the solution up to the state. For each prompt and goal the script prints the mean rank of the
correct command (1 is the most probable command; commands of equal probability share the mean of their ranks), how often
its rank is 1, its mean log-probability (in nats), the number of tokens of the prompt, and the seconds for each state.
The row "chance" is a uniform prior.

The script writes OUT/prompts.json after each row. Rows of earlier calls with the same LLM, games and settings are kept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_tools import RESULTS, ROOT, exit_code, make_folder, names_from, print_table, write_json
from walkthroughs import WalkthroughState, compute_priors, correct_logprobs, walkthrough_states

from priorzero.config import read_config_file, resolve_settings
from priorzero.envs import resolve_game
from priorzero.llm.engines import PriorBuilder
from priorzero.llm.models import LanguageModel, choose_device, load_language_model
from priorzero.llm.prompts import prompt_style
from priorzero.settings import Settings
from priorzero.types import ActionPrior, PromptTooLongError, UserError

QUESTION = {
    "prompt_layout": "transcript", "history": "all", "history_length": 20, "history_chars": 0,
    "show_observation": True, "observation_chars": 200, "list_commands": False,
}  # fmt: skip
WALKTHROUGH = QUESTION | {"prompt_layout": "walkthrough", "history": "loop_free", "show_observation": False}
# prompt -> settings of the group llm, in addition to --config
PROMPTS: dict[str, dict[str, Any]] = {
    "question": QUESTION,
    "question_short": QUESTION | {"history_length": 3},
    "question_answers": QUESTION | {"history_length": 5, "history_chars": 300, "observation_chars": 0},
    "question_no_observation": QUESTION | {"show_observation": False},
    "question_commands": QUESTION | {"list_commands": True},
    "walkthrough": WALKTHROUGH,
    "walkthrough_observation": WALKTHROUGH | {"show_observation": True},
    "walkthrough_commands": WALKTHROUGH | {"list_commands": True},
}
GOALS = ("detailed", "brief", "none")


def rank_figures(states: Sequence[WalkthroughState], priors: Sequence[ActionPrior]) -> dict[str, float]:
    """Mean rank of the correct command, how often it is 1, and its mean log-probability."""
    correct = correct_logprobs(states, priors)
    better = np.array([np.sum(prior.logprobs > own) for own, prior in zip(correct, priors, strict=True)])
    equal = np.array([np.sum(prior.logprobs == own) for own, prior in zip(correct, priors, strict=True)])
    rank = better + (equal + 1) / 2
    return {"rank": float(rank.mean()), "first": float(np.mean(rank == 1)), "log-prob": float(correct.mean())}


def chance_figures(states: Sequence[WalkthroughState]) -> dict[str, float]:
    """The same figures for a uniform prior, as means over all orders of the commands."""
    counts = np.array([len(state.request.valid_actions) for state in states])
    return {
        "rank": float((counts + 1).mean() / 2),
        "first": float((1 / counts).mean()),
        "log-prob": float(-np.log(counts).mean()),
    }


def make_builder(llm: LanguageModel, settings: Settings) -> PriorBuilder:
    """Builds the priors with one prompt."""
    return PriorBuilder(llm, prompt_style(settings), temperature=settings.prior.temperature)


def measure(llm: LanguageModel, settings: Settings, states: Sequence[WalkthroughState]) -> dict[str, float]:
    """All figures of one prompt."""
    builder = make_builder(llm, settings)
    started = time.perf_counter()
    priors = compute_priors(builder, states)
    spent = time.perf_counter() - started
    tokens = [len(builder.row(state.request).prompt_ids) for state in states]
    return {**rank_figures(states, priors), "tokens": float(np.mean(tokens)), "s/state": spent / len(states)}


def check_length(llm: LanguageModel, settings: Settings, states: Sequence[WalkthroughState], *, name: str) -> None:
    """Check that the prompts fit into the model. The prior of a prompt that does not fit would be uniform.

    Raises:
        UserError: a prompt does not fit.
    """
    builder = make_builder(llm, settings)
    try:
        for state in states:
            builder.row(state.request)
    except PromptTooLongError as error:
        raise UserError(
            f"--prompts {name}: {error}; leave this prompt out, or give a --prompt_max_len below "
            f"{settings.llm.prompt_max_len}"
        ) from error


def read_rows(file: Path, arguments: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The rows that an earlier call with the same arguments has written.

    Raises:
        UserError: the arguments were different, or the file cannot be read.
    """
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
        if {key: found.get(key) for key in arguments} == arguments:
            return dict(found["rows"])
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: was not written by this script ({error}); give another --out") from error
    raise UserError(f"{file}: contains figures of another LLM, other games or other settings; give another --out")


def check_games(games: Sequence[str]) -> None:
    """Raises UserError if a game is not one of textworld:simple without a goal."""
    for game in games:
        if not game.startswith("textworld:simple?") or "goal=" in game:
            raise UserError(
                f"--games {game}: must be games of textworld:simple without a goal, such as textworld:simple?seed=101"
            )
        resolve_game(game)


def run(options: argparse.Namespace) -> None:
    """Compare the prompts, print the table and write the file.

    Raises:
        UserError: an argument is not allowed, or the LLM cannot be loaded.
    """
    goals = names_from(options.goals, GOALS, flag="--goals")
    names = names_from(options.prompts, list(PROMPTS), flag="--prompts")
    games = options.games.split(",")
    check_games(games)
    base = read_config_file(options.config)
    llm_layer = {"prompt_max_len": options.prompt_max_len} | ({} if options.llm is None else {"path": options.llm})
    settings = {
        name: resolve_settings(base, {"prior": {"mode": "score"}, "llm": PROMPTS[name] | llm_layer}) for name in names
    }
    first = settings[names[0]]
    make_folder(options.out)
    arguments = {"llm": first.llm.path, "games": games, "prompt_max_len": options.prompt_max_len}
    file = options.out / "prompts.json"
    rows = read_rows(file, arguments)
    llm = load_language_model(first.llm, device=choose_device(first.run.device))
    states: dict[tuple[str, str], list[WalkthroughState]] = {}
    for goal in goals:
        for name in names:
            style = prompt_style(settings[name])
            states[goal, name] = [
                state
                for game in games
                for state in walkthrough_states(f"{game}&goal={goal}", style=style, tokenizer=llm.tokenizer)
            ]
            check_length(llm, settings[name], states[goal, name], name=name)
    for (goal, name), own in states.items():
        rows[f"{goal}: chance"] = chance_figures(own) | {"tokens": 0.0, "s/state": 0.0}
        rows[f"{goal}: {name}"] = measure(llm, settings[name], own)
        print(f"{goal}, {name}: done")
        write_json(file, {**arguments, "states": len(own), "rows": rows})
    print_table("the correct command", rows)
    print(f"written to {file}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error that the user can correct."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "learning_textworld.yaml", metavar="FILE")
    parser.add_argument("--llm", metavar="PATH", help="llm.path (default: that of --config)")
    parser.add_argument("--prompt_max_len", type=int, default=2048, help="llm.prompt_max_len (default: %(default)s)")
    parser.add_argument("--prompts", default=",".join(PROMPTS), help="some of %(default)s")
    parser.add_argument("--goals", default=",".join(GOALS), help="some of %(default)s")
    parser.add_argument(
        "--games",
        default=",".join(f"textworld:simple?seed={seed}" for seed in (101, 102, 103)),
        help="generated games (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="folder of the JSON file")
    return exit_code(run, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
