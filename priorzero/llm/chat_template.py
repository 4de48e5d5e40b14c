"""Checks a tokenizer's chat template, and adds a system message to templates without one. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from priorzero.types import UserError

# Puts the system message in front of the first user message, for templates that refuse or ignore system messages.
FOLD_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set folded = messages[0]['content'] + '\\n\\n' + messages[1]['content'] -%}"
    "{%- set messages = [{'role': 'user', 'content': folded}] + messages[2:] -%}"
    "{%- endif -%}"
)
SYSTEM, USER = "You play text games.", "You are in a kitchen."
TEST_MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]


def usable_template(template: str, *, special_tokens: Mapping[str, Any], path: str) -> str:
    """The chat template as it is if it renders a system and a user message, else with :data:`FOLD_SYSTEM`.

    Args:
        template: Jinja text.
        special_tokens: variables of the template, such as ``bos_token``.
        path: ``llm.path``, for the message.

    Raises:
        UserError: neither of the two renders both messages.
    """
    reasons = []
    for candidate in (template, FOLD_SYSTEM + template):
        try:
            text = render(candidate, TEST_MESSAGES, special_tokens=special_tokens)
        except Exception as error:  # the template is a program of the model's author: any error may occur
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        if SYSTEM in text and USER in text:
            return candidate
        reasons.append("it leaves out the messages' text")
    raise UserError(
        f"llm.path={path}: the chat template cannot render a system and a user message ({reasons[0]}), nor a user "
        f"message alone ({reasons[1]}); give an instruction-tuned model with a working chat template"
    )


def render(template: str, messages: Sequence[Mapping[str, str]], *, special_tokens: Mapping[str, Any]) -> str:
    """Render messages, up to the beginning of the assistant's turn, as the tokenizer does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        [list(messages)], chat_template=template, add_generation_prompt=True, **special_tokens
    )
    text: str = texts[0]
    return text
