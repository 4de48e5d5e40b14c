"""Prompts, and the straightforward way to score actions, for the benchmarks of the language model."""

from __future__ import annotations

import numpy as np
import torch

from priorzero.llm.models import LanguageModel
from priorzero.llm.packing import PromptRow

ROOM = (
    "You are standing in an open field west of a white house, with a boarded front door. There is a small mailbox "
    "here. A path leads around the house, and the forest begins not far from it. "
)


def chat_prompt(llm: LanguageModel, text: str) -> str:
    """A chat prompt that asks for the next command after ``text``."""
    messages = [{"role": "user", "content": f"{text}\nWhat is the next command?"}]
    return llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def numbered_prompt(llm: LanguageModel, *, max_tokens: int, number: int) -> str:
    """A chat prompt whose text has at most ``max_tokens`` tokens. Different numbers give different first words."""
    ids = llm.tokenizer(f"Move {number}. " + ROOM * 40, add_special_tokens=False)["input_ids"][:max_tokens]
    return chat_prompt(llm, llm.tokenizer.decode(ids))


@torch.inference_mode()
def logprobs_one_prompt_per_action(llm: LanguageModel, row: PromptRow) -> list[np.ndarray]:
    """The token log-probabilities of each action. The model processes the whole prompt again for every action."""
    result = []
    for completion in row.completions:
        ids = torch.tensor([[*row.prompt_ids, *completion]])
        logits = llm.model(input_ids=ids, logits_to_keep=len(completion) + 1, use_cache=False).logits[0, :-1]
        result.append(torch.log_softmax(logits, -1)[range(len(completion)), completion].numpy())
    return result


def largest_difference(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """The largest difference between the log-probabilities of two results."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))
