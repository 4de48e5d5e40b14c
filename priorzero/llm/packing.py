"""Log-probabilities of many completions of one prompt in one forward pass, for scoring and for training alike.

A row holds a prompt once, followed by its completions as a tree: what several of them begin with is there once, and a
completion's last token, which is predicted but predicts nothing, is not there at all. An attention mask lets each token
see the prompt and the tokens before it in its own completions, and position ids let each completion start right after
the prompt, so the result is that of one sequence per completion while nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def without_special_tokens(text: str, special_tokens: Sequence[str]) -> str:
    """Text from outside in which nothing reads as a token of the chat template, such as ``<|im_end|>``.

    A space is put behind the first character of each such token, which the tokenizer then takes for ordinary text.
    """
    for token in special_tokens:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}" if len(token) > 1 else " ")
    return text


@dataclass(frozen=True)
class PromptRow:
    """Token ids of one prompt and of its completions. Both must be non-empty, and so must each completion."""

    prompt_ids: Sequence[int]
    completions: Sequence[Sequence[int]]


@dataclass(frozen=True)
class PackedBatch:
    """M rows packed for one forward pass; R completions in all rows together, each of at most T tokens.

    Attributes:
        input_ids: ``[M, L]``; prompts end at the same column (padded on the left), the tree of completions follows.
        position_ids: ``[M, L]``.
        attention_mask: additive, ``[M, 1, L, C + L]``, where C tokens of the prompt are cached.
        num_logits: how many of the last columns predict a completion token.
        row: row of each completion token, ``[N]``.
        column: column of the logits (among the last ``num_logits``) that predict it, ``[N]``.
        target: the token, ``[N]``.
        completion_mask: ``[R, T]``, True where a completion has a token; ``N`` entries are True, in reading order.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    num_logits: int
    row: Tensor
    column: Tensor
    target: Tensor
    completion_mask: Tensor


def pack(
    rows: Sequence[PromptRow], *, dtype: torch.dtype, device: torch.device | str, num_cached: int = 0
) -> PackedBatch:
    """Pack ``rows``; completions keep their order (row by row).

    Args:
        rows: prompts and completions.
        dtype: of the mask: what the model computes in.
        device: where the model is.
        num_cached: tokens at the prompt's beginning whose keys and values are already there; they are left out. More
            than zero takes a single row, and must leave one token of its prompt.

    Raises:
        ValueError: ``num_cached`` does not fit the rows.
    """
    if num_cached and not (len(rows) == 1 and num_cached < len(rows[0].prompt_ids)):
        raise ValueError(f"num_cached={num_cached} takes one row with a longer prompt")
    trees = [_Tree(r.completions) for r in rows]
    prompts = [list(r.prompt_ids[num_cached:]) for r in rows]
    prompt_width = max(map(len, prompts))
    suffix_width = max(len(tree.tokens) for tree in trees)
    length = prompt_width + suffix_width
    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    position_ids = np.zeros((len(rows), length), dtype=np.int64)
    visible = np.zeros((len(rows), length, length), dtype=bool)
    for i, (prompt, tree) in enumerate(zip(prompts, trees, strict=True)):
        start, end = prompt_width - len(prompt), prompt_width + len(tree.tokens)
        input_ids[i, start:end] = prompt + tree.tokens
        position_ids[i, start:end] = [*range(len(prompt)), *(len(prompt) + depth for depth in tree.depths)]
        visible[i, start:prompt_width, start:prompt_width] = np.tri(len(prompt), dtype=bool)
        for node, parent in enumerate(tree.parents):  # column 0 of the logits is the prompt's last token
            visible[i, prompt_width + node] = visible[i, prompt_width - 1 + parent]
            visible[i, prompt_width + node, prompt_width + node] = True
    visible[:, np.arange(length), np.arange(length)] = True  # padding sees itself: an empty row would be NaN
    mask = torch.zeros(len(rows), 1, length, num_cached + length, dtype=dtype)
    mask[:, 0, :, num_cached:].masked_fill_(~torch.from_numpy(visible), torch.finfo(dtype).min)
    lengths = np.array([len(c) for r in rows for c in r.completions])
    tokens_of_row = [len(tree.columns) for tree in trees]

    def tensor(array: Any) -> Tensor:
        return torch.as_tensor(array, dtype=torch.long, device=device)

    return PackedBatch(
        input_ids=tensor(input_ids),
        position_ids=tensor(position_ids + num_cached),
        attention_mask=mask.to(device),
        num_logits=suffix_width + 1,
        row=tensor(np.repeat(np.arange(len(rows)), tokens_of_row)),
        column=tensor([column for tree in trees for column in tree.columns]),
        target=tensor([token for r in rows for completion in r.completions for token in completion]),
        completion_mask=torch.as_tensor(np.arange(lengths.max()) < lengths[:, None], device=device),
    )


class _Tree:
    """The distinct beginnings of some completions, parents first.

    Attributes:
        tokens: last token of each node.
        depths: tokens before it in its completion.
        parents: column of the node before it; columns count the prompt's end as 0 and the first node as 1.
        columns: for each token of each completion the column that predicts it.
    """

    def __init__(self, completions: Sequence[Sequence[int]]) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.parents: list[int] = []
        self.columns: list[int] = []
        children: dict[tuple[int, int], int] = {}  # (column, token) -> column
        for completion in completions:
            column = 0
            for depth, token in enumerate(completion):
                self.columns.append(column)
                if depth == len(completion) - 1:
                    break  # nothing is predicted after the last token
                if (column, token) not in children:
                    self.tokens.append(token)
                    self.depths.append(depth)
                    self.parents.append(column)
                    children[column, token] = len(self.tokens)
                column = children[column, token]


def completion_logprobs(model: Any, batch: PackedBatch, *, past: Any = None) -> Tensor:
    """Log-probability of every completion token given its prompt and the tokens before it.

    Args:
        model: a causal language model of transformers with ``sdpa`` or ``eager`` attention.
        batch: from :func:`pack`.
        past: transformers' ``Cache`` with the prompt's first ``num_cached`` tokens; afterwards it holds the rest of the
            prompt and the completions as well.

    Returns:
        ``[R, T]`` float32, zero where ``completion_mask`` is False. Gradients flow if they are enabled.
    """
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.num_logits,
        past_key_values=past,
        use_cache=past is not None,
    ).logits  # (M, num_logits, V)
    logits = logits[batch.row, batch.column].float()  # (N, V)
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, batch.target[:, None]).squeeze(1)  # (N,)
    result = torch.zeros(batch.completion_mask.shape, dtype=torch.float32, device=logprobs.device)
    return result.masked_scatter(batch.completion_mask, logprobs)
