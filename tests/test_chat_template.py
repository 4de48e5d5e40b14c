"""Tests of chat templates: what is before and after a completion, and its tokens. The templates are of many kinds."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from priorzero.llm.chat_template import PROMPT, control_tokens, render_messages, turn_end, turn_format, usable_template
from priorzero.llm.engines import PriorBuilder
from priorzero.llm.engines.hf import TransformersEngine
from priorzero.llm.fine_tuning import LLMLearner
from priorzero.llm.model_files import check_llm
from priorzero.llm.models import load_language_model
from priorzero.llm.packing import escape_special_tokens
from priorzero.llm.prompts import build_messages, prompt_style, render_prompt
from priorzero.llm.tokenizing import tokenize_row
from priorzero.types import GameState, HistoryStep, PriorRequest, UserError
from tests.helpers.chat_templates import CHATML, FAMILIES, NO_SYSTEM, WITH_DATE, make_tokenizer
from tests.helpers.models import make_settings, make_tiny_llm

STATE = GameState("You are in a hall.\nA door is here.", ("go north", "open door"), 1.0, 7.0, 3, goal="Find the lamp.")
HISTORY = [HistoryStep("Hall", "go east", 0.0), HistoryStep("Pantry", "take jar", 1.0)]


@functools.cache
def tokenizer_of(name):
    """The tokenizer of a family, with the template as :func:`load_tokenizer` sets it."""
    tokenizer = make_tokenizer(FAMILIES[name])
    tokenizer.chat_template = usable_template(
        tokenizer.chat_template, special_tokens=tokenizer.special_tokens_map, path=name, layout="walkthrough"
    )
    return tokenizer


def style_of(layout):
    return prompt_style(make_settings({"llm": {"prompt_layout": layout}}))


every_family = pytest.mark.parametrize("name", FAMILIES)
every_layout = pytest.mark.parametrize("layout", ["transcript", "walkthrough"])


@every_family
def test_turn_format_finds_the_end_of_a_turn(name):
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    assert turn_end(tokenizer) == family.turn_end
    found = turn_format(tokenizer)
    assert found.renders_completion and found.end == (None if name == "plain" else family.turn_end)


@every_family
@every_layout
def test_render_prompt_has_all_messages_and_the_start_of_the_turn(name, layout):
    tokenizer, style = tokenizer_of(name), style_of(layout)
    text = render_prompt(STATE, [], style=style, tokenizer=tokenizer).text
    end = 0
    for message in build_messages(STATE, [], style=style):
        assert message["content"] in text[end:]
        end = text.index(message["content"], end) + len(message["content"])
    assert text.endswith(FAMILIES[name].opening) and "fridge" not in text
    assert ("<think>" in text) == (name == "thinks first")


words = st.from_regex(r"\A[a-zA-Z][a-zA-Z0-9 ,.'\"żß北🐢-]{0,20}\Z").map(str.strip).filter(bool)


@every_family
@every_layout
@settings(max_examples=25, deadline=None)
@given(actions=st.lists(words, min_size=1, max_size=4, unique=True))
def test_row_has_the_tokens_of_the_whole_conversation(name, layout, actions):
    tokenizer = tokenizer_of(name)
    messages = build_messages(STATE, [], style=style_of(layout))
    prompt = render_messages(tokenizer, messages)
    end = turn_end(tokenizer)
    row = tokenize_row(tokenizer, prompt, [action + end for action in actions])
    for action, completion in zip(actions, row.completions, strict=True):
        turn = {"role": "assistant", "content": action}
        text = tokenizer.apply_chat_template([*messages, turn], tokenize=False)  # the template's own
        assert text.startswith(prompt + action + ("" if name == "plain" else end))
        ids = tokenizer(prompt + action + end, add_special_tokens=False)["input_ids"]
        assert [*row.prompt_ids, *completion] == ids
        assert completion[-1] == tokenizer.convert_tokens_to_ids(end.strip())
    assert tokenizer.bos_token_id not in row.prompt_ids[1:] or tokenizer.bos_token in prompt[len(tokenizer.bos_token) :]


@every_family
@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["", " ", "\n", "\n\n go", "  look", ")", "go ", "x\ny"]), min_size=1, max_size=5))
def test_row_keeps_the_text_of_unusual_actions(name, actions):
    tokenizer = tokenizer_of(name)
    prompt = render_messages(tokenizer, PROMPT)
    row = tokenize_row(tokenizer, prompt, ["go north\n", *(f"{action}\n" for action in actions)])
    assert all(row.completions)
    usual = tokenize_row(tokenizer, prompt, ["go north\n"])
    assert (row.prompt_ids, row.completions[0]) == (usual.prompt_ids, usual.completions[0])
    decoded = tokenizer.decode([*row.prompt_ids, *row.completions[0]])
    assert decoded.replace(" ", "").endswith((prompt + "go north\n").replace(" ", "")[-60:])


@every_family
def test_render_prompt_extends_the_walkthrough_by_whole_tokens(name):
    """The prompt cache relies on it: the tokens of a prompt are the beginning of those of the next prompt."""
    tokenizer, style = tokenizer_of(name), style_of("walkthrough")
    rows = [
        tokenize_row(tokenizer, render_prompt(STATE, HISTORY[:n], style=style, tokenizer=tokenizer).text, ["look\n"])
        for n in (0, 1, 2)
    ]
    for before, after in itertools.pairwise(rows):
        assert list(after.prompt_ids[: len(before.prompt_ids)]) == list(before.prompt_ids)


@every_family
@every_layout
def test_render_prompt_escapes_all_tokens_of_the_template(name, layout):
    """Also those that the tokenizer does not list as its special tokens."""
    tokenizer = tokenizer_of(name)
    family = FAMILIES[name]
    assert {family.bos, family.eos, *family.special, *family.added} <= set(control_tokens(tokenizer))
    nasty = "".join(control_tokens(tokenizer))
    state = dataclasses.replace(STATE, feedback=nasty, goal=f"Say {nasty}.", look=nasty)
    past = [HistoryStep(nasty, f"say {nasty}", 0.0)]
    counts = []
    for s, h in ((state, past), (STATE, HISTORY[:1])):
        ids = tokenizer(render_prompt(s, h, style=style_of(layout), tokenizer=tokenizer).text)["input_ids"]
        counts.append([ids.count(tokenizer.convert_tokens_to_ids(token)) for token in control_tokens(tokenizer)])
    assert counts[0] == counts[1]
    assert escape_special_tokens(nasty, control_tokens(tokenizer)) != nasty


def test_control_tokens_leaves_out_words_and_white_space():
    tokenizer = make_tokenizer(FAMILIES["chatml"])
    tokenizer.add_tokens(["\n\n", "user", "<table>"])
    assert control_tokens(tokenizer) == ("<|im_start|>", "<|im_end|>")


# ---- templates ----


def test_usable_template_does_not_depend_on_the_day(monkeypatch):
    tokenizer = tokenizer_of("date")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", None, raising=False)
    assert "Today: 01 Jan 2025\n" in render_messages(tokenizer, PROMPT)
    once = usable_template(WITH_DATE, special_tokens={"bos_token": "<s>"}, path="x")
    assert once != WITH_DATE
    assert usable_template(once, special_tokens={"bos_token": "<s>"}, path="x") == once  # that of a checkpoint


@pytest.mark.parametrize(
    ("call", "want"),
    [
        ("{% set f = '%d %b %Y' %}{{ strftime_now(f) }}", "01 Jan 2025"),
        ("{% set now = strftime_now %}{{ now(format='%A, %-d %B') | upper }}", "WEDNESDAY, 1 JANUARY"),
        (
            "{% macro today() %}{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{% endmacro %}{{ today() }}",
            "2025-01-01 00:00:00",
        ),
        ("{{ strftime_now('%Y') | int + 1 }}", "2026"),
        ("{{ strftime_now('100%% on %%d, %d') }}", "100% on %d, 01"),
        ("\n  {% if strftime_now is defined %}\n  {{ strftime_now('%j') }}{% endif %}", "\n  001"),
    ],
)
def test_usable_template_fixes_the_date_however_it_is_computed(call, want):
    tokenizer = make_tokenizer(FAMILIES["chatml"])
    tokenizer.chat_template = usable_template(call + CHATML, special_tokens={}, path="x")
    assert render_messages(tokenizer, PROMPT).partition("<|im_start|>")[0] == want


def test_load_language_model_names_the_templates_if_none_is_the_default(tmp_path):
    tokenizer = make_tokenizer(FAMILIES["chatml"])
    llm = make_tiny_llm(tokenizer)
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    llm.save(tmp_path)
    cfg = make_settings({"llm": {"path": str(tmp_path)}}).llm
    words = r"has the chat templates rag, tool_use, but none with the name default; write .* to chat_template\.jinja"
    for check in (check_llm, lambda cfg: load_language_model(cfg, device=torch.device("cpu"))):
        with pytest.raises(UserError, match=words):
            check(cfg)


# ---- tokenizers without bytes ----


def make_word_tokenizer(words):
    """A tokenizer that leaves out the words that it does not know, and all white space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", *words]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}<s>"
    return fast


def test_load_language_model_refuses_a_tokenizer_that_drops_english_letters(tmp_path):
    make_tiny_llm(make_word_tokenizer("abc")).save(tmp_path)
    with pytest.raises(UserError, match="cannot represent English commands: 'go north' becomes ''"):
        load_language_model(make_settings({"llm": {"path": str(tmp_path)}}).llm, device=torch.device("cpu"))


@pytest.mark.parametrize("end_of_turn", [True, False])
async def test_prior_of_an_action_without_tokens_is_that_of_the_end_of_the_turn(end_of_turn, monkeypatch):
    """Such an action does not break the batch, and it is counted."""
    llm = make_tiny_llm(make_word_tokenizer("abcdefghijklmnopqrstuvwxyz"))
    style = style_of("transcript" if end_of_turn else "walkthrough")
    assert style.ends_turn == end_of_turn
    engine = TransformersEngine(PriorBuilder(llm, style))
    (prior,) = await engine.priors([PriorRequest("<s>hall</s><s>", ("go", "\u5317"))])
    row = engine.builder.row(PriorRequest("<s>hall</s><s>", ("\u5317", "go")))
    assert row.completions[0] == [llm.tokenizer.eos_token_id]
    token_logprobs, _ = llm.token_logprobs([row])
    want = torch.stack([token_logprobs[1].sum() / len(row.completions[1]), token_logprobs[0, 0]]).log_softmax(0)
    assert prior.logprobs == pytest.approx(want.detach().numpy(), abs=1e-5)
    assert engine.take_statistics()["prior/lossy_actions"] == 1


def test_usable_template_takes_the_default_of_several(tmp_path):
    tokenizer = make_tokenizer(FAMILIES["no system role"])
    llm = make_tiny_llm(tokenizer)
    tokenizer.chat_template = {"default": NO_SYSTEM, "tool_use": "{{ tools[0] }}"}
    llm.save(tmp_path)
    loaded = load_language_model(make_settings({"llm": {"path": str(tmp_path)}}).llm, device=torch.device("cpu"))
    assert turn_end(loaded.tokenizer) == "<end_of_turn>"
    assert "You play text games.\n\nYou are in a kitchen." in render_messages(loaded.tokenizer, PROMPT)


ONLY_PROMPTS = "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}\n{% endfor %}ANSWER: "
REFUSES_ANSWERS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}"
    "{{ m['content'] }}\n{% endfor %}ANSWER: "
)


@pytest.mark.parametrize("template", [ONLY_PROMPTS, REFUSES_ANSWERS])
def test_usable_template_renders_prompts_alone_if_it_must(template):
    tokenizer = make_tokenizer(FAMILIES["plain"])
    tokenizer.chat_template = usable_template(template, special_tokens={}, path="x")
    assert not turn_format(tokenizer).renders_completion
    assert render_messages(tokenizer, PROMPT) == "You play text games.\nYou are in a kitchen.\nANSWER: "
    assert turn_end(tokenizer) == tokenizer.eos_token
    with pytest.raises(UserError, match=r"earlier turn of the assistant .*type --set llm\.prompt_layout=transcript"):
        usable_template(template, special_tokens={}, path="x", layout="walkthrough")


# ---- the LLM ----


@pytest.fixture
def llama3():
    """Its turns end with another token than its eos token, as those of Llama 3's base tokenizer."""
    return make_tiny_llm(tokenizer_of("date"))


def test_prior_builder_and_learner_end_commands_as_the_template_does(llama3):
    style = style_of("transcript")
    prompt = render_prompt(STATE, HISTORY, style=style, tokenizer=llama3.tokenizer).text
    row = PriorBuilder(llama3, style).row(PriorRequest(prompt, STATE.valid_actions))
    end = llama3.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert end != llama3.tokenizer.eos_token_id
    assert [completion[-1] for completion in row.completions] == [end, end]
    learner = LLMLearner(llama3, make_settings().llm, style=style)
    assert learner.llm.row(prompt, STATE.valid_actions, end_of_turn=True) == row


@pytest.mark.parametrize("configured", [None, 5, [5, 6]])
def test_stop_ids_are_the_end_of_the_turn_and_all_eos_tokens(llama3, configured):
    llama3.model.generation_config.eos_token_id = configured
    ids = [llama3.tokenizer.convert_tokens_to_ids(token) for token in ("<|eot_id|>", "<|end_of_text|>")]
    assert llama3.stop_ids == ids + ([] if configured is None else [5, 6] if configured == [5, 6] else [5])


async def test_transformers_engine_rank_stops_at_the_end_of_the_turn(llama3):
    """The random model is made to write the end of the turn at once."""
    end = llama3.stop_ids[0]
    lengths = []
    generate = llama3.model.generate

    def only_the_end(_module, _inputs, logits):
        logits[..., end] = logits.max() + 1
        return logits

    def measured(**kwargs):
        output = generate(**kwargs)
        lengths.append(output.shape[1] - kwargs["input_ids"].shape[1])
        return output

    llama3.model.lm_head.register_forward_hook(only_the_end)
    llama3.model.generate = measured
    style = prompt_style(make_settings({"prior": {"mode": "rank"}}))
    engine = TransformersEngine(PriorBuilder(llama3, style, generate_max_len=12))
    await engine.priors([PriorRequest("You are in a hall.", ("go", "look"))])
    assert lengths == [1]


def test_load_language_model_says_how_a_turn_ends(tmp_path, monkeypatch):
    logged = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            f"priorzero.llm.models.logger.{level}", lambda text, level=level: logged.append((level, text))
        )
    for name in ("plain", "chatml, other eos", "chatml"):
        make_tiny_llm(tokenizer_of(name)).save(tmp_path / name)
        load_language_model(make_settings({"llm": {"path": str(tmp_path / name)}}).llm, device=torch.device("cpu"))
    (first, plain), (second, other) = logged
    assert (first, second) == ("warning", "info")
    assert "ends no turn with a special token; a turn ends with the tokenizer's eos_token '</s>'" in plain
    assert "ends with '<|im_end|>' (its eos_token is '<|endoftext|>')" in other


def test_load_language_model_refuses_a_tokenizer_without_any_end(tmp_path):
    tokenizer = make_tokenizer(FAMILIES["plain"])
    make_tiny_llm(tokenizer).save(tmp_path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="neither the chat template nor eos_token"):
        load_language_model(make_settings({"llm": {"path": str(tmp_path)}}).llm, device=torch.device("cpu"))
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<s>")  # then no eos_token is needed
    tokenizer.save_pretrained(tmp_path)
    llm = load_language_model(make_settings({"llm": {"path": str(tmp_path)}}).llm, device=torch.device("cpu"))
    assert llm.stop_ids[0] == tokenizer.convert_tokens_to_ids("<s>")
