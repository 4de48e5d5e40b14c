"""Distributions over the valid actions from a language model's scores or from its ranked list."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax

from priorzero.types import ActionPrior


def prior_from_scores(scores: np.ndarray, *, temperature: float) -> np.ndarray:
    """Normalise the actions' scores ``[K]`` (mean token log-probabilities) to log-probabilities ``[K]``, float32."""
    return log_softmax(np.asarray(scores, dtype=np.float64) / temperature).astype(np.float32)


def uniform_prior(num_actions: int, *, version: int) -> ActionPrior:
    """The fallback: all valid actions have the same probability."""
    logprobs = np.full(num_actions, -np.log(num_actions), dtype=np.float32)
    return ActionPrior(logprobs=logprobs, source="uniform", version=version)


_LIST_MARKER = re.compile(r"^\s*(?:[-*•>]+\s*|\(?\d+\s*[.):]\s*)+")
# Separates a chain of thought from the list that follows it.
ANSWER_HEADING = re.compile(r"(?:^|\n)\s*(?:final\s+)?(?:answer|ranking|commands?)\s*:", re.IGNORECASE)


def _normal_form(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())


def parse_ranking(completion: str, valid_actions: Sequence[str]) -> list[int]:
    """Positions in ``valid_actions`` of the actions in a ranked list, best first, each at most once.

    The list has one action on each line. Numbers, bullets, quotes and comments after a dash or colon are ignored. A
    single line may separate actions by commas or semicolons. If the text has "Answer:" headings (chain of thought),
    only the text after the last one is read. Lines that name no valid action are skipped.
    """
    headings = list(ANSWER_HEADING.finditer(completion))
    text = completion[headings[-1].end() :] if headings else completion
    by_form: dict[str, int] = {}
    for position, action in enumerate(valid_actions):
        by_form.setdefault(_normal_form(action), position)
    by_form.pop("", None)
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) == 1:
        whole_line = _match(lines[0], by_form)
        lines = lines if whole_line is not None else re.split(r"[,;]|\s(?=\d+[.)]\s)", lines[0])
    ranking: list[int] = []
    for line in lines:
        match = _match(line, by_form)
        if match is not None and match not in ranking:
            ranking.append(match)
    return ranking


def _match(line: str, by_form: dict[str, int]) -> int | None:
    """Position of the action that a line names, either as the whole line or before a comment."""
    bare = _LIST_MARKER.sub("", line)
    for candidate in (line, bare, re.split(r"\s[-–—]\s|:|\(", bare, maxsplit=1)[0]):
        position = by_form.get(_normal_form(candidate))
        if position is not None:
            return position
    return None


def prior_from_ranking(ranking: Sequence[int], num_actions: int, *, temperature: float) -> np.ndarray:
    """A ranked list as log-probabilities ``[K]``, float32. The weight of rank r is 1/r (Zipf's law).

    Actions that are not in the list share the weight of the rank after the last one.
    """
    weights = np.full(num_actions, 1.0 / ((len(ranking) + 1) * max(1, num_actions - len(ranking))))
    for rank, position in enumerate(ranking, start=1):
        weights[position] = 1.0 / rank
    return prior_from_scores(np.log(weights), temperature=temperature)


def agreement(prior: ActionPrior, visit_counts: np.ndarray) -> bool:
    """Whether the prior's most probable action is also the most visited one."""
    return int(prior.logprobs.argmax()) == int(visit_counts.argmax())


def entropy(probs: np.ndarray) -> float:
    """Entropy in nats of a distribution ``[K]``."""
    positive = probs[probs > 0].astype(np.float64)
    return float(-(positive * np.log(positive)).sum())
