"""Small chat templates with the features of those of common model families, and small tokenizers for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TEXTS = [
    "You are in a kitchen. A brown sack lies on the table. What is the next command?",
    "You are an expert player of text adventure games. You choose commands that raise the score.",
    "open the wooden door and go north, take the brass lantern, put the lamp on the table, examine the small mailbox",
    "Goal: Make sure the chest is ajar. The game so far:\n> go east (reward +1)\nScore: 1 of 7.\n\n- go west\n",
    "[INST] <<SYS>> user assistant system model [/INST] <|im_start|> 0123456789 'quoted' \"text\" (a; b: c) x=y",
]


@dataclass(frozen=True)
class ChatFamily:
    """A chat template and what its tokenizer must have.

    Attributes:
        template: Jinja text, with line breaks only where they are written.
        turn_end: what ends a turn of the LLM.
        bos: the tokenizer's ``bos_token``.
        eos: its ``eos_token``.
        special: other tokens that are special.
        added: added tokens that are not special.
        kind: the kind of tokenizer; see :func:`make_tokenizer`.
        opening: what the prompt must end with.
    """

    template: str
    turn_end: str
    bos: str
    eos: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    kind: str = "bytes"
    opening: str = ""


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The last turn of the LLM begins with an empty thought; the generation prompt leaves the thought to the LLM.
THINKS_FIRST = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# The generation prompt opens a thought, which no finished turn contains.
OPENS_THOUGHT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + '<|end of text|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# No system role, and a turn is plain text between two brackets, without a space before the completion.
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# The system message goes to the last message, if that is the user's. So it is lost when a completion follows.
SYSTEM_IN_LAST = (
    "{% set system = '' %}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.last else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
# Plain brackets; a space before and after the completion; every user turn begins with a BOS token.
SPACES = (
    "{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
WITH_DATE = (
    "{{ bos_token }}{% if not date is defined %}{% if strftime_now is defined %}"
    '{% set date = strftime_now("%d %b %Y") %}{% else %}{% set date = "26 Jul 2024" %}{% endif %}{% endif %}'
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date + '\n\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set messages = messages[1:] %}{% endif %}"
    "{{ '<|eot_id|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# A finished conversation ends with a second token.
TWO_ENDS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# A completion has a channel, which the generation prompt leaves to the LLM.
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m['content'] }}"
    "{{ '<|return|>' if m['role'] == 'assistant' and loop.last else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# No turn ends with a special token.
PLAIN = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)

IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "chatml": ChatFamily(CHATML, "<|im_end|>", "<|im_start|>", "<|im_end|>", special=IM),
    "chatml, other eos": ChatFamily(CHATML, "<|im_end|>", "<|endoftext|>", "<|endoftext|>", special=IM),
    "chatml, not special": ChatFamily(CHATML, "<|im_end|>", "<s>", "</s>", added=IM, kind="prefix"),
    "thinks first": ChatFamily(
        THINKS_FIRST, "<|im_end|>", "<|endoftext|>", "<|im_end|>", special=IM, added=("<think>", "</think>"),
        opening="<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "opens a thought": ChatFamily(
        OPENS_THOUGHT, "<|end of text|>", "<|begin|>", "<|end of text|>",
        added=("<|User|>", "<|Assistant|>", "<think>", "</think>"), opening="<|Assistant|>",
    ),
    "no system role": ChatFamily(
        NO_SYSTEM, "<end_of_turn>", "<bos>", "<eos>", special=("<start_of_turn>", "<end_of_turn>"), kind="no prefix",
        opening="<start_of_turn>model\n",
    ),
    "instructions": ChatFamily(INSTRUCTIONS, "</s>", "<s>", "</s>", kind="prefix", opening=" [/INST]"),
    "system in last": ChatFamily(
        SYSTEM_IN_LAST, "</s>", "<s>", "</s>", special=("[INST]", "[/INST]"), kind="first", opening="[/INST] "
    ),
    "spaces": ChatFamily(SPACES, " </s>", "<s>", "</s>", kind="prefix", opening=" [/INST] "),
    "date": ChatFamily(
        WITH_DATE, "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>",
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "two ends": ChatFamily(
        TWO_ENDS, "<|end|>", "<s>", "<|endoftext|>", special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        kind="prefix",
    ),
    "channels": ChatFamily(
        CHANNELS, "<|return|>", "<|startoftext|>", "<|endoftext|>",
        special=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        opening="<|start|>assistant<|channel|>final<|message|>",
    ),
    "plain": ChatFamily(PLAIN, "</s>", "<s>", "</s>", kind="first"),
}  # fmt: skip


def make_tokenizer(family: ChatFamily) -> Any:
    """A small tokenizer.

    ``kind`` is ``bytes`` (byte-level BPE, as GPT-2's), ``prefix`` (BPE with byte fallback, and a space before every
    text, as Llama 2's), ``first`` (a space only at the beginning), or ``no prefix`` (no such space, as Gemma's).
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys([family.bos, family.eos, *family.special]))
    tokenizer = _byte_level(special) if family.kind == "bytes" else _with_byte_fallback(special, kind=family.kind)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos)
    fast.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.added])
    fast.chat_template = family.template
    return fast


def _byte_level(special: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _with_byte_fallback(special: Sequence[str], *, kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=["▁", "\n"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"▁{word}" for text in TEXTS for word in text.split()], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    strip = [] if kind == "no prefix" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    if kind == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prepend = [normalizers.Prepend("▁")] if kind == "prefix" else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    return tokenizer
