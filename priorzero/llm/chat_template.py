"""The chat template of a tokenizer: its check, and what it writes around a completion. Imports no torch."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from priorzero.types import UserError

# Puts the system message in front of the first user message, for templates that refuse or ignore system messages.
FOLD_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set folded = messages[0]['content'] + '\\n\\n' + messages[1]['content'] -%}"
    "{%- set messages = [{'role': 'user', 'content': folded}] + messages[2:] -%}"
    "{%- endif -%}"
)


def _fixed_date() -> str:
    """A Jinja macro in place of transformers' ``strftime_now``, which writes 1 January 2025, 0:00.

    Some templates write the current date, but a prompt must not depend on the day on which it is rendered. The line
    break at the end is not rendered, and the template still begins at the start of a line, which matters to Jinja.
    """
    codes = [f"%{flag}{letter}" for letter in "aAbBcdDeFGhHIjklmMpPrRSTuUVwWxXyYzZf" for flag in ("", "-")]
    date = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
    values = {"%%": "\x00", **{code: date.strftime(code) for code in codes}, "%s": "1735689600", "\x00": "%"}
    replace = "".join(f" | replace({json.dumps(code)}, {json.dumps(value)})" for code, value in values.items())
    return "{%- macro strftime_now(format) -%}{{ format" + replace + " }}{%- endmacro %}\n"


FIXED_DATE = _fixed_date()

SYSTEM, USER, COMPLETION = "You play text games.", "You are in a kitchen.", "open the fridge"
EARLIER_USER, EARLIER_COMPLETION = "You are in a hall.", "go north"
PROMPT = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
EARLIER_TURN = [
    {"role": "user", "content": EARLIER_USER},
    {"role": "assistant", "content": EARLIER_COMPLETION},
]


def usable_template(template: str, *, special_tokens: Mapping[str, Any], path: str, layout: str = "transcript") -> str:
    """The chat template with a fixed date and, if it does not render a system message, with :data:`FOLD_SYSTEM`.

    Args:
        template: Jinja text.
        special_tokens: variables of the template, such as ``bos_token``.
        path: ``llm.path``, for the message.
        layout: ``llm.prompt_layout``. In the layout ``walkthrough`` the prompt contains an earlier turn of the LLM.

    Raises:
        UserError: neither form renders all messages of a prompt.
    """
    if "strftime_now" in template and FIXED_DATE not in template:
        template = FIXED_DATE + template
    messages = [PROMPT[0], *EARLIER_TURN, PROMPT[1]] if layout == "walkthrough" else PROMPT
    completion = {"role": "assistant", "content": COMPLETION}
    candidates = (template, FOLD_SYSTEM + template)
    for candidate in candidates:
        if _failure(candidate, [*messages, completion], special_tokens=special_tokens) is None:
            return candidate
    reasons = [_failure(candidate, messages, special_tokens=special_tokens) for candidate in candidates]
    if None in reasons:  # the template renders prompts, but no completions; see `turn_format`
        return candidates[reasons.index(None)]
    if layout == "walkthrough" and any(
        _failure(candidate, PROMPT, special_tokens=special_tokens) is None for candidate in candidates
    ):
        raise UserError(
            f"llm.path={path}: the chat template cannot render an earlier turn of the assistant ({reasons[0]}), which "
            "llm.prompt_layout=walkthrough needs; type --set llm.prompt_layout=transcript, or give another model"
        )
    raise UserError(
        f"llm.path={path}: the chat template cannot render a system and a user message ({reasons[0]}), nor a user "
        f"message alone ({reasons[1]}); give an instruction-tuned model with a working chat template"
    )


def _failure(template: str, messages: Sequence[Mapping[str, str]], *, special_tokens: Mapping[str, Any]) -> str | None:
    """Why the template does not render the messages' texts in their order; None if it does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    is_prompt = messages[-1]["role"] == "user"
    try:
        texts, _ = render_jinja_template(
            [list(messages)], chat_template=template, add_generation_prompt=is_prompt, **special_tokens
        )
    except Exception as error:  # the template is a program of the model's author: any error may occur
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None if _contains_in_order(texts[0], messages) else "it leaves out the messages' text"


def _contains_in_order(text: str, messages: Sequence[Mapping[str, str]]) -> bool:
    pattern = ".*".join(re.escape(message["content"]) for message in messages)
    return re.search(pattern, text, flags=re.DOTALL) is not None


# ---- the turn of the LLM ----


@dataclass(frozen=True)
class TurnFormat:
    """What the chat template writes around the LLM's completion.

    Attributes:
        renders_completion: whether the template renders a conversation that ends with a turn of the LLM.
        end: the text after a completion up to its first special token, such as ``<|im_end|>``; None if there is none.
    """

    renders_completion: bool
    end: str | None


def turn_format(tokenizer: Any) -> TurnFormat:
    """Find out how the tokenizer's chat template writes the LLM's turn."""
    return _turn_format(tokenizer, tokenizer.chat_template)


@functools.lru_cache(maxsize=4)
def _turn_format(tokenizer: Any, _template: str) -> TurnFormat:
    conversation = [*PROMPT, {"role": "assistant", "content": COMPLETION}]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except Exception:  # the template is a program of the model's author; `usable_template` has rendered the prompt
        return TurnFormat(renders_completion=False, end=None)
    if not _contains_in_order(text, conversation):
        return TurnFormat(renders_completion=False, end=None)
    after = text.rpartition(COMPLETION)[2]
    ends = [after.index(token) + len(token) for token in control_tokens(tokenizer) if token in after]
    return TurnFormat(renders_completion=True, end=after[: min(ends)] if ends else None)


def turn_end(tokenizer: Any) -> str:
    """The text that ends a turn of the LLM; its last token is a special one. The tokenizer must have an ``eos_token``
    if the chat template ends no turn."""
    end = turn_format(tokenizer).end
    return str(tokenizer.eos_token) if end is None else end


def render_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Render messages up to the place where the template puts the LLM's completion.

    This is not always the template's generation prompt. That of a reasoning model can be the beginning of a thought,
    and that of some models lacks the space before a completion.
    """
    text: str
    if turn_format(tokenizer).renders_completion:
        text = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": COMPLETION}], tokenize=False, add_generation_prompt=False
        )
        return text.rpartition(COMPLETION)[0]
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return text


# ---- special tokens ----


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The tokens that have a meaning in a conversation. Text from outside must not contain them.

    These are all special tokens, and the other added tokens that the chat template mentions, such as ``<think>``. Added
    tokens that are plain words or white space are left out.
    """
    return _control_tokens(tokenizer, tokenizer.chat_template)


@functools.lru_cache(maxsize=4)
def _control_tokens(tokenizer: Any, template: str) -> tuple[str, ...]:
    added = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in template and not token.content.isalnum())
    ]
    return tuple(token for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if token.strip())
