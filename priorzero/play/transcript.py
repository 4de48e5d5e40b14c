"""Transcripts: the decisions of an episode as plain data, and the file that holds those of the last evaluation.

``last_evaluation.json`` in a run's folder contains, as strict JSON (no NaN)::

    {"format": 1, "env_step": 200, "episodes": [EvaluationTranscript, ...]}

Everything that reads or writes transcripts uses the functions of this module. It imports neither torch nor a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from priorzero.runtime.paths import replace_text
from priorzero.types import GameState

if TYPE_CHECKING:
    from priorzero.play.player import Decision

FORMAT = 1


class TranscriptStep(TypedDict):
    """One decision and its reward. Lists are over the K valid actions, in the game's order.

    Attributes:
        raw_obs_text: the text of the game before the action.
        score: points before the action.
        valid_actions: the valid actions, ``[K]``.
        prior_probs: the LLM's prior, ``[K]``; None if the decision used no LLM.
        prior_source: ``score``, ``rank`` or ``uniform`` (fallback); None likewise.
        prompt: the LLM's prompt; None likewise.
        policy_probs: the world model's policy, ``[K]``; None without a search.
        visit_counts: visit counts of the search, ``[K]``; None likewise.
        action_values: the search's value of each action, ``[K]``, None for actions without visits; None likewise.
        predicted_value: the world model's value of the state, before the search; None likewise.
        root_value: value of the state after the search; None likewise.
        chosen: position of the chosen action in ``valid_actions``.
        behaviour_prob: probability with which it was sampled; 1 if it was not sampled.
        reward: points that it gained.
    """

    raw_obs_text: str
    score: float | None
    valid_actions: list[str]
    prior_probs: list[float | None] | None
    prior_source: str | None
    prompt: str | None
    policy_probs: list[float | None] | None
    visit_counts: list[int] | None
    action_values: list[float | None] | None
    predicted_value: float | None
    root_value: float | None
    chosen: int
    behaviour_prob: float | None
    reward: float | None


class Transcript(TypedDict):
    """An episode that has ended.

    Attributes:
        steps: its decisions.
        final_obs_text: the text of the game after the last action.
        total_reward: undiscounted return.
        score: the game's score at the end.
        max_score: the largest possible score; 0 if the game does not say.
        won: the episode ended with a win.
        truncated: the episode was ended by the limit of moves.
    """

    steps: list[TranscriptStep]
    final_obs_text: str
    total_reward: float | None
    score: float | None
    max_score: float | None
    won: bool
    truncated: bool


class EvaluationTranscript(Transcript):
    """The first episode of an evaluation: of ``mode``, on ``game``, which is ``unseen`` if it is not trained on."""

    mode: str
    game: str
    unseen: bool


def transcript_step(decision: Decision, *, reward: float) -> TranscriptStep:
    """A decision and the points that its action gained, as plain data."""
    state, prior, result = decision.state, decision.prior, decision.result
    return {
        "raw_obs_text": state.raw_obs_text,
        "score": _number(state.score),
        "valid_actions": list(state.valid_actions),
        "prior_probs": _numbers(np.exp(prior.logprobs.astype(np.float64))) if prior is not None else None,
        "prior_source": prior.source if prior is not None else None,
        "prompt": decision.prompt.text if decision.prompt is not None else None,
        "policy_probs": _numbers(_softmax(result.policy_logits)) if result is not None else None,
        "visit_counts": [int(count) for count in result.visit_counts] if result is not None else None,
        "action_values": _numbers(result.action_values) if result is not None else None,
        "predicted_value": _number(result.predicted_value) if result is not None else None,
        "root_value": _number(result.root_value) if result is not None else None,
        "chosen": decision.chosen,
        "behaviour_prob": _number(decision.behaviour_prob),
        "reward": _number(reward),
    }


def transcript(steps: Sequence[TranscriptStep], *, final: GameState, total_reward: float) -> Transcript:
    """The transcript of an episode that ended in the state ``final``."""
    return {
        "steps": list(steps),
        "final_obs_text": final.raw_obs_text,
        "total_reward": _number(total_reward),
        "score": _number(final.score),
        "max_score": _number(final.max_score),
        "won": final.won,
        "truncated": final.truncated,
    }


def write_transcripts(path: Path, episodes: Iterable[EvaluationTranscript], *, env_step: int) -> None:
    """Write the transcripts of an evaluation at ``env_step``. The file is replaced as a whole.

    Raises:
        OSError: the file cannot be written. The previous one is unchanged.
    """
    content = {"format": FORMAT, "env_step": env_step, "episodes": list(episodes)}
    replace_text(path, json.dumps(content, ensure_ascii=False, allow_nan=False))


def read_transcripts(path: Path) -> tuple[int, list[EvaluationTranscript]]:
    """The environment step of the evaluation, and its transcripts.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not valid JSON, or has another format.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path.name} does not have the format {FORMAT}")
    return content["env_step"], content["episodes"]


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def _number(value: Any) -> float | None:
    """A number with six significant digits; None if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _numbers(values: Iterable[Any]) -> list[float | None]:
    return [_number(value) for value in values]
