"""Episodes as pages, one file each, and the data from which a page's script shows them."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from priorzero.play.transcript import ALL_MODE_NAMES, EvaluationTranscript, outcome, real_values, score_text
from priorzero.runs.pages import make_environment
from priorzero.runtime.paths import replace_text

MAX_CHARS = 4_500_000  # of the data in a page
LARGE = "This page is larger than usual."


def episode_data(episodes: Sequence[EvaluationTranscript], *, max_chars: int = MAX_CHARS) -> tuple[Markup, str, str]:
    """The data of ``player.js``, as JSON for a page.

    If it has more than ``max_chars`` characters, the prompts are left out, and then the search trees.

    Returns:
        The data; a note about what was left out, "" for nothing; and a note if the data are still too large, or "".
    """
    plain: list[dict[str, Any]] = [
        {**episode, "real_values": real_values(episode), "outcome": outcome(episode)} for episode in episodes
    ]
    data, left_out = _page_json(plain), list[str]()
    for key, name in (("prompt", "prompts"), ("tree", "search trees")):
        if len(data) <= max_chars or not any(step.get(key) for episode in plain for step in episode["steps"]):
            continue
        for episode in plain:
            episode["steps"] = [{**step, key: None} for step in episode["steps"]]
        data = _page_json(plain)
        left_out.append(f"the {name}")
    note = f"{' and '.join(left_out).capitalize()} are too long for this page." if left_out else ""
    return data, note, LARGE if len(data) > max_chars else ""


def _page_json(episodes: Sequence[dict[str, Any]]) -> Markup:
    """JSON that can stand in a page: the characters that mean something in HTML are escaped."""
    content = {"episodes": episodes, "modes": ALL_MODE_NAMES}
    return htmlsafe_json_dumps(content, separators=(",", ":"), allow_nan=False)


def describe(episode: EvaluationTranscript) -> str:
    """Who played an episode, which one it is, and its result, in one line."""
    parts = [ALL_MODE_NAMES.get(episode["mode"], episode["mode"]), "unseen game" if episode["unseen"] else ""]
    parts += [f"episode {episode['episode']}"] if "episode" in episode else []
    parts += [f"after {episode['env_step']:,} environment steps of training"] if "env_step" in episode else []
    parts += [f"seed {episode['seed']}"] if "seed" in episode else []
    parts += [score_text(episode)] if episode["score"] is not None else []
    parts.append(f"{len(episode['steps'])} steps")
    return ", ".join(filter(None, parts))


def render_episode(episode: EvaluationTranscript) -> str:
    """The page of an episode, as HTML."""
    data, *notes = episode_data([episode])
    return (
        _environment()
        .get_template("episode.html")
        .render(
            episode=episode,
            title=f"{episode['game']}, {describe(episode)}",
            about=describe(episode),
            state=("done" if episode["won"] else "ended", outcome(episode)),
            note=" ".join(filter(None, notes)),
            data=data,
            reward_scale=episode.get("reward_scale", 1),
        )
    )


def write_episodes(episodes: Sequence[EvaluationTranscript], folder: Path, *, stem: str = "") -> list[Path]:
    """Write a page for each episode into ``folder``, which is created.

    Args:
        stem: name of the file of a single episode; "": the names are made of game, mode, environment steps, seed and
            number, as far as they are known.

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
    parts = [game, episode["mode"]]
    parts += [f"step{episode['env_step']}"] if "env_step" in episode else []
    parts += [f"seed{episode['seed']}"] if "seed" in episode else []
    return "_".join([*parts, str(episode.get("episode", number))])


@functools.cache
def _environment() -> Environment:
    return make_environment()
