"""From what a language model said to a distribution over the valid actions, and from there to root logits."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax

from priorzero.types import ActionPrior


def prior_from_scores(scores: np.ndarray, *, temperature: float) -> np.ndarray:
    """Action log-probabilities ``[K]`` (sum or mean over tokens) as a normalised log-distribution ``[K]``, float32."""
    return log_softmax(np.asarray(scores, dtype=np.float64) / temperature).astype(np.float32)


def uniform_prior(num_actions: int, *, version: int) -> ActionPrior:
    """The fallback: every valid action alike."""
    logprobs = np.full(num_actions, -np.log(num_actions), dtype=np.float32)
    return ActionPrior(logprobs=logprobs, source="uniform", version=version)


_MARKER = re.compile(r"^\s*(?:[-*•>]+\s*|\(?\d+\s*[.):]\s*)+")
# What separates a thought from the list behind it.
ANSWER_HEADING = re.compile(r"(?:^|\n)\s*(?:final\s+)?(?:answer|ranking|commands?)\s*:", re.IGNORECASE)


def _normal_form(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())


def parse_ranking(completion: str, valid_actions: Sequence[str]) -> list[int]:
    """Positions in ``valid_actions`` of the actions that a ranked list names, best first, each at most once.

    Reads one action a line, with or without numbers, bullets, quotes and comments behind a dash or colon; a single
    line may separate actions by commas or semicolons. With several "Answer:" headings (chain of thought), the text
    behind the last one counts. Lines that name no valid action are passed over.
    """
    headings = list(ANSWER_HEADING.finditer(completion))
    text = completion[headings[-1].end() :] if headings else completion
    by_form: dict[str, int] = {}
    for position, action in enumerate(valid_actions):
        by_form.setdefault(_normal_form(action), position)
    by_form.pop("", None)
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) == 1:
        whole = _match(lines[0], by_form)
        lines = lines if whole is not None else re.split(r"[,;]|\s(?=\d+[.)]\s)", lines[0])
    ranking: list[int] = []
    for line in lines:
        named = _match(line, by_form)
        if named is not None and named not in ranking:
            ranking.append(named)
    return ranking


def _match(line: str, by_form: dict[str, int]) -> int | None:
    """The action a line names: the whole line, or the part before a comment."""
    bare = _MARKER.sub("", line)
    for candidate in (line, bare, *(re.split(r"\s[-–—]\s|:|\(", bare, maxsplit=1)[:1])):
        position = by_form.get(_normal_form(candidate))
        if position is not None:
            return position
    return None


def prior_from_ranking(ranking: Sequence[int], num_actions: int, *, temperature: float) -> np.ndarray:
    """A ranked list as a log-distribution ``[K]``, float32: weight 1/1, 1/2, 1/3 ... by place (Zipf).

    Actions that were not named share what the place behind the last one would get.
    """
    weights = np.full(num_actions, 1.0 / ((len(ranking) + 1) * max(1, num_actions - len(ranking))))
    for place, position in enumerate(ranking, start=1):
        weights[position] = 1.0 / place
    return prior_from_scores(np.log(weights), temperature=temperature)


def agreement(prior: ActionPrior, visit_counts: np.ndarray) -> bool:
    """Whether the prior's first choice is the search's."""
    return int(prior.logprobs.argmax()) == int(visit_counts.argmax())


def entropy(probs: np.ndarray) -> float:
    """Entropy in nats of a distribution ``[K]``."""
    positive = probs[probs > 0].astype(np.float64)
    return float(-(positive * np.log(positive)).sum())
