"""The results of ``python -m priorzero.evaluate``: a JSON object for each game and mode, and a table with intervals.

Intervals are 95% percentile intervals of the stratified bootstrap (Agarwal et al. 2021, "Deep Reinforcement Learning at
the Edge of the Statistical Precipice"): the episodes of each game are resampled separately, and the statistic is the
mean over games of the games' means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from priorzero.settings import MODE_NAMES

if TYPE_CHECKING:
    from rich.table import Table

    from priorzero.play.evaluator import Evaluation, Evaluations

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
STANDARD, TALES = "standard", "tales"
PROTOCOLS: dict[str, int | None] = {STANDARD: None, TALES: 100}  # name -> steps of an episode; None: until its end
TALES_NOTE = (
    "Protocol of TALES (Cui et al. 2025): 100 steps for each game, which begins again if it ends before, and the best "
    "score. It differs in five parts, which docs/evaluation.md explains: the agent chooses among the valid actions "
    "that the game gives it, and sees the room and the inventory without spending a step; the limit of moves, the "
    "memory after a game has begun again, and the games and seeds differ, too. State these differences when you "
    "compare with its published scores."
)

Interval = tuple[float, float]


def mean_interval(samples: Sequence[Sequence[float]], *, seed: int) -> Interval | None:
    """95% interval of the mean over games, by stratified bootstrap.

    Args:
        samples: the scores of the episodes of each game.
        seed: seed of the resampling.

    Returns:
        Lower and upper bound; None if a game has fewer than two episodes.
    """
    from scipy.stats import bootstrap  # late: takes a while, and is needed at the end

    if not samples or min(map(len, samples)) < 2:
        return None
    result = bootstrap(
        [np.asarray(values, dtype=np.float64) for values in samples],
        _mean_of_means,
        n_resamples=NUM_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        paired=False,  # each game is resampled separately
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _mean_of_means(*samples: np.ndarray, axis: int) -> np.ndarray:
    return np.mean([values.mean(axis=axis) for values in samples], axis=0)


# ---- one JSON object for each game and mode ----


def result_lines(
    evaluations: Evaluations, *, about: Mapping[str, Any], protocol: str, seed: int
) -> list[dict[str, Any]]:
    """One JSON object for each game and mode. It has the keys of the lines of ``evaluations.jsonl`` and some more.

    Args:
        evaluations: by mode and game.
        about: what all objects contain, such as the checkpoint.
        protocol: a key of :data:`PROTOCOLS`.
        seed: seed of the bootstrap.
    """
    return [
        {**about, "game": game, "unseen": unseen, **_result(evaluation, protocol=protocol, seed=seed)}
        for (_, unseen), of_games in evaluations.items()
        for game, evaluation in of_games.items()
    ]


def _result(evaluation: Evaluation, *, protocol: str, seed: int) -> dict[str, Any]:
    result = evaluation.results()
    counted = counted_scores(result, protocol=protocol)
    result |= {
        "mean_score": float(np.mean(counted)),
        "mean_score_interval": mean_interval([counted], seed=seed),
        "best_score": max(counted),
    }
    result["normalised_score"] = result["mean_score"] / evaluation.max_score if evaluation.max_score else None
    if protocol == TALES:
        result |= {"step_limit": PROTOCOLS[TALES], "valid_actions_given": True}
    return result


def counted_scores(line: Mapping[str, Any], *, protocol: str) -> list[float]:
    """The scores of the episodes: at their ends, or the best ones in the protocol of TALES, which are at least 0."""
    return [max(0.0, score) for score in line["best_scores"]] if protocol == TALES else line["scores"]


# ---- the table ----


def result_table(lines: Sequence[Mapping[str, Any]], *, protocol: str, seed: int) -> Table:
    """The results as a table for the terminal: a row for each game and mode, and one for each mode over several games.

    Args:
        lines: from :func:`result_lines`.
        protocol: a key of :data:`PROTOCOLS`.
        seed: seed of the bootstrap.
    """
    from rich.table import Table
    from rich.text import Text

    what = "best score in 100 steps" if protocol == TALES else "score"
    table = Table(title=f"Mean {what}, with 95% intervals", caption=TALES_NOTE if protocol == TALES else None)
    table.add_column("agent (mode)")
    table.add_column("game")
    for heading in ("mean", "95% interval", "best", "maximum", "wins"):
        table.add_column(heading, justify="right", no_wrap=True)
    for mode in dict.fromkeys(line["mode"] for line in lines):
        of_mode = [line for line in lines if line["mode"] == mode]
        for number, line in enumerate(of_mode):
            game, *numbers = _cells(line)
            # Text, since a name with brackets is no markup.
            table.add_row(f"{MODE_NAMES[mode]} ({mode})" if number == 0 else "", Text(game), *numbers)
        if len(of_mode) > 1:
            table.add_row("", *_overall_cells(of_mode, protocol=protocol, seed=seed), style="bold")
        table.add_section()
    return table


def _cells(line: Mapping[str, Any]) -> list[str]:
    return [
        line["game"] + (" (not trained on)" if line["unseen"] else ""),
        f"{line['mean_score']:.2f}",
        _interval_text(line["mean_score_interval"], ".2f"),
        f"{line['best_score']:g}",
        f"{line['max_score']:g}" if line["max_score"] else "not known",
        f"{line['wins']} of {len(line['scores'])}",
    ]


def _overall_cells(lines: Sequence[Mapping[str, Any]], *, protocol: str, seed: int) -> list[str]:
    """The mean over the games: of the fractions of the maximum scores, or of the scores if a maximum is not known."""
    known = all(line["max_score"] for line in lines)
    scales = [line["max_score"] if known else 1.0 for line in lines]
    samples = [
        [score / scale for score in counted_scores(line, protocol=protocol)]
        for line, scale in zip(lines, scales, strict=True)
    ]
    means, number = [float(np.mean(values)) for values in samples], ".1%" if known else ".2f"
    return [
        f"mean of {len(lines)} games",
        format(float(np.mean(means)), number),
        _interval_text(mean_interval(samples, seed=seed), number),
        format(max(map(max, samples)), number),
        "100%" if known else "not known",
        f"{sum(line['wins'] for line in lines)} of {sum(len(line['scores']) for line in lines)}",
    ]


def _interval_text(interval: Interval | None, number: str) -> str:
    if interval is None:
        return "needs 2 episodes"
    if interval[0] == interval[1]:  # for example if neither the agent nor the game has randomness
        return "no variation"
    return f"{interval[0]:{number}} to {interval[1]:{number}}"
