"""Which prompt a language model can use: where it puts the right command, in states of games whose solution is known.

    python scripts/compare_prompts.py                             # some ten minutes on two cores
    python scripts/compare_prompts.py --llm FOLDER --goals detailed --prompts walkthrough,question

In every state along the solutions of generated games the LLM is asked for its prior over the valid commands, with each
prompt and each goal; the prompt holds the solution's own past. Prints, for each, the mean place of the right command
(1 is the favourite; equals share the mean of their places), how often it is first, its mean log-probability (nats),
tokens of prompt, and seconds a state. The row "chance" is a prior that is the same for all commands. Writes
OUT/prompts.json after each row; rows of earlier calls with the same LLM, games and settings stay.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from bench_tools import RESULTS, exit_code, make_folder, print_table
from compare_llm_losses import Question, priors, questions_of

from priorzero.config import read_config_file, resolve_settings
from priorzero.envs import resolve_game
from priorzero.llm.engines import PriorBuilder
from priorzero.llm.models import LanguageModel, choose_device, load_language_model
from priorzero.llm.prompts import prompt_style
from priorzero.types import ActionPrior, PromptTooLongError, UserError

QUESTION = {
    "prompt_layout": "transcript", "history": "all", "history_length": 20, "history_chars": 0,
    "show_observation": True, "observation_chars": 200, "list_commands": False,
}  # fmt: skip
WALKTHROUGH = QUESTION | {"prompt_layout": "walkthrough", "history": "direct", "show_observation": False}
# prompt -> the group llm of the settings, on top of --config
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
GOALS = "detailed", "brief", "none"


def figures(questions: Sequence[Question], answers: Sequence[ActionPrior]) -> dict[str, float]:
    """Where the right commands stand."""
    right = np.array([answer.logprobs[q.right] for q, answer in zip(questions, answers, strict=True)])
    above = np.array([np.sum(answer.logprobs > logprob) for logprob, answer in zip(right, answers, strict=True)])
    equal = np.array([np.sum(answer.logprobs == logprob) for logprob, answer in zip(right, answers, strict=True)])
    place = above + (equal + 1) / 2
    return {"place": float(place.mean()), "first": float(np.mean(place == 1)), "log-prob": float(right.mean())}


def chance(questions: Sequence[Question]) -> dict[str, float]:
    """The same of a prior that knows nothing; its place is the mean over all orders."""
    counts = np.array([len(question.request.valid_actions) for question in questions])
    return {
        "place": float((counts + 1).mean() / 2),
        "first": float((1 / counts).mean()),
        "log-prob": float(-np.log(counts).mean()),
    }


def questions_on(llm: LanguageModel, settings: Any, *, games: Sequence[str]) -> list[Question]:
    """One prompt's questions, in all states of the solutions."""
    style = prompt_style(settings)
    return [q for game in games for q in questions_of(game, style=style, tokenizer=llm.tokenizer)]


def ask(llm: LanguageModel, settings: Any, questions: Sequence[Question]) -> dict[str, float]:
    """One prompt's figures."""
    builder = PriorBuilder(llm, prompt_style(settings), temperature=settings.prior.temperature)
    started = time.perf_counter()
    answers = priors(builder, questions)
    spent = time.perf_counter() - started
    tokens = [len(builder.row(question.request).prompt_ids) for question in questions]
    return {**figures(questions, answers), "tokens": float(np.mean(tokens)), "s a state": spent / len(questions)}


def check_length(llm: LanguageModel, settings: Any, questions: Sequence[Question], *, name: str) -> None:
    """Raises UserError if a prompt does not fit into the model: then the LLM would not be asked."""
    builder = PriorBuilder(llm, prompt_style(settings), temperature=settings.prior.temperature)
    try:
        for question in questions:
            builder.row(question.request)
    except PromptTooLongError as error:
        raise UserError(
            f"--prompts {name}: {error}; leave it out, or give less --prompt_max_len than {settings.llm.prompt_max_len}"
        ) from error


def chosen(given: str, known: Sequence[str], *, flag: str) -> list[str]:
    """The names in a comma-separated list.

    Raises:
        UserError: one that there is not.
    """
    names = [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{flag} {','.join(unknown)}: there are {', '.join(known)}")
    return names


def read_rows(file: Path, what: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The rows that an earlier call with the same settings has written.

    Raises:
        UserError: they were made with other settings, or cannot be read.
    """
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
        if {key: found.get(key) for key in what} == what:
            return dict(found["rows"])
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: is not what this script writes ({error}); give another --out") from error
    raise UserError(f"{file}: holds figures of another LLM, other games or settings; give another --out")


def run(options: argparse.Namespace) -> None:
    """Compare, print and write.

    Raises:
        UserError: a prompt, a goal or a game that there is not, or an LLM that cannot be loaded.
    """
    goals = chosen(options.goals, GOALS, flag="--goals")
    names = chosen(options.prompts, list(PROMPTS), flag="--prompts")
    games = options.games.split(",")
    for game in games:
        if not game.startswith("textworld:simple?") or "goal=" in game:
            raise UserError(f"--games {game}: give games of textworld:simple and no goal, as textworld:simple?seed=101")
        resolve_game(game)
    base = read_config_file(options.config)
    llm_cfg = {"prompt_max_len": options.prompt_max_len} | ({} if options.llm is None else {"path": options.llm})
    prior = {"mode": "score", "normalise": options.normalise}
    settings = {name: resolve_settings(base, {"prior": prior, "llm": PROMPTS[name] | llm_cfg}) for name in names}
    first = settings[names[0]]
    make_folder(options.out)
    what = {"llm": first.llm.path, "games": games, "normalise": options.normalise, "tokens": options.prompt_max_len}
    file = options.out / "prompts.json"
    rows = read_rows(file, what)
    llm = load_language_model(first.llm, device=choose_device(first.run.device))
    asked: dict[tuple[str, str], list[Question]] = {}
    for goal in goals:
        for name in names:
            asked[goal, name] = questions_on(llm, settings[name], games=[f"{game}&goal={goal}" for game in games])
            check_length(llm, settings[name], asked[goal, name], name=name)
    for (goal, name), questions in asked.items():
        rows[f"{goal}: chance"] = chance(questions) | {"tokens": 0.0, "s a state": 0.0}
        rows[f"{goal}: {name}"] = ask(llm, settings[name], questions)
        file.write_text(json.dumps({**what, "states": len(questions), "rows": rows}, indent=2) + "\n", "utf-8")
        print(f"{goal}, {name}: done")
    print_table("the right command", rows)
    print(f"written to {file}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "learning_textworld.yaml", metavar="FILE")
    parser.add_argument("--llm", metavar="PATH", help="as llm.path, in place of the configuration's")
    parser.add_argument("--prompt_max_len", type=int, default=2048, help="as llm.prompt_max_len (default: %(default)s)")
    parser.add_argument("--prompts", default=",".join(PROMPTS), help="some of %(default)s")
    parser.add_argument("--goals", default=",".join(GOALS), help="some of %(default)s")
    parser.add_argument("--normalise", choices=("mean", "sum"), default="mean", help="as prior.normalise")
    parser.add_argument(
        "--games",
        default=",".join(f"textworld:simple?seed={seed}" for seed in (101, 102, 103)),
        help="generated games (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    return exit_code(run, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
