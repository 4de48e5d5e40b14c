"""How many attempts an exploration by prior and counts needs until it tries the right command.

    python scripts/simulate_exploration.py                          # validation games, the prompt of --config
    python scripts/simulate_exploration.py --set llm.adapter=       # without the adapter of --config

In each state of a walkthrough, actions are sampled again and again with probabilities proportional to
``(prior / (1 + count)^2)^power``, where the count is that of the earlier attempts, until the walkthrough's command was
sampled once or three times (the world may have changed in between). The prior is mixed with a uniform distribution:
"weight" is the prior's share. The table shows arithmetic and geometric means over the states of a game, then arithmetic
means over the games. The game itself is not played.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from bench_tools import at_least, exit_code
from benchmark_prior import build_parser, compute, find_episodes, settings_for

from priorzero.llm.models import choose_device, load_language_model
from priorzero.pretraining.data import searched_decisions
from priorzero.pretraining.evaluation import Outcome
from priorzero.types import UserError

WEIGHTS = (0.0, 0.5, 0.75, 0.98)
POWERS = (1, 2, 3, 4)
FINDS = 3  # how often the right command is to be sampled
MAX_ATTEMPTS = 3000


def attempts(probs: np.ndarray, correct: int, *, power: float, repeats: int, rng: np.random.Generator) -> np.ndarray:
    """Number of attempts until ``correct`` was sampled once, twice, ..., :data:`FINDS` times, means, ``[FINDS]``.

    Args:
        probs: the prior, mixed with a uniform distribution, ``[K]``.
        correct: position of the right action.
        power: see the module's docstring.
        repeats: number of simulations.
        rng: generator of the samples.
    """
    found = np.full((repeats, FINDS), MAX_ATTEMPTS)
    for own in found:
        counts = np.zeros(len(probs))
        for attempt in range(1, MAX_ATTEMPTS + 1):
            weights = (probs / (1.0 + counts) ** 2) ** power
            chosen = rng.choice(len(probs), p=weights / weights.sum())
            counts[chosen] += 1
            if chosen == correct:
                own[int(counts[chosen]) - 1] = attempt
                if counts[chosen] == FINDS:
                    break
    return np.asarray(found.mean(axis=0))


def means(
    outcomes: Sequence[Outcome], *, weight: float, power: float, repeats: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Arithmetic and geometric means over the states, then over the games, ``[FINDS]`` each."""
    by_game: dict[str, list[np.ndarray]] = defaultdict(list)
    for outcome in outcomes:
        probs = weight * np.exp(outcome.logprobs.astype(np.float64)) + (1.0 - weight) / len(outcome.logprobs)
        by_game[outcome.game].append(attempts(probs, outcome.correct, power=power, repeats=repeats, rng=rng))
    arithmetic = np.mean([np.mean(own, axis=0) for own in by_game.values()], axis=0)
    geometric = np.mean([np.exp(np.mean(np.log(own), axis=0)) for own in by_game.values()], axis=0)
    return arithmetic, geometric


def run(options: argparse.Namespace) -> None:
    """Compute the priors, simulate, and print the table.

    Raises:
        UserError: an argument is not allowed, or the LLM cannot be loaded.
    """
    settings = settings_for("config", options)
    episodes = find_episodes(options)
    decisions = [
        decision
        for decision in searched_decisions(episodes, per_game=options.states)
        if not episodes[decision.episode].game.startswith("textworld")
    ]
    if not decisions:
        raise UserError("the walkthroughs have no state whose command is a valid action; name other games")
    llm = load_language_model(settings.llm, device=choose_device(settings.run.device))
    outcomes = compute(llm, settings, episodes, decisions)
    print(f"{len(outcomes)} states of {len({outcome.game for outcome in outcomes})} games")
    print("| weight | power | first time: mean, geometric | third time: mean, geometric |\n|---|---|---|---|")
    for weight in WEIGHTS:
        for power in POWERS:
            rng = np.random.default_rng(options.seed)
            mean, geometric = means(outcomes, weight=weight, power=power, repeats=options.repeats, rng=rng)
            print(f"| {weight:g} | {power} | {mean[0]:.1f}, {geometric[0]:.1f} | {mean[2]:.1f}, {geometric[2]:.1f} |")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error that the user can correct."""
    parser = build_parser(__doc__)
    parser.set_defaults(split="validation", states=40)
    parser.add_argument("--repeats", type=at_least(1), default=20, help="simulations per state (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the simulations (default: %(default)s)")
    return exit_code(run, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
