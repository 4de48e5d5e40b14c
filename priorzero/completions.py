"""Log-probabilities of many completions of one prompt in one forward pass, for scoring and for training alike.

A row holds a prompt once, followed by all of its completions. An attention mask lets each completion see the prompt
and itself but no other completion, and position ids let each one start right after the prompt, so the result is that
of one sequence per completion while the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptRow:
    """Token ids of one prompt and of its completions. Both must be non-empty, and so must each completion."""

    prompt_ids: Sequence[int]
    completions: Sequence[Sequence[int]]


@dataclass(frozen=True)
class PackedBatch:
    """M rows packed for one forward pass; R completions in all rows together, each of at most T tokens.

    Attributes:
        input_ids: ``[M, L]``; prompts end at the same column (padded on the left), completions follow.
        position_ids: ``[M, L]``.
        attention_mask: additive, ``[M, 1, L, L]``.
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


def pack(rows: Sequence[PromptRow], *, dtype: torch.dtype, device: torch.device | str) -> PackedBatch:
    """Pack ``rows``; completions keep their order (row by row)."""
    prompt_width = max(len(r.prompt_ids) for r in rows)
    suffix_width = max(sum(len(c) for c in r.completions) for r in rows)
    length = prompt_width + suffix_width
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    position_ids = torch.zeros(len(rows), length, dtype=torch.long)
    owner = torch.full((len(rows), length), -1)  # 0: prompt, k: k-th completion, -1: padding
    row_of, column_of, target, lengths = [], [], [], []
    for i, r in enumerate(rows):
        n = len(r.prompt_ids)
        start = prompt_width - n
        input_ids[i, start:prompt_width] = torch.as_tensor(r.prompt_ids)
        position_ids[i, start:prompt_width] = torch.arange(n)
        owner[i, start:prompt_width] = 0
        column = prompt_width
        for k, completion in enumerate(r.completions, start=1):
            end = column + len(completion)
            input_ids[i, column:end] = torch.as_tensor(completion)
            position_ids[i, column:end] = torch.arange(n, n + len(completion))
            owner[i, column:end] = k
            row_of += [i] * len(completion)
            # The first token is predicted by the prompt's last column, each later one by the column before it.
            column_of += [0, *range(column - prompt_width + 1, end - prompt_width)]
            target += list(completion)
            lengths.append(len(completion))
            column = end
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    key_owner, query_owner = owner[:, None, :], owner[:, :, None]
    visible = causal & (key_owner >= 0) & ((key_owner == 0) | (key_owner == query_owner))
    visible |= torch.eye(length, dtype=torch.bool)  # padding sees itself: an empty row would be NaN
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    longest = max(lengths)
    completion_mask = torch.arange(longest)[None, :] < torch.as_tensor(lengths)[:, None]
    return PackedBatch(
        input_ids=input_ids.to(device),
        position_ids=position_ids.to(device),
        attention_mask=mask[:, None].to(device),
        num_logits=suffix_width + 1,
        row=torch.as_tensor(row_of, device=device),
        column=torch.as_tensor(column_of, device=device),
        target=torch.as_tensor(target, device=device),
        completion_mask=completion_mask.to(device),
    )


def completion_logprobs(model: Any, batch: PackedBatch) -> Tensor:
    """Log-probability of every completion token given its prompt and the tokens before it.

    Args:
        model: a causal language model of transformers with ``sdpa`` or ``eager`` attention.
        batch: from :func:`pack`.

    Returns:
        ``[R, T]`` float32, zero where ``completion_mask`` is False. Gradients flow if they are enabled.
    """
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.num_logits,
        use_cache=False,
    ).logits  # (M, num_logits, V)
    logits = logits[batch.row, batch.column].float()  # (N, V)
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, batch.target[:, None]).squeeze(1)  # (N,)
    result = torch.zeros(batch.completion_mask.shape, dtype=torch.float32, device=logprobs.device)
    return result.masked_scatter(batch.completion_mask, logprobs)
