"""Splits a prompt and its completions into tokens, as the tokenizer splits the whole text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from priorzero.llm.chat_template import control_tokens
from priorzero.llm.packing import PromptRow


@functools.lru_cache(maxsize=512)
def token_ids(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """Token ids of a rendered prompt. The latest prompts are kept, since each is needed several times.

    The prompt contains its own special tokens, so the tokenizer adds none.
    """
    return tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def prompt_token_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt without the spaces at its end, because these belong to the first token after it."""
    return list(token_ids(tokenizer, prompt.rstrip(" ")))


def tokenize_row(tokenizer: Any, prompt: str, completions: Sequence[str]) -> PromptRow:
    """Token ids of a prompt and of each completion, so that both together are the tokens of the whole text.

    A tokenizer may join the end of the prompt and the start of a completion to one token. If it does so for all
    completions, this token belongs to the completions. If it does so only for some, such as those that start with a
    line break, these are tokenized alone.
    """
    prompt_ids = prompt_token_ids(tokenizer, prompt)
    stripped = prompt.rstrip(" ")
    texts = [prompt[len(stripped) :] + completion for completion in completions]
    # No token extends across a control token, so only the text from the last one on must be tokenized again.
    tail = stripped[max(0, *(stripped.rfind(token) for token in control_tokens(tokenizer)), 0) :]
    tail_ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    if prompt_ids[len(prompt_ids) - len(tail_ids) :] != tail_ids:
        tail, tail_ids = stripped, prompt_ids
    whole = tokenizer([tail + text for text in texts], add_special_tokens=False)["input_ids"]
    shared = [_common_prefix(tail_ids, ids) for ids in whole]
    kept = max(shared)
    if kept == 0 and len(tail_ids) == len(prompt_ids):  # a prompt must not be empty
        kept = len(tail_ids)
    completion_ids = [
        ids[kept:] if n == kept and len(ids) > kept else tokenizer(text, add_special_tokens=False)["input_ids"]
        for n, ids, text in zip(shared, whole, texts, strict=True)
    ]
    return PromptRow(prompt_ids[: len(prompt_ids) - len(tail_ids) + kept], completion_ids)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
