"""Renders the LLM's prompts and completions. Collection and training use the same functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from priorzero.envs.history import without_loops
from priorzero.llm.chat_template import control_tokens, render_messages
from priorzero.llm.packing import escape_special_tokens
from priorzero.llm.priors import ANSWER_HEADING
from priorzero.llm.tokenizing import token_ids
from priorzero.settings import Settings
from priorzero.types import Attempt, GameState, HistoryStep

SYSTEM = "You are an expert player of text adventure games. You choose commands that raise the score."
# Part of the system message, so that it belongs to the prefix that all prompts share (prefix caching).
ANSWER_WITH_ONE = " Answer with the next command and nothing else."
ASK_ONE = "Next command?"
ASK_ONE_COT = (
    "First think in one or two sentences about what to do next. Then write a line 'Answer:' and below it the next "
    "command."
)
ASK_RANKING = (
    "Rank the {count} best commands for this moment, best first, one a line, numbered, each exactly as it is listed. "
    "Write nothing else."
)
ASK_RANKING_COT = (
    "First think in one or two sentences about what to do next. Then write a line 'Answer:' and below it the {count} "
    "best commands, best first, one a line, numbered, each exactly as it is listed."
)


# The walkthrough layout: a small model continues a list more sensibly than it answers a question. The example shows the
# form of the list.
SYSTEM_WALKTHROUGH = "You play text adventure games. Write the commands that reach the goal, one a line."
EXAMPLE_GOAL = (
    "Goal: Make sure the wooden chest is ajar, then pick up the lamp from the chest, go north and put the lamp on the "
    "table."
)
EXAMPLE_COMMANDS = "open wooden chest\ntake lamp from wooden chest\ngo north\nput lamp on table"


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt, including the chat template; the LLM's completion follows directly."""

    text: str
    dropped_history: int = 0  # number of past decisions that were left out because the prompt was too long
    over_length: bool = False  # too long even without history (the observation is never cut to fit)


@dataclass(frozen=True, kw_only=True)
class PromptStyle:
    """What a prompt contains: the settings with these names in the groups ``prior`` and ``llm``.

    ``layout`` is ``llm.prompt_layout``; ``"walkthrough"`` is for ``score`` only. ``max_tokens`` is
    ``llm.prompt_max_len``.
    """

    mode: str
    use_cot: bool
    history_length: int
    max_tokens: int
    history_chars: int
    observation_chars: int
    list_commands: bool
    layout: str = "transcript"
    history: str = "all"
    show_observation: bool = True

    @property
    def ends_turn(self) -> bool:
        """Whether a completion ends with the end-of-turn token; otherwise it ends with a newline."""
        return self.mode == "score" and self.layout == "transcript"

    @property
    def generates(self) -> bool:
        """Whether the LLM generates text: a ranking, or a chain of thought, behind which the actions are scored."""
        return self.mode == "rank" or self.use_cot


def prompt_style(settings: Settings) -> PromptStyle:
    """The prompt style that the settings describe."""
    return PromptStyle(
        mode=settings.prior.mode,
        use_cot=settings.prior.use_cot,
        history_length=settings.llm.history_length,
        max_tokens=settings.llm.prompt_max_len,
        history_chars=settings.llm.history_chars,
        observation_chars=settings.llm.observation_chars,
        list_commands=settings.llm.list_commands,
        layout=settings.llm.prompt_layout,
        history=settings.llm.history,
        show_observation=settings.llm.show_observation,
    )


def render_prompt(
    state: GameState,
    history: Sequence[HistoryStep],
    *,
    style: PromptStyle,
    tokenizer: Any,
    attempts: Sequence[Attempt] = (),
) -> Prompt:
    """Render the prompt for a state, whose ``valid_actions`` must not be empty. Equal arguments give equal texts.

    ``history`` holds the earlier decisions of the episode, oldest first; at most the last ``history_length`` are shown.
    ``attempts`` is what earlier episodes taught about this place; all of them are shown.

    The text is laid out for prefix caching. The parts that never change come first, then a transcript that only grows,
    then the parts that depend on the current state alone (score, attempts, commands). The transcript ends with the
    current observation, whose first ``history_chars`` characters appear in the next prompt at the same place. The start
    of the transcript moves in large steps (:func:`first_shown`), because each move invalidates the prefix.
    """
    if style.history == "loop_free":
        history = without_loops(history, now=state)
    shown = history[first_shown(len(history), style.history_length) :]
    chunk = _chunk(style.history_length)
    for dropped in [*range(0, len(shown), chunk), len(shown)]:
        text = _render(state, shown[dropped:], style=style, tokenizer=tokenizer, attempts=attempts)
        if len(token_ids(tokenizer, text)) <= style.max_tokens:
            return Prompt(text, dropped_history=dropped)
    return Prompt(text, dropped_history=len(shown), over_length=True)


def _render(
    state: GameState,
    history: Sequence[HistoryStep],
    *,
    style: PromptStyle,
    tokenizer: Any,
    attempts: Sequence[Attempt],
) -> str:
    special_tokens = control_tokens(tokenizer)
    # Escaped after the messages are built, because removing the goal from a text can join two halves of a token.
    messages = [
        {**message, "content": escape_special_tokens(message["content"], special_tokens)}
        for message in build_messages(state, history, style=style, attempts=attempts)
    ]
    text = render_messages(tokenizer, messages)
    if style.layout == "walkthrough":
        text += escape_special_tokens("".join(f"{step.action}\n" for step in history), special_tokens)
    return text


def first_shown(num_past: int, history_length: int) -> int:
    """Index of the first of ``num_past`` decisions to show. It grows in steps of half of ``history_length``."""
    too_many = max(0, num_past - history_length)
    chunk = _chunk(history_length)
    return min(num_past, -(-too_many // chunk) * chunk)


def _chunk(history_length: int) -> int:
    return max(1, (history_length + 1) // 2)


def build_messages(
    state: GameState, history: Sequence[HistoryStep], *, style: PromptStyle, attempts: Sequence[Attempt] = ()
) -> list[dict[str, str]]:
    """The prompt as chat messages, before the model's chat template is applied.

    In the walkthrough layout the messages do not contain ``history``: its commands are the start of the LLM's turn.
    """
    if style.layout == "walkthrough":
        return _walkthrough_messages(state, style=style, attempts=attempts)
    lines = [_past_step(step, goal=state.goal, chars=style.history_chars) for step in history]
    observation = _current_observation(state, style=style)
    parts = [f"Goal: {_one_line(state.goal)}"] if state.goal else []
    parts.append("\n".join(["The game so far:", *lines, *([observation] if observation else [])]))
    parts.append(f"Score: {state.score:g} of {state.max_score:g}." if state.max_score else f"Score: {state.score:g}.")
    if attempts:
        parts.append(_past_attempts(attempts))
    if style.list_commands or style.mode == "rank":
        parts.append("Possible commands:\n" + "\n".join(f"- {action}" for action in state.valid_actions))
    if style.mode == "score":
        parts.append(ASK_ONE_COT if style.use_cot else ASK_ONE)
    else:
        ask = ASK_RANKING_COT if style.use_cot else ASK_RANKING
        parts.append(ask.format(count=min(5, len(state.valid_actions))))
    system = SYSTEM if style.generates else SYSTEM + ANSWER_WITH_ONE
    return [{"role": "system", "content": system}, {"role": "user", "content": "\n\n".join(parts)}]


def _walkthrough_messages(state: GameState, *, style: PromptStyle, attempts: Sequence[Attempt]) -> list[dict[str, str]]:
    parts = [f"Goal: {_one_line(state.goal)}"] if state.goal else []
    observation = _current_observation(state, style=style)
    if style.list_commands:
        parts.append("Possible commands: " + ", ".join(state.valid_actions))
    if observation:
        parts.append(observation)
    if attempts:
        parts.append(_past_attempts(attempts))
    return [
        {"role": "system", "content": SYSTEM_WALKTHROUGH},
        {"role": "user", "content": EXAMPLE_GOAL},
        {"role": "assistant", "content": EXAMPLE_COMMANDS},
        {"role": "user", "content": "\n".join(parts) or "Go on."},
    ]


def _current_observation(state: GameState, *, style: PromptStyle) -> str:
    if state.goal and not style.show_observation:
        return ""
    return _shorten(state.raw_obs_text, goal=state.goal, chars=style.observation_chars)


def _past_attempts(attempts: Sequence[Attempt]) -> str:
    """One line: ``In this place, earlier attempts: "open egg" earned 5 points; "go north" ended the game.``"""
    return f"In this place, earlier attempts: {'; '.join(map(_past_attempt, attempts))}."


def _past_attempt(attempt: Attempt) -> str:
    earned = [f"earned {attempt.points:g} point{'' if attempt.points == 1 else 's'}"] if attempt.points else []
    outcome = " and ".join([*earned, *(["ended the game"] if attempt.lost_game else [])])
    return f'"{attempt.action}" {outcome}'


def _past_step(step: HistoryStep, *, goal: str, chars: int) -> str:
    earned = f" (reward {step.reward:+g})" if step.reward else ""
    command = f"> {step.action}{earned}"
    if chars == 0:
        return command
    observation = _shorten(step.feedback, goal=goal, chars=chars)
    return f"{observation}\n{command}" if observation else command


def _shorten(text: str, *, goal: str, chars: int) -> str:
    """One line of at most ``chars`` characters (0: all), without the goal, which the prompt states only once."""
    text = _one_line(text.replace(goal, "") if goal.strip() else text)
    return text[:chars].rstrip() + " ..." if 0 < chars < len(text) else text


def _one_line(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class Thought:
    """The LLM's chain of thought in ``score`` mode. The prompt and ``text`` are the context of the actions."""

    text: str  # ends with the line "Answer:"
    has_heading: bool  # False if the LLM wrote no such heading, and it was appended


def read_thought(generated: str, *, tokenizer: Any) -> Thought:
    """The thought in a generated text: all before the first "Answer:" heading, then this heading.

    What the LLM wrote below the heading is dropped. The heading always has the same form, so that the log-probabilities
    of the actions do not depend on how the LLM writes it. Text that would be read as a special token is escaped.
    """
    heading = ANSWER_HEADING.search(generated)
    thought = generated if heading is None else generated[: heading.start()]
    thought = escape_special_tokens(thought, control_tokens(tokenizer)).strip()
    return Thought(f"{thought}\nAnswer:\n" if thought else "Answer:\n", heading is not None)


def training_context(prompt: str, completion: str | None, *, style: PromptStyle) -> str | None:
    """The text after which the LLM is trained to write an action. In ``score`` mode, the actions were scored behind it.

    It is the prompt. With chain of thought it is the prompt and the completion's thought, up to and including the last
    "Answer:" heading; None if there is no such heading.
    """
    if not style.use_cot:
        return prompt
    headings = list(ANSWER_HEADING.finditer(completion or ""))
    if not headings:
        return None
    return prompt + (completion or "")[: headings[-1].end()] + "\n"


def completion_text(action: str, *, style: PromptStyle) -> str:
    """The start of a completion that chooses ``action``; the whole completion in ``score`` mode."""
    if style.mode == "rank":
        return f"1. {action}\n"
    return action if style.layout == "transcript" else f"{action}\n"
