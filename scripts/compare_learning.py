"""Compare two agents run by run, from the results of scripts/benchmark_learning.py.

    python scripts/compare_learning.py bench_results/jericho/results.jsonl --agent priorzero_frozen --baseline unizero
    python scripts/compare_learning.py A/results.jsonl B/results.jsonl --agent "priorzero_frozen (zero_shot)"

An agent is named as in the tables: its name, and its label in brackets. A pair is two runs on the same game with the
same seed and the same number of environment steps. For each game the script prints the means over the seeds, in points:

- area: area under the learning curve, divided by its length: the mean of 20 bins of the environment steps, where a bin
  has the mean score of the episodes that ended in it, and an empty bin that of the bin before (0 at the beginning);
- last 25%: mean score of the episodes that ended in the last quarter of the environment steps;
- best: best episode.

Then it prints, for each of these figures, in how many pairs the agent is ahead, behind and equal, the p-value of the
two-sided sign test on the pairs that are not equal (a pair without episodes in the last quarter does not count there),
and the mean gain: the mean over games of the difference of the means, relative to the baseline's mean.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench_tools import exit_code
from plot_learning import ENV_STEP, SCORE, Line, bin_means, last_quarter_score, latest_lines, markdown, row_name
from scipy.stats import binomtest

from priorzero.types import UserError

BINS = 20
Pairs = dict[str, list[tuple[Line, Line]]]  # game -> (agent's run, baseline's run)


def area(line: Line) -> float:
    """Area under the learning curve in points, divided by its length."""
    means = bin_means([(e[ENV_STEP], e[SCORE]) for e in line["episodes"]], end=line["env_steps"], bins=BINS)
    return statistics.fmean(0.0 if math.isnan(mean) else mean for mean in means)


FIGURES: Mapping[str, Callable[[Line], float]] = {
    "area": area,
    "last 25%": lambda line: last_quarter_score(line) * line["max_score"],
    "best": lambda line: line["best_score"],
}


def pairs_from(lines: Sequence[Line], *, agent: str, baseline: str) -> Pairs:
    """The pairs of runs of two agents, by game.

    Raises:
        UserError: both agents are the same, there are no runs of an agent, or no pairs.
    """
    if agent == baseline:
        raise UserError(f"--agent and --baseline are both {agent}; give two different ones")
    runs: dict[str, dict[tuple[str, int, int], Line]] = {agent: {}, baseline: {}}
    for line in lines:
        if row_name(line) in runs:
            runs[row_name(line)][line["game"], line["seed"], line["env_steps"]] = line
    for name, own in runs.items():
        if not own:
            known = ", ".join(sorted({row_name(line) for line in lines if line["episodes"]}))
            raise UserError(f"there are no runs of {name}; the files have runs of {known}")
    pairs: Pairs = {}
    for key in runs[agent].keys() & runs[baseline].keys():
        pairs.setdefault(key[0], []).append((runs[agent][key], runs[baseline][key]))
    num_unpaired = len(runs[agent].keys() ^ runs[baseline].keys())
    if num_unpaired:
        print(f"runs without a partner, which are left out: {num_unpaired}", file=sys.stderr)
    if not pairs:
        raise UserError(f"{agent} and {baseline} have no run with the same game, seed and number of environment steps")
    return dict(sorted(pairs.items()))


def sign_test(differences: Sequence[float]) -> tuple[int, int, int, float]:
    """How many differences are positive, negative and zero, and the p-value of the two-sided sign test."""
    ahead, behind = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    p = float(binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0
    return ahead, behind, len(differences) - ahead - behind, p


def tables(pairs: Pairs) -> str:
    """A Markdown table of the games, and one of the comparison."""
    head = ["game (maximum)", "pairs", *(f"{name}: agent, baseline" for name in FIGURES)]
    rows = []
    for game, own in pairs.items():
        means = [[statistics.fmean(figure(pair[k]) for pair in own) for k in (0, 1)] for figure in FIGURES.values()]
        title = f"{game} ({own[0][0]['max_score']:g})"
        rows.append([title, f"{len(own)}", *(f"{ours:.1f}, {theirs:.1f}" for ours, theirs in means)])
    comparison = []
    for name, figure in FIGURES.items():
        by_game = [[figure(ours) - figure(theirs) for ours, theirs in own] for own in pairs.values()]
        ahead, behind, equal, p = sign_test([d for own in by_game for d in own if not math.isnan(d)])
        comparison.append([name, f"{ahead}", f"{behind}", f"{equal}", f"{p:.2g}", _mean_gain(pairs, figure)])
    return (
        markdown(head, rows)
        + "\n"
        + markdown(["figure", "pairs ahead", "behind", "equal", "p (sign test)", "mean gain"], comparison)
    )


def _mean_gain(pairs: Pairs, figure: Callable[[Line], float]) -> str:
    """The mean relative gain over the games whose baseline has a positive mean."""
    gains = []
    for own in pairs.values():
        ours, theirs = (statistics.fmean(figure(pair[k]) for pair in own) for k in (0, 1))
        if theirs > 0 and not math.isnan(ours):
            gains.append(ours / theirs - 1.0)
    if not gains:
        return "-"
    left_out = len(pairs) - len(gains)
    note = f" (without {left_out} games, whose baseline is not above 0)" if left_out else ""
    return f"{statistics.fmean(gains):+.0%}{note}"


def run(options: argparse.Namespace) -> None:
    """Print the tables.

    Raises:
        UserError: a file is missing, or there are no pairs.
    """
    lines = latest_lines(options.results)
    print(tables(pairs_from(lines, agent=options.agent, baseline=options.baseline)), end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error that the user can correct."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results.jsonl of scripts/benchmark_learning.py")
    parser.add_argument("--agent", default="priorzero_frozen", help="default: %(default)s")
    parser.add_argument("--baseline", default="unizero", help="default: %(default)s")
    return exit_code(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
