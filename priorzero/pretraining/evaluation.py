"""How well a prior finds the commands of walkthroughs: figures for each game, next to those of a uniform prior."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from torch.utils.data import DataLoader

from priorzero.llm.engines.base import PriorBuilder
from priorzero.llm.models import LanguageModel
from priorzero.llm.packing import PromptRow, split_completions
from priorzero.llm.priors import uniform_prior
from priorzero.pretraining.data import Decision, EvaluationData, PromptMaker
from priorzero.types import UserError

# Candidates of :func:`fit_calibration`.
TEMPERATURES = tuple(float(t) for t in np.geomspace(0.1, 10.0, 21))
FLOORS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
MEAN = "mean of the games"


@dataclass(frozen=True)
class Outcome:
    """A prior in a state whose correct action is known.

    Attributes:
        game: name of the game.
        logprobs: of the valid actions, ``[K]``.
        correct: position of the correct action.
    """

    game: str
    logprobs: np.ndarray
    correct: int


@dataclass(frozen=True)
class Calibration:
    """A temperature for the scores, then a weight of a uniform distribution that is mixed in."""

    temperature: float = 1.0
    floor: float = 0.0

    def logprobs(self, outcome: Outcome) -> np.ndarray:
        """The calibrated log-probabilities, ``[K]``."""
        logprobs = log_softmax(outcome.logprobs.astype(np.float64) / self.temperature)
        if self.floor == 0.0:
            return np.asarray(logprobs)
        return np.log((1.0 - self.floor) * np.exp(logprobs) + self.floor / len(logprobs))


def figures(outcomes: Sequence[Outcome], *, calibrated: float | None = None) -> dict[str, float]:
    """Means over at least one state.

    Returns:
        ``states``: their number. ``place``: place of the correct action by probability; equal ones share the mean of
        their places. ``first``: share of the states where it is the single first one. ``logprob``: its log-probability
        in nats. The same for a uniform prior, over all orders of the actions: ``uniform_place``, ``uniform_first``,
        ``uniform_logprob``. ``calibrated_logprob``, if ``calibrated`` is given.
    """
    own = np.array([outcome.logprobs[outcome.correct] for outcome in outcomes])
    counts = np.array([len(outcome.logprobs) for outcome in outcomes])
    better = np.array([np.sum(outcome.logprobs > value) for value, outcome in zip(own, outcomes, strict=True)])
    equal = np.array([np.sum(outcome.logprobs == value) for value, outcome in zip(own, outcomes, strict=True)])
    place = better + (equal + 1) / 2
    found = {
        "states": float(len(outcomes)),
        "place": float(place.mean()),
        "first": float(np.mean(place == 1)),
        "logprob": float(own.mean()),
        "uniform_place": float((counts + 1).mean() / 2),
        "uniform_first": float((1 / counts).mean()),
        "uniform_logprob": float(-np.log(counts).mean()),
    }
    return found if calibrated is None else {**found, "calibrated_logprob": calibrated}


def fit_calibration(outcomes: Sequence[Outcome]) -> Calibration:
    """The calibration with the largest mean log-probability of the correct action, of those on a grid."""
    candidates = [Calibration(temperature, floor) for temperature in TEMPERATURES for floor in FLOORS]

    def mean(calibration: Calibration) -> float:
        return float(np.mean([calibration.logprobs(outcome)[outcome.correct] for outcome in outcomes]))

    return max(candidates, key=mean)


def figures_by_game(outcomes: Iterable[Outcome]) -> dict[str, dict[str, float]]:
    """The figures of each game, with the calibration that was fitted on the other games (of several games)."""
    games: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        games[outcome.game].append(outcome)
    result = {}
    for game, own in games.items():
        others = [outcome for other, theirs in games.items() if other != game for outcome in theirs]
        calibrated = None
        if others:
            fitted = fit_calibration(others)
            calibrated = float(np.mean([fitted.logprobs(outcome)[outcome.correct] for outcome in own]))
        result[game] = figures(own, calibrated=calibrated)
    return result


def mean_figures(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The means over games, each of which counts the same; ``states`` is the sum."""
    keys = next(iter(rows.values())).keys()
    means = {key: float(np.mean([row[key] for row in rows.values()])) for key in keys}
    return {**means, "states": sum(row["states"] for row in rows.values())}


def group_means(rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The means over Jericho's games and over generated ones, as far as there are any."""
    groups: dict[str, dict[str, Mapping[str, float]]] = {"Jericho": {}, "TextWorld": {}}
    for game, row in rows.items():
        groups["TextWorld" if game.startswith("textworld-") else "Jericho"][game] = row
    return {name: mean_figures(own) for name, own in groups.items() if own}


def completion_scores(llm: LanguageModel, rows: Sequence[PromptRow]) -> list[np.ndarray]:
    """The token log-probabilities of each completion of some rows. If a GPU's memory is too small, rows are split.

    Raises:
        UserError: the memory is too small for one row.
    """
    try:
        with torch.inference_mode():
            return split_completions(*llm.token_logprobs(rows))
    except torch.OutOfMemoryError as error:
        if len(rows) == 1:
            raise UserError(
                "out of GPU memory while one state is evaluated; end other programs that use the GPU (nvidia-smi lists "
                "them), or type --set llm.prompt_max_len=512"
            ) from error
    torch.cuda.empty_cache()
    half = len(rows) // 2
    return [*completion_scores(llm, rows[:half]), *completion_scores(llm, rows[half:])]


def outcomes(
    llm: LanguageModel,
    prompts: PromptMaker,
    decisions: Sequence[Decision],
    *,
    rows_per_forward: int,
    num_workers: int = 0,
) -> list[Outcome]:
    """The LLM's priors with the temperature 1 (mode ``score``). A prompt that does not fit has a uniform prior.

    Args:
        llm: the language model.
        prompts: renders the prompts.
        decisions: the states; the valid actions of all were searched, and the correct one is known.
        rows_per_forward: states in one forward pass.
        num_workers: processes that render prompts; 0: this one.
    """
    builder = PriorBuilder(llm, prompts.style, temperature=1.0)
    loader: Any = DataLoader(
        EvaluationData(prompts),
        batch_sampler=[list(decisions[start : start + 256]) for start in range(0, len(decisions), 256)],
        collate_fn=list,
        num_workers=num_workers,
    )
    rows: list[PromptRow | None] = list(itertools.chain.from_iterable(loader))
    logprobs: dict[int, np.ndarray] = {
        n: uniform_prior(len(prompts.step(decision).valid_actions or ()), version=0).logprobs
        for n, (decision, row) in enumerate(zip(decisions, rows, strict=True))
        if row is None
    }
    # Sequences of similar length need little padding.
    order = sorted((n for n, row in enumerate(rows) if row is not None), key=lambda n: len(rows[n].prompt_ids))  # type: ignore[union-attr]
    for start in range(0, len(order), rows_per_forward):
        batch = order[start : start + rows_per_forward]
        own = [row for n in batch if (row := rows[n]) is not None]
        tokens = iter(completion_scores(llm, own))
        for n, row in zip(batch, own, strict=True):
            scores = list(itertools.islice(tokens, len(row.completions)))
            logprobs[n] = builder.from_logprobs(scores, version=0).logprobs
    return [
        Outcome(prompts.episodes[decision.episode].game, logprobs[n], _correct(prompts, decision))
        for n, decision in enumerate(decisions)
    ]


def _correct(prompts: PromptMaker, decision: Decision) -> int:
    correct = prompts.step(decision).correct
    assert correct is not None
    return correct


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The figures as lines of text: place, first, log-probability; in brackets those of a uniform prior."""
    width = max(len(MEAN), *map(len, rows))
    lines = [f"{'game':{width}}  states  place (uniform)  first (uniform)  log-prob (uniform)  calibrated"]
    for name, row in rows.items():
        calibrated = f"{row['calibrated_logprob']:.2f}" if "calibrated_logprob" in row else "-"
        lines.append(
            f"{name:{width}}  {row['states']:6.0f}  {row['place']:5.2f} ({row['uniform_place']:6.2f})  "
            f"{row['first']:5.0%} ({row['uniform_first']:6.0%})  "
            f"{row['logprob']:8.2f} ({row['uniform_logprob']:6.2f})  {calibrated:>10}"
        )
    return "\n".join(lines)
