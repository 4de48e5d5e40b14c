"""Episodes as pages, one file each, and the data from which a page's script shows them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from priorzero.play.transcript import ALL_MODE_NAMES, EvaluationTranscript, Transcript, real_values
from priorzero.runs.pages import make_environment
from priorzero.runtime.paths import replace_text

MAX_CHARS = 4_500_000  # of the data in a page
PROMPTS_LEFT_OUT = "The prompts are too long for this page."
TREES_LEFT_OUT = "The prompts and the search trees are too long for this page."


def episode_data(episodes: Sequence[EvaluationTranscript], *, max_chars: int = MAX_CHARS) -> tuple[dict[str, Any], str]:
    """The data of ``player.js``, and a note if something was left out.

    If the data have more than ``max_chars`` characters, the prompts are left out, and then the search trees.
    """
    plain: list[dict[str, Any]] = [{**episode, "real_values": real_values(episode)} for episode in episodes]
    data, note = {"episodes": plain, "modes": ALL_MODE_NAMES}, ""
    for key, left_out in (("prompt", PROMPTS_LEFT_OUT), ("tree", TREES_LEFT_OUT)):
        if len(json.dumps(data, separators=(",", ":"))) <= max_chars:
            break
        note = left_out
        for episode in plain:
            episode["steps"] = [{**step, key: None} for step in episode["steps"]]
    return data, note


def outcome(episode: Transcript) -> str:
    """How an episode ended, in words."""
    if episode["won"]:
        return "won"
    return "limit of moves" if episode["truncated"] else "ended without a win"


def describe(episode: EvaluationTranscript) -> str:
    """Who played an episode, which one it is, and its result, in one line."""
    parts = [ALL_MODE_NAMES.get(episode["mode"], episode["mode"]), "unseen game" if episode["unseen"] else ""]
    parts += [f"episode {episode['episode']}"] if "episode" in episode else []
    parts += [f"after {episode['env_step']:,} environment steps of training"] if "env_step" in episode else []
    score, best = episode["score"], episode["max_score"]
    if score is not None:
        parts.append(f"score {score:g} of {best:g}" if best else f"score {score:g}")
    parts.append(f"{len(episode['steps'])} steps")
    return ", ".join(filter(None, parts))


def render_episode(episode: EvaluationTranscript) -> str:
    """The page of an episode, as HTML."""
    data, note = episode_data([episode])
    return (
        _environment()
        .get_template("episode.html")
        .render(
            episode=episode,
            title=f"{episode['game']}, {describe(episode)}",
            about=describe(episode),
            state=("done" if episode["won"] else "ended", outcome(episode)),
            note=note,
            data=data,
            reward_scale=episode.get("reward_scale", 1),
        )
    )


def write_episodes(episodes: Sequence[EvaluationTranscript], folder: Path, *, stem: str = "") -> list[Path]:
    """Write a page for each episode into ``folder``, which is created.

    Args:
        stem: name of the file of a single episode; "": the names are made of game, mode and number.

    Returns:
        The paths.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, episode in enumerate(episodes, 1):
        name = stem if stem and len(episodes) == 1 else _file_name(episode, number)
        path = folder / f"{name}.html"
        replace_text(path, render_episode(episode))
        paths.append(path)
    return paths


def _file_name(episode: EvaluationTranscript, number: int) -> str:
    game = re.sub(r"[^\w.+-]+", "_", episode["game"], flags=re.ASCII)[:80].strip("_.") or "game"
    return f"{game}_{episode['mode']}_{episode.get('episode', number)}"


@functools.cache
def _environment() -> Environment:
    return make_environment()
