"""Transcripts of evaluation episodes as plain text and as rows of a table."""

from __future__ import annotations

from typing import Any

from priorzero.play.transcript import EvaluationTranscript, outcome, score_text

MAX_STEPS = 200  # steps of an episode that are written; last_evaluation.json has all
MAX_CHARACTERS = 600  # of a game's reply
COLUMNS = ("mode", "game", "unseen", "step", "text", "action", "reward", "score", "value")


def episode_name(episode: EvaluationTranscript) -> str:
    """``MODE/GAME``, or ``unseen_MODE/GAME`` for a game that is not trained on."""
    return f"{'unseen_' if episode['unseen'] else ''}{episode['mode']}/{episode['game']}"


def episode_text(episode: EvaluationTranscript) -> str:
    """An episode as a reader of the game sees it: replies, commands behind ``>``, points in brackets."""
    steps = episode["steps"]
    lines = [f"{len(steps)} steps, {score_text(episode)}, {outcome(episode)}", ""]
    for step in steps[:MAX_STEPS]:
        reward = f"  [{step['reward']:+g}]" if step["reward"] else ""
        lines += [_shortened(step["raw_obs_text"]), "", f"> {step['valid_actions'][step['chosen']]}{reward}", ""]
    if len(steps) > MAX_STEPS:
        return "\n".join([*lines, f"({len(steps) - MAX_STEPS} more steps are in last_evaluation.json)"])
    return "\n".join([*lines, _shortened(episode["final_obs_text"])])


def episode_rows(episode: EvaluationTranscript) -> list[list[Any]]:
    """An episode as rows with :data:`COLUMNS`, one for each step. ``value`` is the root value of the search."""
    return [
        [
            episode["mode"],
            episode["game"],
            episode["unseen"],
            number,
            _shortened(step["raw_obs_text"]),
            step["valid_actions"][step["chosen"]],
            step["reward"],
            step["score"],
            step["root_value"],
        ]
        for number, step in enumerate(episode["steps"][:MAX_STEPS])
    ]


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ..."
