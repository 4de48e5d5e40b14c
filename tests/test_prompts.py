"""Tests of the prompts and completions of the LLM."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from priorzero.llm.prompts import (
    PromptStyle,
    build_messages,
    completion_text,
    first_shown,
    read_thought,
    render_prompt,
    training_context,
)
from priorzero.types import Attempt, GameState, HistoryStep

STATE = GameState(
    feedback="Behind House\nA window is slightly ajar.",
    valid_actions=("open window", "go north"),
    score=10.0,
    max_score=350.0,
    moves=4,
    inventory="You are carrying a leaflet.",
    goal="Find the twenty treasures.",
)
HISTORY = [HistoryStep(f"Room number {t}", f"command {t}", float(t)) for t in range(6)]
STYLE = PromptStyle(
    mode="score",
    use_cot=False,
    history_length=3,
    max_tokens=2000,
    history_chars=300,
    observation_chars=0,
    list_commands=True,
)


def user_message(state=STATE, history=HISTORY[-3:], **changes):
    return build_messages(state, history, style=dataclasses.replace(STYLE, **changes))[1]["content"]


def test_build_messages_contains_every_part_in_the_cached_order():
    text = user_message()
    parts = [
        "Find the twenty treasures.",
        "Room number 3\n> command 3 (reward +3)",
        "Room number 4\n> command 4 (reward +4)",
        "Room number 5\n> command 5 (reward +5)",
        "Behind House A window is slightly ajar.",
        "You are carrying a leaflet.",
        "Score: 10 of 350.",
        "- open window\n- go north",
    ]
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)


def test_build_messages_follows_the_style():
    assert "Room number" not in user_message(history_chars=0) and "> command 5 (reward +5)" in user_message(
        history_chars=0
    )
    assert "Room n ...\n> command 5" in user_message(history_chars=6)
    assert "Behind ..." in user_message(observation_chars=6) and "window is" not in user_message(observation_chars=6)
    assert "- go north" not in user_message(list_commands=False)
    assert "- go north" in user_message(list_commands=False, mode="rank")
    assert "Answer:" in user_message(mode="rank", use_cot=True) and "Answer:" not in user_message(mode="rank")
    assert user_message(use_cot=True).endswith("Then write a line 'Answer:' and below it the next command.")
    assert "reward" not in user_message(history=[HistoryStep("x", "y", 0.0)])
    assert "Goal" not in user_message(dataclasses.replace(STATE, goal=""))


@pytest.mark.parametrize(
    ("mode", "use_cot", "only_a_command"),
    [("score", False, True), ("score", True, False), ("rank", False, False), ("rank", True, False)],
)
def test_build_messages_asks_for_a_command_alone_only_without_a_thought(mode, use_cot, only_a_command):
    style = dataclasses.replace(STYLE, mode=mode, use_cot=use_cot)
    system = build_messages(STATE, [], style=style)[0]["content"]
    assert ("the next command and nothing else" in system) == only_a_command and style.generates != only_a_command


ATTEMPTS = [Attempt("open egg", 5.0), Attempt("wait", 1.0, True), Attempt("go north", 0.0, True)]
ATTEMPTS_LINE = (
    'In this place, earlier attempts: "open egg" earned 5 points; "wait" earned 1 point and ended the game; '
    '"go north" ended the game.'
)


def test_build_messages_tells_earlier_attempts_after_the_score():
    _, message = build_messages(STATE, HISTORY[-1:], style=STYLE, attempts=ATTEMPTS)
    assert message["content"] == (
        "Goal: Find the twenty treasures.\n\n"
        "The game so far:\nRoom number 5\n> command 5 (reward +5)\n"
        "Behind House A window is slightly ajar. You are carrying a leaflet.\n\n"
        f"Score: 10 of 350.\n\n{ATTEMPTS_LINE}\n\n"
        "Possible commands:\n- open window\n- go north\n\nNext command?"
    )
    assert message["content"].replace(f"{ATTEMPTS_LINE}\n\n", "") == user_message(history=HISTORY[-1:])


def test_build_messages_states_the_goal_once():
    state = dataclasses.replace(STATE, feedback=f"{STATE.goal}\nBehind House")
    text = user_message(state, [HistoryStep(f"{STATE.goal} Kitchen", "look", 0.0)])
    assert text.count(STATE.goal) == 1 and "Kitchen" in text and "Behind House" in text


def test_render_prompt_shows_at_most_history_length_decisions(smollm2):
    def text(n):
        style = dataclasses.replace(STYLE, history_length=n)
        return render_prompt(STATE, HISTORY, style=style, tokenizer=smollm2.tokenizer).text

    assert "command 4" in text(3) and "command 1" not in text(3)
    assert "> command" not in text(0)
    assert "command 0" in text(20)


@given(num_past=st.integers(0, 60), history_length=st.integers(0, 12))
def test_first_shown_grows_in_steps_of_half_the_history(num_past, history_length):
    first = first_shown(num_past, history_length)
    assert 0 <= num_past - first <= history_length
    if num_past > history_length:
        assert num_past - first >= history_length // 2  # drops at most half, rounded up
    later = [first_shown(num_past + n, history_length) for n in range(max(1, (history_length + 1) // 2))]
    assert len(set(later)) <= 2  # grows at most once within half a history


def test_build_messages_extends_the_previous_prompt():
    """Up to the current observation, the prompt equals the beginning of the next one."""
    states = [dataclasses.replace(STATE, feedback=f"Room number {t}. " + "word " * 20, score=t) for t in range(5)]
    history = [HistoryStep(s.feedback, "go north", 1.0) for s in states]
    for t in range(4):
        before, after = (user_message(states[n], history[:n]) for n in (t, t + 1))
        end = before.index(states[t].feedback.strip()) + len(states[t].feedback.strip())
        assert before[:end] == after[:end] and f"Room number {t}" in before[:end]


def test_render_prompt_drops_oldest_history_first(smollm2):
    def rendered(limit):
        style = dataclasses.replace(STYLE, max_tokens=limit, history_length=6)
        return render_prompt(STATE, HISTORY, style=style, tokenizer=smollm2.tokenizer)

    whole = rendered(2000)
    assert whole.dropped_history == 0
    length = len(smollm2.tokenizer(whole.text)["input_ids"])
    shorter = rendered(length - 1)
    assert shorter.dropped_history == 3 and "command 2" not in shorter.text and "command 3" in shorter.text
    assert len(smollm2.tokenizer(shorter.text)["input_ids"]) <= length - 1
    nothing = rendered(64)
    assert nothing.dropped_history == 6 and nothing.over_length
    for kept in ("window is slightly ajar", "- go north", "Next command?"):
        assert kept in nothing.text


def test_render_prompt_uses_the_chat_template(smollm2):
    text = render_prompt(STATE, [], style=STYLE, tokenizer=smollm2.tokenizer).text
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("completion", "context"),
    [
        ("I go.\nAnswer:\n1. go north", "PI go.\nAnswer:\n"),
        ("answer: 1. go north", "Panswer:\n"),
        ("Final ranking: go", "PFinal ranking:\n"),
        ("Answer:\nno\nAnswer:\n1. go", "PAnswer:\nno\nAnswer:\n"),
        ("no list", None),
        (None, None),
    ],
)
def test_training_context_ends_with_the_last_answer_heading(completion, context):
    style = dataclasses.replace(STYLE, mode="rank", use_cot=True)
    assert training_context("P", completion, style=style) == context
    assert training_context("P", completion, style=STYLE) == "P"  # without chain of thought


@pytest.mark.parametrize(
    ("generated", "thought", "has_heading"),
    [
        ("I go.\nAnswer:\ngo north", "I go.\nAnswer:\n", True),
        ("I go.\n\nFinal answer: go north\nAnswer:\nwait", "I go.\nAnswer:\n", True),  # the first heading counts
        ("Answer: go north", "Answer:\n", True),
        (" I go. The answer:", "I go. The answer:\nAnswer:\n", False),  # not at the start of a line
        ("I would go\n", "I would go\nAnswer:\n", False),
        ("<|im_end|> I go", "< |im_end|> I go\nAnswer:\n", False),
        ("\n ", "Answer:\n", False),
        ("", "Answer:\n", False),
    ],
)
def test_read_thought_always_ends_with_the_same_heading(smollm2, generated, thought, has_heading):
    found = read_thought(generated, tokenizer=smollm2.tokenizer)
    assert (found.text, found.has_heading) == (thought, has_heading)


pieces = st.lists(
    st.sampled_from(["answer", "Answer", "final", ":", "\n", " ", "commands", "go", "<|im_end|>", "\x1c"])
)


@given(generated=pieces.map("".join))
def test_training_context_is_the_prompt_and_the_whole_thought(smollm2, generated):
    """The learner cuts the completion at a heading, and must not cut a thought behind which actions were scored."""
    text = read_thought(generated, tokenizer=smollm2.tokenizer).text
    assert training_context("P", text, style=dataclasses.replace(STYLE, use_cot=True)) == "P" + text


WALKTHROUGH = dataclasses.replace(STYLE, layout="walkthrough", list_commands=False)


class TagTokenizer:
    """Marks roles with tags and splits at white space."""

    all_special_tokens = ()
    added_tokens_decoder: ClassVar[dict] = {}
    chat_template = ""

    def apply_chat_template(self, messages, **_):
        return "".join(f"[{m['role']}] {m['content']}\n" for m in messages) + "[assistant] "

    def __call__(self, text, **_):
        return {"input_ids": text.split()}


def render_text(state=STATE, history=(), *, style=WALKTHROUGH):
    return render_prompt(state, history, style=style, tokenizer=TagTokenizer()).text


def test_render_prompt_walkthrough_ends_with_the_past_commands():
    history = [HistoryStep("x", "open box", 1.0), HistoryStep("y", "wait", 0.0), HistoryStep("z", "take lamp", 2.0)]
    text = render_text(history=history)
    assert "[user] Goal: Find the twenty treasures.\nBehind House" in text
    assert text.endswith("[assistant] open box\nwait\ntake lamp\n")
    assert text == render_text(history=history[:-1]) + "take lamp\n"  # extends the previous prompt


def test_render_prompt_walkthrough_tells_earlier_attempts_after_the_observation():
    def text(style):
        return render_prompt(STATE, HISTORY[:1], style=style, tokenizer=TagTokenizer(), attempts=ATTEMPTS).text

    observation = "Behind House A window is slightly ajar. You are carrying a leaflet.\n"
    end = "[assistant] command 0\n"
    goal = "[user] Goal: Find the twenty treasures.\n"
    assert text(WALKTHROUGH).endswith(f"{goal}{observation}{ATTEMPTS_LINE}\n{end}")
    assert text(WALKTHROUGH).replace(f"{ATTEMPTS_LINE}\n", "") == render_text(history=HISTORY[:1])
    hidden = dataclasses.replace(WALKTHROUGH, show_observation=False)
    assert text(hidden).endswith(f"{goal}{ATTEMPTS_LINE}\n{end}")


def test_render_prompt_loop_free_leaves_out_loops():
    history = [HistoryStep("x", "go west", 0.0, STATE.place), HistoryStep("y", "go east", 0.0, ("", "elsewhere"))]
    assert render_text(history=history).endswith("go west\ngo east\n")
    style = dataclasses.replace(WALKTHROUGH, history="loop_free")
    assert render_text(history=history, style=style).endswith("[assistant] ")


def test_render_prompt_can_hide_the_observation_if_there_is_a_goal():
    style = dataclasses.replace(WALKTHROUGH, show_observation=False)
    assert "Behind House" not in render_text(style=style)
    assert "[user] Behind House" in render_text(dataclasses.replace(STATE, goal=""), style=style)
    assert "Behind House" not in user_message(show_observation=False)


@pytest.mark.parametrize(
    ("style", "text", "ends_turn"),
    [
        (STYLE, "go north", True),
        (WALKTHROUGH, "go north\n", False),
        (dataclasses.replace(STYLE, mode="rank"), "1. go north\n", False),
    ],
)
def test_completion_text_depends_on_layout_and_mode(style, text, ends_turn):
    assert completion_text("go north", style=style) == text and style.ends_turn == ends_turn
