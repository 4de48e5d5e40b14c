"""Log-probabilities of many completions of one prompt in one forward pass, for scoring and for training.

A row holds a prompt once, followed by its completions as a prefix tree: a beginning that several completions share
appears once, and the last token of a completion, which is predicted but predicts nothing, does not appear. The
attention mask lets each token see the prompt and the earlier tokens of its own completions. The position ids let each
completion start right after the prompt. The result equals that of one sequence per completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def escape_special_tokens(text: str, special_tokens: Sequence[str]) -> str:
    """Change text from outside so that no part of it is tokenized as a special token, such as ``<|im_end|>``.

    A space is inserted after the first character of each special token; the tokenizer then reads ordinary text.
    """
    for token in special_tokens:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}" if len(token) > 1 else " ")
    return text


@dataclass(frozen=True)
class PromptRow:
    """Token ids of one prompt and of its completions. The prompt, the list and each completion must be non-empty."""

    prompt_ids: Sequence[int]
    completions: Sequence[Sequence[int]]


@dataclass(frozen=True)
class PackedBatch:
    """M rows packed for one forward pass. They have R completions in total, of N tokens, each of at most T tokens.

    Prompts are padded on the left and end at the same column; the prefix trees follow. C tokens of a prompt are cached.
    """

    input_ids: Tensor  # [M, L]
    position_ids: Tensor  # [M, L]
    attention_mask: Tensor  # [M, 1, L, C + L], additive
    num_logits: int  # number of last columns that predict a completion token
    row: Tensor  # [N], row of each completion token
    column: Tensor  # [N], column of the logits, among the last ``num_logits``, that predict it
    target: Tensor  # [N], the token
    completion_mask: Tensor  # [R, T], True where a completion has a token; the N True entries are in reading order


def pack(
    rows: Sequence[PromptRow], *, dtype: torch.dtype, device: torch.device | str, num_cached: int = 0
) -> PackedBatch:
    """Pack rows for one forward pass. The completions keep their order, row by row.

    Args:
        rows: prompts and completions.
        dtype: type of the attention mask: the type that the model computes in.
        device: device of the model.
        num_cached: number of first prompt tokens whose keys and values are cached; they are not packed. If it is not 0,
            there must be a single row, and at least one token of its prompt must not be cached.
    """
    if num_cached and not (len(rows) == 1 and num_cached < len(rows[0].prompt_ids)):
        raise ValueError(f"num_cached={num_cached} needs exactly one row with a longer prompt")
    trees = [_PrefixTree(r.completions) for r in rows]
    prompts = [list(r.prompt_ids[num_cached:]) for r in rows]
    prompt_width = max(map(len, prompts))
    tree_width = max(len(tree.tokens) for tree in trees)
    shape = (len(rows), prompt_width + tree_width)
    input_ids = np.zeros(shape, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    for i, (prompt, tree) in enumerate(zip(prompts, trees, strict=True)):
        start, end = prompt_width - len(prompt), prompt_width + len(tree.tokens)
        input_ids[i, start:end] = prompt + tree.tokens
        position_ids[i, start:end] = [*range(len(prompt)), *(len(prompt) + depth for depth in tree.depths)]
    visible = torch.from_numpy(_visible([len(p) for p in prompts], trees, shape=shape))
    mask = torch.zeros(len(rows), 1, shape[1], num_cached + shape[1], dtype=dtype)
    mask[:, 0, :, num_cached:].masked_fill_(~visible, torch.finfo(dtype).min)
    lengths = np.array([len(c) for r in rows for c in r.completions])

    def tensor(array: Any) -> Tensor:
        return torch.as_tensor(array, dtype=torch.long, device=device)

    return PackedBatch(
        input_ids=tensor(input_ids),
        position_ids=tensor(position_ids + num_cached),
        attention_mask=mask.to(device),
        num_logits=tree_width + 1,
        row=tensor(np.repeat(np.arange(len(rows)), [len(tree.columns) for tree in trees])),
        column=tensor([column for tree in trees for column in tree.columns]),
        target=tensor([token for r in rows for completion in r.completions for token in completion]),
        completion_mask=torch.as_tensor(np.arange(lengths.max()) < lengths[:, None], device=device),
    )


def _visible(prompt_lengths: Sequence[int], trees: Sequence[_PrefixTree], *, shape: tuple[int, int]) -> np.ndarray:
    """Which packed token (second axis) may attend to which (third axis), ``[M, L, L]`` bool."""
    length, prompt_width = shape[1], max(prompt_lengths)
    visible = np.zeros((shape[0], length, length), dtype=bool)
    for i, (prompt_length, tree) in enumerate(zip(prompt_lengths, trees, strict=True)):
        start = prompt_width - prompt_length
        visible[i, start:prompt_width, start:prompt_width] = np.tri(prompt_length, dtype=bool)
        for node, parent in enumerate(tree.parents):  # parent 0 is the prompt's last token
            visible[i, prompt_width + node] = visible[i, prompt_width - 1 + parent]
            visible[i, prompt_width + node, prompt_width + node] = True
    # Padding attends to itself, because the softmax of a fully masked row would be NaN.
    visible[:, np.arange(length), np.arange(length)] = True
    return visible


class _PrefixTree:
    """The distinct proper prefixes of some completions, one node each, parents before children.

    Columns count the prompt's last token as 0 and the first node as 1.
    """

    def __init__(self, completions: Sequence[Sequence[int]]) -> None:
        self.tokens: list[int] = []  # last token of each node's prefix
        self.depths: list[int] = []  # index of that token in its completions
        self.parents: list[int] = []  # column of each node's parent
        self.columns: list[int] = []  # for each token of each completion, the column that predicts it
        children: dict[tuple[int, int], int] = {}  # (column, token) -> column
        for completion in completions:
            column = 0
            for depth, token in enumerate(completion):
                self.columns.append(column)
                if depth == len(completion) - 1:
                    break  # the last token predicts nothing
                if (column, token) not in children:
                    self.tokens.append(token)
                    self.depths.append(depth)
                    self.parents.append(column)
                    children[column, token] = len(self.tokens)
                column = children[column, token]


def completion_logprobs(model: Any, batch: PackedBatch, *, past: Any = None) -> Tensor:
    """Log-probability of every completion token, given the prompt and the earlier tokens of the completion.

    Args:
        model: a causal language model of transformers with ``sdpa`` or ``eager`` attention.
        batch: the packed rows.
        past: a transformers ``Cache`` with the first ``num_cached`` tokens of the prompt. The forward pass appends the
            remaining tokens of the prompt and the completions.

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


def split_completions(token_logprobs: Tensor, completion_mask: Tensor) -> list[np.ndarray]:
    """The token log-probabilities ``[R, T]`` as one array ``[T_r]`` for each completion."""
    lengths = completion_mask.sum(dim=1).tolist()
    return [logprobs[:n] for logprobs, n in zip(token_logprobs.cpu().numpy(), lengths, strict=True)]
