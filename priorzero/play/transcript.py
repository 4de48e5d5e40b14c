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
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np

from priorzero.runtime.paths import replace_text
from priorzero.search.base import SearchNode
from priorzero.settings import MODE_NAMES, Settings
from priorzero.types import GameState

if TYPE_CHECKING:
    from priorzero.play.player import Decision

FORMAT = 1
# Keys that files of earlier versions, or of evaluations, do not have.
OPTIONAL = {"tree", "predicted_reward", "discount_factor", "reward_scale", "episode", "env_step", "seed"}
TRAINING, HUMAN = "training", "human"  # modes besides those of an evaluation
ALL_MODE_NAMES = {**MODE_NAMES, TRAINING: "training, with exploration", HUMAN: "a person"}


class TreeNode(TypedDict):
    """An action of the search tree that was visited; see :class:`priorzero.search.base.SearchNode`."""

    action: str
    prior: float | None
    visit_count: int
    reward: float | None
    action_value: float | None
    children: list[TreeNode]


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
        tree: the first levels of the search tree; None unless the episode is recorded (``run.record_every``,
            ``python -m priorzero.watch``).
        predicted_reward: the world model's reward of the chosen action, from the tree; None without it.
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
    tree: NotRequired[list[TreeNode] | None]
    predicted_reward: NotRequired[float | None]
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
        discount_factor, reward_scale: ``search.discount_factor`` and ``train.reward_scale``, with which predictions can
            be compared with the rewards. Earlier versions did not write them.
    """

    steps: list[TranscriptStep]
    final_obs_text: str
    total_reward: float | None
    score: float | None
    max_score: float | None
    won: bool
    truncated: bool
    discount_factor: NotRequired[float]
    reward_scale: NotRequired[float]


class EvaluationTranscript(Transcript):
    """An episode of ``mode`` on ``game``, which is ``unseen`` if it is not trained on.

    Attributes:
        mode: one of ``eval.modes``, or :data:`TRAINING` or :data:`HUMAN`.
        episode: number of the training episode in its run, or of the episode that was watched, from 1.
        env_step: environment steps of the run at the end of the training episode, or in the checkpoint that played.
        seed: ``run.seed`` of the episode that was watched.
    """

    mode: str
    game: str
    unseen: bool
    episode: NotRequired[int]
    env_step: NotRequired[int]
    seed: NotRequired[int]


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
        "tree": _tree(decision),
        "predicted_reward": _predicted_reward(decision),
        "chosen": decision.chosen,
        "behaviour_prob": _number(decision.behaviour_prob),
        "reward": _number(reward),
    }


def _tree(decision: Decision) -> list[TreeNode] | None:
    result, texts = decision.result, decision.action_texts
    if result is None or result.tree is None or texts is None:
        return None

    def plain(nodes: Sequence[SearchNode]) -> list[TreeNode]:
        return [
            {
                "action": texts[node.action],
                "prior": _number(node.prior),
                "visit_count": node.visit_count,
                "reward": _number(node.reward),
                "action_value": _number(node.action_value),
                "children": plain(node.children),
            }
            for node in nodes
        ]

    return plain(result.tree)


def _predicted_reward(decision: Decision) -> float | None:
    """None if the chosen action was not visited, too."""
    tree = decision.result.tree if decision.result is not None else None
    return next((_number(node.reward) for node in tree or () if node.action == decision.action_index), None)


def transcript(
    steps: Sequence[TranscriptStep], *, final: GameState, total_reward: float, settings: Settings
) -> Transcript:
    """The transcript of an episode that ended in the state ``final``."""
    return {
        "steps": list(steps),
        "final_obs_text": final.raw_obs_text,
        "total_reward": _number(total_reward),
        "score": _number(final.score),
        "max_score": _number(final.max_score),
        "won": final.won,
        "truncated": final.truncated,
        "discount_factor": settings.search.discount_factor,
        "reward_scale": settings.train.reward_scale,
    }


def real_values(episode: Transcript) -> list[float | None] | None:
    """What the predicted values estimate: the discounted, scaled rewards from each step to the end of the episode.

    After a truncation they contain less than the predictions, which look beyond it. None if the transcript does not
    have the discount factor; the values before a reward that is not finite are None.
    """
    if "discount_factor" not in episode or "reward_scale" not in episode:
        return None
    value, values = 0.0, []
    for step in reversed(episode["steps"]):
        reward = step["reward"]
        value = math.nan if reward is None else episode["reward_scale"] * reward + episode["discount_factor"] * value
        values.append(_number(value))
    return values[::-1]


def outcome(episode: Transcript) -> str:
    """How an episode ended, in words."""
    if episode["won"]:
        return "won"
    return "limit of moves reached" if episode["truncated"] else "ended without a win"


def score_text(episode: Transcript) -> str:
    """``score 5 of 10``, or ``score 5`` if the largest possible score is not known."""
    maximum = episode["max_score"]
    return f"score {number_text(episode['score'])}" + (f" of {number_text(maximum)}" if maximum else "")


def number_text(value: float | None) -> str:
    """A number with at most six significant digits, or ``-``."""
    return "-" if value is None else f"{value:g}"


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
    env_step, episodes = content.get("env_step"), content.get("episodes")
    if not isinstance(env_step, int) or not isinstance(episodes, list):
        raise ValueError(f"{path.name} has no env_step or no episodes")
    for number, episode in enumerate(episodes, 1):
        if (problem := _problem(episode)) is not None:
            raise ValueError(f"{path.name}: episode {number} {problem}")
    return env_step, episodes


def _problem(episode: Any) -> str | None:
    """What is wrong with a transcript that was read from a file; None if it has all that its type requires."""
    if not isinstance(episode, dict) or not isinstance(episode.get("steps"), list):
        return "has no steps"
    if missing := sorted(EvaluationTranscript.__annotations__.keys() - OPTIONAL - episode.keys()):
        return f"has no {missing[0]}"
    for name in ("score", "max_score", "total_reward"):
        if not isinstance(episode[name], (int, float, type(None))):
            return f"has a {name} that is no number"
    for n, step in enumerate(episode["steps"], 1):
        if not isinstance(step, dict):
            return f"has no content in step {n}"
        if missing := sorted(TranscriptStep.__annotations__.keys() - OPTIONAL - step.keys()):
            return f"has no {missing[0]} in step {n}"
        if not isinstance(step["valid_actions"], list) or step["chosen"] not in range(len(step["valid_actions"])):
            return f"has no chosen action in step {n}"
    return None


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def _number(value: Any) -> float | None:
    """A number with six significant digits; None if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _numbers(values: Iterable[Any]) -> list[float | None]:
    return [_number(value) for value in values]
