"""The prompt: pure, complete, and cut at the right end."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from priorzero.envs.history import without_loops
from priorzero.llm.prompts import PromptStyle, completion_text, build_messages, first_shown, learning_context, render_prompt
from priorzero.types import GameState, HistoryStep

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
STYLE = PromptStyle("score", False, 3, 2000, 300, 0, True)


def user(state=STATE, history=HISTORY[-3:], **changes):
    return build_messages(state, history, style=dataclasses.replace(STYLE, **changes))[1]["content"]


def test_everything_is_there_in_an_order_that_grows_at_its_end():
    text = user()
    wanted = [
        "Find the twenty treasures.",
        "Room number 3\n> command 3 (reward +3)",
        "Room number 4\n> command 4 (reward +4)",
        "Room number 5\n> command 5 (reward +5)",
        "Behind House A window is slightly ajar.",
        "You are carrying a leaflet.",
        "Score: 10 of 350.",
        "- open window\n- go north",
    ]
    places = [text.index(part) for part in wanted]
    assert places == sorted(places)


def test_choices_of_style():
    assert "Room number" not in user(history_chars=0) and "> command 5 (reward +5)" in user(history_chars=0)
    assert "Room n ...\n> command 5" in user(history_chars=6)
    assert "Behind ..." in user(observation_chars=6) and "window is" not in user(observation_chars=6)
    assert "- go north" not in user(list_commands=False)
    assert "- go north" in user(list_commands=False, mode="rank")
    assert "Answer:" in user(mode="rank", use_cot=True) and "Answer:" not in user(mode="rank")
    assert "reward" not in user(history=[HistoryStep("x", "y", 0.0)])
    assert "Goal" not in user(dataclasses.replace(STATE, goal=""))


def test_the_goal_is_stated_once():
    state = dataclasses.replace(STATE, feedback=f"{STATE.goal}\nBehind House")
    text = user(state, [HistoryStep(f"{STATE.goal} Kitchen", "look", 0.0)])
    assert text.count(STATE.goal) == 1 and "Kitchen" in text and "Behind House" in text


def test_history_is_limited_to_its_length(smollm2):
    def text(n):
        style = dataclasses.replace(STYLE, history_length=n)
        return render_prompt(STATE, HISTORY, style=style, tokenizer=smollm2.tokenizer).text

    assert "command 4" in text(3) and "command 1" not in text(3)
    assert "> command" not in text(0)
    assert "command 0" in text(20)


@given(num_past=st.integers(0, 60), history_length=st.integers(0, 12))
def test_the_history_is_cut_in_large_steps(num_past, history_length):
    first = first_shown(num_past, history_length)
    assert 0 <= num_past - first <= history_length
    if num_past > history_length:
        assert num_past - first >= history_length // 2  # never forgets more than half, rounded up
    later = [first_shown(num_past + n, history_length) for n in range(max(1, (history_length + 1) // 2))]
    assert len(set(later)) <= 2  # within half a history it moves on once at most


def test_a_prompt_goes_on_where_the_one_before_ended():
    """Up to the last answer of the game nothing changes."""
    states = [dataclasses.replace(STATE, feedback=f"Room number {t}. " + "word " * 20, score=t) for t in range(5)]
    history = [HistoryStep(s.feedback, "go north", 1.0) for s in states]
    for t in range(4):
        before, after = (user(states[n], history[:n]) for n in (t, t + 1))
        end = before.index(states[t].feedback.strip()) + len(states[t].feedback.strip())
        assert before[:end] == after[:end] and f"Room number {t}" in before[:end]


def test_too_long_prompts_lose_the_oldest_history_first(smollm2):
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


def test_the_models_own_chat_template_is_used(smollm2):
    text = render_prompt(STATE, [], style=STYLE, tokenizer=smollm2.tokenizer).text
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")
    assert text == render_prompt(STATE, [], style=STYLE, tokenizer=smollm2.tokenizer).text


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
def test_what_is_learned_after_with_chain_of_thought(completion, context):
    style = dataclasses.replace(STYLE, mode="rank", use_cot=True)
    assert learning_context("P", completion, style=style) == context


def test_answers():
    assert completion_text("go north", style=STYLE) == "go north"
    assert completion_text("go north", style=dataclasses.replace(STYLE, mode="rank")) == "1. go north\n"
    assert learning_context("P", "whatever", style=STYLE) == "P"


WALKTHROUGH = dataclasses.replace(STYLE, layout="walkthrough", history="rewarded", list_commands=False)


class TagTokenizer:
    all_special_tokens = ()

    def apply_chat_template(self, messages, **_):
        return "".join(f"[{m['role']}] {m['content']}\n" for m in messages) + "[assistant] "

    def __call__(self, text, **_):
        return {"input_ids": text.split()}


def test_a_walkthrough_goes_on_with_the_commands_that_earned_something():
    history = [HistoryStep("x", "open box", 1.0), HistoryStep("y", "wait", 0.0), HistoryStep("z", "take lamp", 2.0)]
    text = render_prompt(STATE, history, style=WALKTHROUGH, tokenizer=TagTokenizer()).text
    assert text.endswith("[assistant] open box\ntake lamp\n") and "wait" not in text
    assert "[user] Goal: Find the twenty treasures.\nBehind House" in text
    everything = dataclasses.replace(WALKTHROUGH, history="all")
    text = render_prompt(STATE, history, style=everything, tokenizer=TagTokenizer()).text
    assert text.endswith("open box\nwait\ntake lamp\n")
    round_trip = [HistoryStep("x", "go west", 0.0, STATE.place), HistoryStep("y", "go east", 0.0, ("", "elsewhere"))]
    direct = dataclasses.replace(WALKTHROUGH, history="direct")
    assert render_prompt(STATE, round_trip, style=direct, tokenizer=TagTokenizer()).text.endswith("[assistant] ")
    # A prompt goes on where the one before it ended.
    before = render_prompt(STATE, history[:-1], style=everything, tokenizer=TagTokenizer()).text
    assert text == before + "take lamp\n"


def way(places, rewards=None):
    """Decisions taken in ``places``, named by their number."""
    rewards = rewards or [0.0] * len(places)
    return [HistoryStep("", str(t), reward, (p,)) for t, (p, reward) in enumerate(zip(places, rewards, strict=True))]


def direct(history, now):
    return "".join(
        step.action for step in without_loops(history, now=dataclasses.replace(STATE, feedback=now, inventory=""))
    )


def test_the_direct_way_has_no_loops():
    assert direct(way("abc"), "d") == "012"
    assert direct(way("abcb"), "d") == "03"  # from b to c and back: 1 and 2 were in vain
    assert direct(way("abc"), "a") == ""
    assert direct(way("aab"), "b") == "1"
    assert direct(way("abca"), "b") == "3"  # a loop within a loop
    assert direct(way("abab", [0, 1, 0, 0]), "c") == "0123"  # b to a earned something: it is another a


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=12), st.sampled_from("abcd"))
def test_the_direct_way_keeps_what_earned_and_is_shorter_only_by_loops(steps, now):
    history = [HistoryStep("", str(t), float(earned), (place,)) for t, (place, earned) in enumerate(steps)]
    state = dataclasses.replace(STATE, feedback=now, look="", inventory="")
    kept = without_loops(history, now=state)
    assert kept == [step for step in history if step in kept]
    assert [s for s in kept if s.reward] == [s for s in history if s.reward]
    stretches, places = [], []
    for step in kept:
        places.append(step.place)
        if step.reward:
            stretches.append(places)
            places = []
    for stretch in [*stretches, [*places, state.place]]:
        assert len(set(stretch)) == len(stretch)
    assert without_loops(kept, now=state) == kept


def test_the_observation_can_be_left_out_where_there_is_a_goal():
    blind = dataclasses.replace(WALKTHROUGH, show_observation=False)
    assert "Behind House" not in render_prompt(STATE, [], style=blind, tokenizer=TagTokenizer()).text
    aimless = dataclasses.replace(STATE, goal="")
    assert "[user] Behind House" in render_prompt(aimless, [], style=blind, tokenizer=TagTokenizer()).text
    assert "Behind House" not in user(show_observation=False)


def test_answers_end_a_line_in_a_walkthrough_and_a_turn_in_a_transcript():
    assert completion_text("go north", style=WALKTHROUGH) == "go north\n" and not WALKTHROUGH.ends_turn
    assert completion_text("go north", style=STYLE) == "go north" and STYLE.ends_turn
    assert not dataclasses.replace(STYLE, mode="rank").ends_turn
