"""The one place that turns a game's state into the text an LLM is asked with, in collection and in training alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from priorzero.envs.history import without_loops
from priorzero.llm.packing import without_special_tokens
from priorzero.llm.priors import ANSWER_HEADING
from priorzero.settings import Settings
from priorzero.types import GameState, HistoryStep

SYSTEM = "You are an expert player of text adventure games. You choose commands that raise the score."
# Said here rather than at the end, where every prompt would have to be computed anew for it.
ANSWER_WITH_ONE = " Answer with the next command and nothing else."
ASK_ONE = "Next command?"
ASK_RANKING = (
    "Rank the {count} best commands for this moment, best first, one a line, numbered, each exactly as it is listed. "
    "Write nothing else."
)
ASK_RANKING_COT = (
    "First think in one or two sentences about what to do next. Then write a line 'Answer:' and below it the {count} "
    "best commands, best first, one a line, numbered, each exactly as it is listed."
)


# The walkthrough layout: a small model goes on with a list more sensibly than it answers a question, and an example
# shows it what such a list looks like.
SYSTEM_WALKTHROUGH = "You play text adventure games. Write the commands that reach the goal, one a line."
EXAMPLE_GOAL = (
    "Goal: Make sure the wooden chest is ajar, then pick up the lamp from the chest, go north and put the lamp on the "
    "table."
)
EXAMPLE_COMMANDS = "open wooden chest\ntake lamp from wooden chest\ngo north\nput lamp on table"


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        text: what the LLM is given, chat template and all; its answer follows directly.
        dropped_history: past decisions left out because the prompt would have been too long.
        over_length: the prompt is longer than allowed even without history (the observation is never cut).
    """

    text: str
    dropped_history: int = 0
    over_length: bool = False


@dataclass(frozen=True)
class PromptStyle:
    """What goes into a prompt.

    Attributes:
        mode: ``"score"`` asks for one command, ``"rank"`` for a list.
        use_cot: ask for a thought before the list.
        history_length: past decisions shown, at most; when there are more, the older half goes.
        max_tokens: length limit; the oldest history is dropped first.
        history_chars: characters of each past answer of the game that are shown; 0 shows past commands only.
        observation_chars: characters of what the game shows now; 0 shows all.
        list_commands: list the valid commands (``rank`` always does).
        layout: ``"transcript"`` asks a question about the game so far; ``"walkthrough"`` (``score`` only) has the LLM
            go on with a list of commands that it has begun.
        history: ``"all"`` past decisions, or ``"loop_free"``: without loops (:func:`~priorzero.envs.history.without_loops`).
        show_observation: show what the game shows now; games that state no goal show it in any case.
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
        """Whether an answer ends the LLM's turn; otherwise it ends a line."""
        return self.mode == "score" and self.layout == "transcript"


def prompt_style(settings: Settings) -> PromptStyle:
    """The prompt settings, as the renderer, the engine and the learner share them."""
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


def render_prompt(state: GameState, history: Sequence[HistoryStep], *, style: PromptStyle, tokenizer: Any) -> Prompt:
    """Render the question about one state. The same arguments give the same text.

    A prompt goes on where the one before it ended, so that an engine can reuse what it computed for that: first comes
    what never changes, then a transcript that only grows. It ends with the game's last answer, of which the first
    ``history_chars`` characters will stand in the next prompt as well; what belongs to this state alone (room,
    inventory, score, commands) comes last. The transcript is cut in large steps, because each cut makes the next prompt
    new from there on; with a ``history_length`` of 1 or 2 that is every step.

    Args:
        state: the state to decide in; its ``valid_actions`` must not be empty.
        history: earlier decisions of the episode, oldest first; at most the last ``history_length`` are shown.
        style: what goes in.
        tokenizer: gives the chat template and counts tokens.
    """
    if style.history == "loop_free":
        history = without_loops(history, now=state)
    shown = history[first_shown(len(history), style.history_length) :]
    chunk = _chunk(style.history_length)
    for dropped in [*range(0, len(shown), chunk), len(shown)]:
        # Not before the texts are put together: leaving the goal out of one could make a token of its two halves.
        messages = [
            {**message, "content": without_special_tokens(message["content"], tokenizer.all_special_tokens)}
            for message in build_messages(state, shown[dropped:], style=style)
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if style.layout == "walkthrough":
            commands = "".join(f"{step.action}\n" for step in shown[dropped:])
            text += without_special_tokens(commands, tokenizer.all_special_tokens)
        length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if length <= style.max_tokens:
            return Prompt(text, dropped_history=dropped)
    return Prompt(text, dropped_history=len(shown), over_length=True)


def first_shown(num_past: int, history_length: int) -> int:
    """Of ``num_past`` decisions the first to show; it moves on by half of ``history_length``, rounded up, at a time."""
    too_many = max(0, num_past - history_length)
    chunk = _chunk(history_length)
    return min(num_past, -(-too_many // chunk) * chunk)


def _chunk(history_length: int) -> int:
    return max(1, (history_length + 1) // 2)


def build_messages(state: GameState, history: Sequence[HistoryStep], *, style: PromptStyle) -> list[dict[str, str]]:
    """The prompt as chat messages, before the model's own template.

    In the walkthrough layout the commands of ``history`` are no message: they follow as the beginning of the answer.
    """
    if style.layout == "walkthrough":
        return _walkthrough_messages(state, style=style)
    lines = [_past(step, goal=state.goal, chars=style.history_chars) for step in history]
    now = _now(state, style=style)
    parts = [f"Goal: {_one_line(state.goal)}"] if state.goal else []
    parts.append("\n".join(["The game so far:", *lines, *([now] if now else [])]))
    parts.append(f"Score: {state.score:g} of {state.max_score:g}." if state.max_score else f"Score: {state.score:g}.")
    if style.list_commands or style.mode == "rank":
        parts.append("Possible commands:\n" + "\n".join(f"- {action}" for action in state.valid_actions))
    if style.mode == "score":
        parts.append(ASK_ONE)
    else:
        ask = ASK_RANKING_COT if style.use_cot else ASK_RANKING
        parts.append(ask.format(count=min(5, len(state.valid_actions))))
    system = SYSTEM + (ANSWER_WITH_ONE if style.mode == "score" else "")
    return [{"role": "system", "content": system}, {"role": "user", "content": "\n\n".join(parts)}]


def _walkthrough_messages(state: GameState, *, style: PromptStyle) -> list[dict[str, str]]:
    parts = [f"Goal: {_one_line(state.goal)}"] if state.goal else []
    now = _now(state, style=style)
    if style.list_commands:
        parts.append("Possible commands: " + ", ".join(state.valid_actions))
    return [
        {"role": "system", "content": SYSTEM_WALKTHROUGH},
        {"role": "user", "content": EXAMPLE_GOAL},
        {"role": "assistant", "content": EXAMPLE_COMMANDS},
        {"role": "user", "content": "\n".join([*parts, *([now] if now else [])]) or "Go on."},
    ]


def _now(state: GameState, *, style: PromptStyle) -> str:
    if state.goal and not style.show_observation:
        return ""
    return _clip(_one_line(_without_goal(state.raw_obs_text, state.goal)), style.observation_chars)


def _past(step: HistoryStep, *, goal: str, chars: int) -> str:
    earned = f" (reward {step.reward:+g})" if step.reward else ""
    command = f"> {step.action}{earned}"
    if chars == 0:
        return command
    said = _clip(_one_line(_without_goal(step.feedback, goal)), chars)
    return f"{said}\n{command}" if said else command


def _without_goal(text: str, goal: str) -> str:
    """The text without the goal, which the prompt states once, at its top."""
    return text.replace(goal, "").strip() if goal.strip() else text


def _clip(text: str, chars: int) -> str:
    return text[:chars].rstrip() + " ..." if 0 < chars < len(text) else text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def learning_context(prompt: str, completion: str | None, *, style: PromptStyle) -> str | None:
    """The text after which the LLM is taught to name an action.

    That is the prompt itself; with chain of thought it is the prompt and the thought that was written for it, up to and
    including the "Answer:" heading. None if there is no such line: then there is nothing to learn the answer after.
    """
    if not style.use_cot:
        return prompt
    ends = list(ANSWER_HEADING.finditer(completion or ""))
    if not ends:
        return None
    return prompt + (completion or "")[: ends[-1].end()] + "\n"


def completion_text(action: str, *, style: PromptStyle) -> str:
    """How an answer that puts ``action`` first begins; in ``score`` mode that is the whole answer."""
    if style.mode == "rank":
        return f"1. {action}\n"
    return action if style.layout == "transcript" else f"{action}\n"
