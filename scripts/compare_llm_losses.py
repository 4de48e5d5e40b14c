"""What each of the LLM's losses does to its prior, on states of generated games whose solution is known.

    python scripts/compare_llm_losses.py                          # some twenty minutes on two cores
    python scripts/compare_llm_losses.py --variants sft,rft_clip --rounds 2

In every state along the solution of one game a command is drawn from the prior, and earns a point at once if it is the
solution's. From all of these decisions the LLM makes ``--repeats`` updates (more than one, as replay has it: with one
update a clip of the ratio does nothing); then they are drawn anew, ``--rounds`` times in all. The visits that SFT
learns from are those of a good search: 12 of 16 on the right command, the others anywhere. The world model's value,
where a loss uses it, is what the decision is worth, the prior's probability of the right command. Prints the mean
probability of the right command before and after, there and along the solution of a game not learned from, and how far
the prior has moved on the game learned from (KL divergence of the prior after from the one before, nats a state).
Writes OUT/llm_losses.json, anew after each variant.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from bench_tools import RESULTS, exit_code, make_folder, print_table

from priorzero.config import read_config_file, resolve_settings
from priorzero.envs import make_game, resolve_game
from priorzero.llm.engines import PriorBuilder, TransformersEngine
from priorzero.llm.fine_tuning import LLMLearner
from priorzero.llm.models import choose_device, load_language_model
from priorzero.llm.prompts import render_prompt
from priorzero.llm.prompts import prompt_style
from priorzero.types import ActionPrior, GameState, HistoryStep, PriorRequest, StepRecord, UserError

PLAIN = {"enable_sft": False, "enable_rft": False, "rft_baseline": "value", "rft_clip": 0.0, "kl_weight": 0.0}
# variant -> the group llm of the settings, on top of --config and PLAIN
VARIANTS: dict[str, dict[str, Any]] = {
    "sft": {"enable_sft": True},
    "sft_rft": {"enable_sft": True, "enable_rft": True},
    "rft": {"enable_rft": True},
    "rft_no_baseline": {"enable_rft": True, "rft_baseline": "none"},
    "rft_clip": {"enable_rft": True, "rft_clip": 0.2},
    "rft_clip_kl": {"enable_rft": True, "rft_clip": 0.2, "kl_weight": 0.1},
}


@dataclass(frozen=True)
class Question:
    """A state on the way to a win, what the LLM is asked there, and the place of the right command."""

    state: GameState
    request: PriorRequest
    right: int


def solution(game: str) -> list[str]:
    """The commands that win a generated game, as TextWorld wrote them down beside it."""
    path = Path(resolve_game(game).path).with_suffix(".json")
    commands: list[str] = json.loads(path.read_text(encoding="utf-8"))["metadata"]["walkthrough"]
    return commands


def questions_of(game: str, *, style: Any, tokenizer: Any) -> list[Question]:
    """The states along a game's solution.

    Raises:
        UserError: the solution does not win.
    """
    commands = solution(game)
    spec, longest = resolve_game(game), len(commands) + 1
    played = make_game(spec, seed=0, max_episode_steps=longest, look_and_inventory=True, drop_inert_commands=True)
    state, history, questions = played.reset(), list[HistoryStep](), []
    for command in commands:
        if command not in state.valid_actions:
            continue  # one that changes nothing
        prompt = render_prompt(state, history, style=style, tokenizer=tokenizer)
        request = PriorRequest(prompt.text, state.valid_actions)
        questions.append(Question(state, request, state.valid_actions.index(command)))
        following, reward = played.step(command)
        history.append(HistoryStep(state.feedback, command, reward, state.place, state.standing))
        state = following
    played.close()
    if not state.won:
        raise UserError(f"{game}: what TextWorld wrote down as its solution does not win it; name another game")
    return questions


def decision(question: Question, prior: ActionPrior, *, chosen: int, visit_counts: np.ndarray) -> StepRecord:
    """What would be remembered of a command given there; it earns a point if it is the right one."""
    return StepRecord(
        state=question.state,
        features=np.zeros(1),
        action_indices=np.arange(len(visit_counts)),
        prompt=question.request.prompt,
        prior=prior,
        visit_counts=visit_counts,
        root_value=0.0,
        predicted_value=float(np.exp(prior.logprobs[question.right])),
        chosen=chosen,
        reward=float(chosen == question.right),
        done=False,
        episode=0,
        step=0,
    )


def good_visits(question: Question, rng: np.random.Generator) -> np.ndarray:
    """Visits ``[K]`` of a good search: 12 of 16 to the right command, the others anywhere."""
    num_actions = len(question.state.valid_actions)
    counts = rng.multinomial(4, np.full(num_actions, 1 / num_actions))
    counts[question.right] += 12
    return counts


def right_probs(questions: Sequence[Question], answers: Sequence[ActionPrior]) -> np.ndarray:
    """The prior's probabilities of the right commands, ``[n]``."""
    return np.exp([float(answer.logprobs[q.right]) for q, answer in zip(questions, answers, strict=True)])


def priors(builder: PriorBuilder, questions: Sequence[Question]) -> list[ActionPrior]:
    """What the LLM says now, in process."""
    engine = TransformersEngine(builder, rows_per_forward=1, prompt_cache_tokens=4096)
    return asyncio.run(engine.priors([question.request for question in questions]))


def compare(settings: Any, *, games: Sequence[str], rounds: int, repeats: int) -> dict[str, float]:
    """One variant's figures.

    Raises:
        UserError: the settings let nothing be learned from a decision.
    """
    cfg = settings.llm
    llm = load_language_model(cfg, device=choose_device(settings.run.device))
    style = prompt_style(settings)
    learner = LLMLearner(
        llm, cfg, style=style, normalise=settings.prior.normalise, temperature=settings.prior.temperature
    )
    builder = PriorBuilder(llm, style, temperature=settings.prior.temperature)
    trained, unseen = (questions_of(game, style=style, tokenizer=llm.tokenizer) for game in games)
    rng = np.random.default_rng(settings.run.seed)
    before = priors(builder, [*trained, *unseen])
    now = before[: len(trained)]
    for _ in range(rounds):
        records = []
        for question, prior in zip(trained, now, strict=True):
            probs = np.exp(prior.logprobs.astype(np.float64))
            chosen = int(rng.choice(len(probs), p=probs / probs.sum()))
            records.append(decision(question, prior, chosen=chosen, visit_counts=good_visits(question, rng)))
        samples, left_out = learner.samples(records, np.array([record.reward for record in records]))
        if left_out:
            raise UserError(f"{left_out} of {len(records)} decisions cannot be learned from; use prior.mode=score")
        for _ in range(repeats):
            learner.learn(samples)
        now = priors(builder, trained)
    after = [*now, *priors(builder, unseen)]
    was, becomes, n = right_probs([*trained, *unseen], before), right_probs([*trained, *unseen], after), len(trained)
    moved = [float((np.exp(a.logprobs) * (a.logprobs - b.logprobs)).sum()) for a, b in zip(after, before, strict=True)]
    return {
        "before": float(was[:n].mean()),
        "after": float(becomes[:n].mean()),
        "unseen before": float(was[n:].mean()),
        "unseen after": float(becomes[n:].mean()),
        "KL": float(np.mean(moved[:n])),
    }


def run(options: argparse.Namespace) -> None:
    """Compare, print and write.

    Raises:
        UserError: a variant or a game that there is not, numbers below one.
    """
    names = options.variants.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"--variants {','.join(unknown)}: there are {', '.join(VARIANTS)}")
    if options.rounds < 1 or options.repeats < 1:
        raise UserError(f"--rounds {options.rounds} --repeats {options.repeats}: both must be 1 or more")
    games = options.game, options.unseen
    for game in games:
        if resolve_game(game).kind != "textworld":
            raise UserError(f"{game}: only generated games come with a solution; give textworld:simple?seed=N")
    if len(set(games)) == 1:
        raise UserError(f"--unseen {options.unseen} is the game that is learned from; name another")
    base = read_config_file(options.config)
    settings = {
        name: resolve_settings(base, {"run": {"seed": options.seed}, "llm": PLAIN | VARIANTS[name]}) for name in names
    }
    make_folder(options.out)
    file = options.out / "llm_losses.json"
    what = {"game": games[0], "unseen": games[1], **{k: getattr(options, k) for k in ("rounds", "repeats", "seed")}}
    rows: dict[str, dict[str, float]] = {}
    for name in names:
        rows[name] = compare(settings[name], games=games, rounds=options.rounds, repeats=options.repeats)
        file.write_text(json.dumps({**what, "rows": rows}, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: done")
    print_table("probability of the right command", rows)
    print(f"written to {file}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "learning_textworld.yaml", metavar="FILE")
    parser.add_argument("--game", default="textworld:simple?seed=101", help="learned from (default: %(default)s)")
    parser.add_argument("--unseen", default="textworld:simple?seed=102", help="not learned from (default: %(default)s)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="draws of decisions (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="updates from each draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    return exit_code(run, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
