"""Episodes in a terminal: the same numbers as in the pages, as text."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from priorzero.play.transcript import (
    EvaluationTranscript,
    Transcript,
    TranscriptStep,
    number_text,
    outcome,
    real_values,
    score_text,
)
from priorzero.play.watching import Viewer
from priorzero.runs.pages.episodes import describe

MAX_ACTIONS = 12  # that are listed in a step that is watched
BAR_WIDTH = 8  # characters
MIN_RANGE = 0.01  # of the Q-values that the bars show; smaller differences mean nothing
QUESTION = "your command (its number or text; Enter: the agent's choice; Ctrl-D: end): "


def printable(text: str) -> str:
    """A text for a terminal: control characters other than line breaks, which could move the cursor, are replaced."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def best_first(step: TranscriptStep) -> list[int]:
    """Positions of the valid actions, ``[K]``: the most visited first, then the most likely by the prior."""
    visits, priors = step["visit_counts"], step["prior_probs"]
    rank = [
        (visits[k] if visits else 0, (priors[k] or 0.0) if priors else 0.0) for k in range(len(step["valid_actions"]))
    ]
    return sorted(range(len(rank)), key=lambda k: (-rank[k][0], -rank[k][1], k))


def actions_table(step: TranscriptStep, *, limit: int | None = None, numbered: bool = False) -> Table:
    """The valid actions and the agent's numbers for each.

    Args:
        step: a decision.
        limit: at most this many actions; None for all.
        numbered: number them from 1.
    """
    table = Table(box=None, padding=(0, 1), header_style="bold")
    columns = _columns(step)
    for title in (*(["#"] if numbered else []), "action", *(title for title, _ in columns)):
        table.add_column(title, overflow="fold")
    order = best_first(step)
    for number, k in enumerate(order[:limit], 1):
        chosen = k == step["chosen"]
        cells = [Text(str(number))] if numbered else []
        cells.append(Text(("➤ " if chosen else "  ") + printable(step["valid_actions"][k])))
        table.add_row(*cells, *(cell(k) for _, cell in columns), style="bold yellow" if chosen else "")
    if limit is not None and len(order) > limit:
        table.add_row(Text(f"  and {len(order) - limit} more", style="dim"))
    return table


def _columns(step: TranscriptStep) -> list[tuple[str, Callable[[int], Text]]]:
    """Titles, and functions from the action's position to its cell. Columns without numbers are left out."""
    columns: list[tuple[str, Callable[[int], Text]]] = []
    for title, values in (("LLM prior", step["prior_probs"]), ("policy", step["policy_probs"])):
        if values is not None:
            columns.append((title, lambda k, values=values: _cell(f"{100 * (values[k] or 0):.0f}%", values[k])))  # type: ignore[misc]
    visits, q_values = step["visit_counts"], step["action_values"]
    if visits is not None:
        total = sum(visits)
        columns.append(("visits", lambda k: _cell(str(visits[k]), visits[k] / total)))
    if q_values is not None:
        known = [value for value in q_values if value is not None]
        low, high = min([0.0, *known]), max([0.0, *known])
        width = max(high - low, MIN_RANGE)
        columns.append(("Q", lambda k: _cell(_number(q_values[k]), ((q_values[k] or 0) - low) / width)))
    return columns


def _cell(text: str, share: float | None) -> Text:
    return Text(f"{text:>6} ").append("█" * round(BAR_WIDTH * (share or 0.0)), style="blue")


def _number(value: float | None) -> str:
    """Two decimals, without zeros at the end; two significant digits below 0.1; below 0.01 as ``-7e-5``."""
    if value is None:
        return "-"
    if value and abs(value) < 0.01:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if abs(value) < 0.1:
        return f"{value or 0.0:.2g}"
    return f"{value:.2f}".rstrip("0").rstrip(".")


def show_state(console: Console, step: TranscriptStep, *, number: int) -> None:
    """Print the text of the game before step ``number``, which counts from 1."""
    title = f"step {number}, score {number_text(step['score'])}"
    console.print(Panel(Text(printable(step["raw_obs_text"])), title=title, title_align="left"))


def show_step(
    console: Console, step: TranscriptStep, *, number: int, real_value: float | None = None, reward_scale: float = 1.0
) -> None:
    """Print a decision: the text of the game, the actions, the choice, and predictions beside what came true."""
    show_state(console, step, number=number)
    compared = Text(_compared(step, real_value, reward_scale=reward_scale), style="dim")
    console.print(Group(actions_table(step, limit=MAX_ACTIONS), compared, Text("")))


def _show_title(console: Console, title: str, *, reward_scale: float) -> None:
    console.print(Text(printable(title), style="bold"))
    if reward_scale != 1:
        note = f"All values and rewards are points times {number_text(reward_scale)} (train.reward_scale)."
        console.print(Text(note, style="dim"))


def _compared(step: TranscriptStep, real_value: float | None, *, reward_scale: float) -> str:
    parts = []
    if step["root_value"] is not None:
        parts.append(f"value: predicted {_number(step['predicted_value'])}, searched {_number(step['root_value'])}")
    if real_value is not None:
        parts.append(f"real value {_number(real_value)}")
    predicted = step.get("predicted_reward")
    reward = None if step["reward"] is None else step["reward"] * reward_scale
    parts.append(f"reward {_number(reward)}" + ("" if predicted is None else f" (predicted {_number(predicted)})"))
    return "; ".join(parts)


def show_end(console: Console, episode: Transcript) -> None:
    """Print the last text of an episode and its result."""
    result = f"{outcome(episode)}: {score_text(episode)}"
    console.print(Panel(Text(printable(episode["final_obs_text"])), title="end", subtitle=result, title_align="left"))


def show_episode(console: Console, episode: EvaluationTranscript) -> None:
    """Print a recorded episode as a whole."""
    scale = episode.get("reward_scale", 1.0)
    _show_title(console, f"{episode['game']}: {describe(episode)}", reward_scale=scale)
    real: Sequence[float | None] = real_values(episode) or [None] * len(episode["steps"])
    for number, (step, value) in enumerate(zip(episode["steps"], real, strict=True), 1):
        show_step(console, step, number=number, real_value=value, reward_scale=scale)
    show_end(console, episode)


def read_choice(step: TranscriptStep, answer: str) -> int | None:
    """The position of the action that a person typed: nothing for the agent's, its number in the table, or its text.

    None if it is none of these.
    """
    answer, order = " ".join(answer.split()).casefold(), best_first(step)
    if not answer:
        return step["chosen"]
    if answer.isdecimal() and len(answer) < 6 and 1 <= int(answer) <= len(order):
        return order[int(answer) - 1]
    texts = [" ".join(action.split()).casefold() for action in step["valid_actions"]]
    return texts.index(answer) if answer in texts else None


class TextViewer(Viewer):
    """Shows an episode of the agent while it is played. ``reward_scale`` is ``train.reward_scale``."""

    def __init__(self, console: Console, *, title: str, reward_scale: float) -> None:
        self._console = console
        self._number = 0  # of the last step
        self._reward_scale = reward_scale
        _show_title(console, title, reward_scale=reward_scale)

    def show(self, step: TranscriptStep) -> None:
        self._number += 1
        show_step(self._console, step, number=self._number, reward_scale=self._reward_scale)

    def end(self, episode: Transcript) -> None:
        show_end(self._console, episode)


class HumanViewer(TextViewer):
    """Lets a person play, beside the agent's advice. Commands are read from stdin; its end ends the episode."""

    is_human = True

    async def choose(self, step: TranscriptStep) -> int | None:
        self._number += 1
        show_state(self._console, step, number=self._number)
        self._console.print(actions_table(step, numbered=True))
        while True:
            self._console.print(Text(QUESTION), end="")
            answer = await asyncio.to_thread(sys.stdin.readline)  # the prior engine goes on meanwhile
            if not answer:
                self._console.print(Text("\nThe input has ended before the episode, which is not written."))
                return None
            if not sys.stdin.isatty():  # a terminal has shown what was typed, and the end of the line
                self._console.print(Text(printable(answer.rstrip("\n"))))
            if (chosen := read_choice(step, answer)) is not None:
                return chosen
            given = printable(answer.strip())
            self._console.print(Text(f"{given!r} is not in the list; type a number or a text from it"))

    def show(self, step: TranscriptStep) -> None:
        self._console.print(Text(f"{_compared(step, None, reward_scale=self._reward_scale)}\n", style="dim"))
