"""Effect of each of the language model's losses on its prior, in states of generated games with a known solution.

    python scripts/compare_llm_losses.py                          # about 20 minutes on two cores
    python scripts/compare_llm_losses.py --variants sft,rft_clip --rounds 2

In each state of the solution of one game, a command is sampled from the prior. It gains one point if it is the
solution's. The LLM makes ``--repeats`` updates on these decisions, as with replay: with one update, clipping the ratio
would have no effect. This is repeated ``--rounds`` times, each time with new samples.

The visit counts for SFT are those of a good search: 12 of 16 visits for the correct command, the others at random. The
world model's value, which some losses use, is the prior's probability of the correct command.

The script prints the mean probability of the correct command before and after the updates, for this game and for a
second game that is not trained on, and how far the prior has moved on the first game (KL divergence of the new prior
from the old one, in nats for each state). It writes OUT/llm_losses.json after each variant.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_tools import RESULTS, ROOT, at_least, exit_code, make_folder, names_from, print_table, write_json
from walkthroughs import WalkthroughState, compute_priors, correct_logprobs, walkthrough_states

from priorzero.config import read_config_file, resolve_settings
from priorzero.envs import resolve_game
from priorzero.llm.engines import PriorBuilder
from priorzero.llm.fine_tuning import LLMLearner
from priorzero.llm.models import choose_device, load_language_model
from priorzero.llm.prompts import prompt_style
from priorzero.settings import Settings
from priorzero.types import ActionPrior, StepRecord, UserError

COMMON = {"enable_sft": False, "enable_rft": False, "rft_baseline": "value", "rft_clip": 0.0, "kl_weight": 0.0}
# variant -> settings of the group llm, in addition to --config and COMMON
VARIANTS: dict[str, dict[str, Any]] = {
    "sft": {"enable_sft": True},
    "sft_rft": {"enable_sft": True, "enable_rft": True},
    "rft": {"enable_rft": True},
    "rft_no_baseline": {"enable_rft": True, "rft_baseline": "none"},
    "rft_clip": {"enable_rft": True, "rft_clip": 0.2},
    "rft_clip_kl": {"enable_rft": True, "rft_clip": 0.2, "kl_weight": 0.1},
}


def make_record(state: WalkthroughState, prior: ActionPrior, *, chosen: int, visit_counts: np.ndarray) -> StepRecord:
    """The record of a decision. The reward is 1 for the correct command."""
    return StepRecord(
        state=state.state,
        features=np.zeros(1),
        action_indices=np.arange(len(visit_counts)),
        prompt=state.request.prompt,
        prior=prior,
        visit_counts=visit_counts,
        root_value=0.0,
        predicted_value=float(np.exp(prior.logprobs[state.correct])),
        chosen=chosen,
        reward=float(chosen == state.correct),
        done=False,
        episode=0,
        step=0,
    )


def good_visit_counts(state: WalkthroughState, rng: np.random.Generator) -> np.ndarray:
    """Visit counts ``[K]`` of a good search: 12 of 16 visits for the correct command, the others at random."""
    num_actions = len(state.state.valid_actions)
    counts = rng.multinomial(4, np.full(num_actions, 1 / num_actions))
    counts[state.correct] += 12
    return counts


def sample_decisions(
    states: Sequence[WalkthroughState], priors: Sequence[ActionPrior], rng: np.random.Generator
) -> list[StepRecord]:
    """One decision for each state, sampled from the prior."""
    records = []
    for state, prior in zip(states, priors, strict=True):
        probs = np.exp(prior.logprobs.astype(np.float64))
        chosen = int(rng.choice(len(probs), p=probs / probs.sum()))
        records.append(make_record(state, prior, chosen=chosen, visit_counts=good_visit_counts(state, rng)))
    return records


def kl_divergence(new: ActionPrior, old: ActionPrior) -> float:
    """KL divergence of one prior from another, in nats."""
    return float((np.exp(new.logprobs) * (new.logprobs - old.logprobs)).sum())


def train(settings: Settings, *, games: Sequence[str], rounds: int, repeats: int) -> dict[str, float]:
    """Train on the first game; return the figures of one variant.

    Raises:
        UserError: with these settings, some decisions cannot be learned from.
    """
    llm = load_language_model(settings.llm, device=choose_device(settings.run.device))
    style, temperature = prompt_style(settings), settings.prior.temperature
    learner = LLMLearner(llm, settings.llm, style=style, temperature=temperature)
    builder = PriorBuilder(llm, style, temperature=temperature)
    trained, unseen = (walkthrough_states(game, style=style, tokenizer=llm.tokenizer) for game in games)
    states, n = [*trained, *unseen], len(trained)
    rng = np.random.default_rng(settings.run.seed)
    before = compute_priors(builder, states)
    priors = before[:n]
    for _ in range(rounds):
        records = sample_decisions(trained, priors, rng)
        samples, skipped = learner.samples(records, np.array([record.reward for record in records]))
        if skipped:
            raise UserError(f"{skipped} of {len(records)} decisions cannot be learned from; use prior.mode=score")
        for _ in range(repeats):
            learner.learn(samples)
        priors = compute_priors(builder, trained)
    after = [*priors, *compute_priors(builder, unseen)]
    old_probs, new_probs = (np.exp(correct_logprobs(states, found).astype(np.float64)) for found in (before, after))
    return {
        "before": float(old_probs[:n].mean()),
        "after": float(new_probs[:n].mean()),
        "unseen before": float(old_probs[n:].mean()),
        "unseen after": float(new_probs[n:].mean()),
        "KL": float(np.mean([kl_divergence(new, old) for new, old in zip(after[:n], before[:n], strict=True)])),
    }


def run(options: argparse.Namespace) -> None:
    """Train each variant, print the table and write the file.

    Raises:
        UserError: an argument is not allowed.
    """
    names = names_from(options.variants, list(VARIANTS), flag="--variants")
    games = options.game, options.unseen
    for game in games:
        if resolve_game(game).kind != "textworld":
            raise UserError(f"{game}: only generated games have a solution; give textworld:simple?seed=N")
    if options.game == options.unseen:
        raise UserError(f"--unseen {options.unseen} is the game that is trained on; name another game")
    base = read_config_file(options.config)
    settings = {
        name: resolve_settings(base, {"run": {"seed": options.seed}, "llm": COMMON | VARIANTS[name]}) for name in names
    }
    make_folder(options.out)
    arguments = {key: getattr(options, key) for key in ("game", "unseen", "rounds", "repeats", "seed")}
    file = options.out / "llm_losses.json"
    rows: dict[str, dict[str, float]] = {}
    for name in names:
        rows[name] = train(settings[name], games=games, rounds=options.rounds, repeats=options.repeats)
        print(f"{name}: done")
        write_json(file, {**arguments, "rows": rows})
    print_table("probability of the correct command", rows)
    print(f"written to {file}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error that the user can correct."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "learning_textworld.yaml", metavar="FILE")
    parser.add_argument("--game", default="textworld:simple?seed=101", help="game to train on (default: %(default)s)")
    parser.add_argument("--unseen", default="textworld:simple?seed=102", help="second game (default: %(default)s)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of %(default)s")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="times that decisions are sampled (default: 3)")
    parser.add_argument("--repeats", type=at_least(1), default=2, help="updates in each round (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="folder of the JSON file")
    return exit_code(run, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
