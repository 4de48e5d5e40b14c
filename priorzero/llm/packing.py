"""Log-probabilities of completions of many prompts, where the model computes each distinct prefix only once.

A row is a prompt with its completions. All rows are packed into one token tree. A node is a distinct prefix of a prompt
and a completion, but not the whole completion, whose last token predicts nothing. The parent of a node is this prefix
without its last token. Consecutive decisions of an episode share most of their prompts, so they share most of their
nodes. A node sees itself and its ancestors, and its position is its depth. The result equals that of one sequence per
completion.

Attention is computed in blocks of nodes (:func:`tree_attention`). A block uses only the keys that one of its nodes
sees, so its time does not depend on the other branches of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_SIZE = 128  # nodes in a block of the attention
ATTENTION = "tree_sdpa"  # name of `tree_attention` in transformers


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
class AttentionBlock:
    """Q consecutive nodes, and the S keys that any of them sees."""

    nodes: slice
    keys: Tensor | None  # [S], indices; None: all keys
    mask: Tensor  # [1, 1, Q, S], additive


@dataclass(frozen=True)
class PackedBatch:
    """A tree of L nodes. It has R completions of N tokens in total, each of at most T tokens.

    The keys of attention are those of the C cached tokens and of the L nodes.
    """

    input_ids: Tensor  # [1, L]
    position_ids: Tensor  # [1, L]
    blocks: list[AttentionBlock]
    predictors: Tensor  # [P], nodes that predict a token of a completion
    index: Tensor  # [N], index in ``predictors`` of the node that predicts each completion token
    target: Tensor  # [N], the token
    completion_mask: Tensor  # [R, T], True where a completion has a token; the N True entries are in reading order


def pack(
    rows: Sequence[PromptRow],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    num_cached: int = 0,
    block_size: int = BLOCK_SIZE,
) -> PackedBatch:
    """Pack rows for one forward pass. The completions keep their order, row by row.

    Args:
        rows: prompts and completions.
        dtype: type of the attention masks: the type that the model computes in.
        device: device of the model.
        num_cached: number C of first prompt tokens whose keys and values are cached; they are not packed. If it is not
            0, there must be a single row, and at least one token of its prompt must not be cached.
        block_size: largest number of nodes in a block of the attention.
    """
    if num_cached and not (len(rows) == 1 and num_cached < len(rows[0].prompt_ids)):
        raise ValueError(f"num_cached={num_cached} needs exactly one row with a longer prompt")
    tree = _TokenTree()
    nodes = [node for row in rows for node in tree.add(row.prompt_ids[num_cached:], row.completions)]
    predictors, index = np.unique(nodes, return_inverse=True)
    lengths = np.array([len(c) for row in rows for c in row.completions])

    def tensor(array: Any) -> Tensor:
        return torch.as_tensor(array, dtype=torch.long, device=device)

    return PackedBatch(
        input_ids=tensor([tree.tokens]),
        position_ids=tensor([tree.depths]) + num_cached,
        blocks=_attention_blocks(tree, num_cached=num_cached, size=block_size, dtype=dtype, device=device),
        predictors=tensor(predictors),
        index=tensor(index),
        target=tensor([token for row in rows for completion in row.completions for token in completion]),
        completion_mask=torch.as_tensor(np.arange(lengths.max()) < lengths[:, None], device=device),
    )


class _TokenTree:
    """The distinct prefixes of some rows, one node each, parents before children. Node -1 is the empty prefix."""

    def __init__(self) -> None:
        self.tokens: list[int] = []  # last token of each node's prefix
        self.depths: list[int] = []  # number of tokens before it
        self.parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}  # (node, token) -> node

    def add(self, prompt_ids: Sequence[int], completions: Sequence[Sequence[int]]) -> list[int]:
        """Add a row; returns the node that predicts each token of each completion."""
        predictors, end = [], -1
        for token in prompt_ids:
            end = self._child(end, token)
        for completion in completions:
            node = end
            predictors.append(node)
            for token in completion[:-1]:  # the last token predicts nothing
                node = self._child(node, token)
                predictors.append(node)
        return predictors

    def _child(self, node: int, token: int) -> int:
        child = self._children.get((node, token))
        if child is None:
            child = self._children[node, token] = len(self.tokens)
            self.tokens.append(token)
            self.depths.append(0 if node < 0 else self.depths[node] + 1)
            self.parents.append(node)
        return child

    def path(self, node: int) -> list[int]:
        """A node and its ancestors, in ascending order; empty for node -1."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]


def _attention_blocks(
    tree: _TokenTree, *, num_cached: int, size: int, dtype: torch.dtype, device: torch.device | str
) -> list[AttentionBlock]:
    length = len(tree.tokens)
    blocks = []
    for start in range(0, length, size):
        nodes = range(start, min(start + size, length))
        paths: dict[int, list[int]] = {}  # what each node sees
        for node in nodes:
            parent = tree.parents[node]
            paths[node] = [*(paths[parent] if parent in paths else tree.path(parent)), node]
        seen = np.unique(np.concatenate(list(paths.values())))
        mask = torch.full((1, 1, len(nodes), num_cached + len(seen)), torch.finfo(dtype).min, dtype=dtype)
        mask[..., :num_cached] = 0
        for row, node in enumerate(nodes):
            mask[0, 0, row, num_cached + np.searchsorted(seen, paths[node])] = 0
        keys = np.concatenate([np.arange(num_cached), num_cached + seen])
        blocks.append(
            AttentionBlock(
                slice(start, nodes.stop),
                None if len(seen) == length else torch.as_tensor(keys, device=device),
                mask.to(device),
            )
        )
    return blocks


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_blocks: Sequence[AttentionBlock] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed tree, block by block; transformers' ``sdpa`` attention without ``tree_blocks``.

    Args:
        module: the attention layer.
        query: ``[1, H, L, D]``.
        key: ``[1, G, C + L, D]``; a group of heads shares keys and values.
        value: like ``key``.
        attention_mask: not used with ``tree_blocks``.
        tree_blocks: of a :class:`PackedBatch`. transformers passes it on from the arguments of the model.

    Returns:
        The output ``[1, L, H, D]``, and None for the attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if tree_blocks is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    outputs = []
    for block in tree_blocks:
        keys, values = key, value
        if block.keys is not None:
            keys, values = key.index_select(2, block.keys), value.index_select(2, block.keys)
        outputs.append(sdpa_attention_forward(module, query[:, :, block.nodes], keys, values, block.mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def register_tree_attention() -> str:
    """Make :func:`tree_attention` known to transformers; returns its name for ``attn_implementation``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, tree_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for text generation
    return ATTENTION


def completion_logprobs(model: Any, batch: PackedBatch, *, past: Any = None) -> Tensor:
    """Log-probability of every completion token, given the prompt and the earlier tokens of the completion.

    Args:
        model: a causal language model of transformers that was loaded with :func:`register_tree_attention`.
        batch: the packed rows.
        past: a transformers ``Cache`` with the first ``num_cached`` tokens of the prompt. The forward pass appends the
            remaining tokens of the prompt, in order, and the completions.

    Returns:
        ``[R, T]`` float32, zero where ``completion_mask`` is False. Gradients flow if they are enabled.
    """
    length = batch.input_ids.shape[1]
    num_keys = length + (past.get_seq_length() if past is not None else 0)
    logits = (
        model(
            input_ids=batch.input_ids,
            # transformers makes no mask of its own if it gets one with four axes. Only the blocks' masks are used.
            attention_mask=torch.zeros(1, device=batch.input_ids.device).expand(1, 1, length, num_keys),
            position_ids=batch.position_ids,
            logits_to_keep=batch.predictors,
            past_key_values=past,
            use_cache=past is not None,
            tree_blocks=batch.blocks,
        )
        .logits[0]
        .float()
    )  # (P, V)
    # logsumexp is computed once for each node, since a node can predict the first token of many completions.
    logprobs = logits[batch.index, batch.target] - torch.logsumexp(logits, dim=-1)[batch.index]  # (N,)
    result = torch.zeros(batch.completion_mask.shape, dtype=torch.float32, device=logprobs.device)
    return result.masked_scatter(batch.completion_mask, logprobs)


def padded_logprobs(model: Any, rows: Sequence[PromptRow], *, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """As :func:`pack` and :func:`completion_logprobs`, with one padded sequence for each row.

    A sequence is a prompt and its completions, one after the other; a completion sees the prompt and itself only. Rows
    share nothing, but the whole batch is a few large operations, and little is done in Python. On a GPU this is several
    times as fast as the token tree if the rows have little in common.

    Returns:
        The log-probabilities ``[R, T]`` float32 and their ``completion_mask``.
    """
    num_prompt = max(len(row.prompt_ids) for row in rows)
    branches = [[token for completion in row.completions for token in completion[:-1]] for row in rows]
    width = num_prompt + max(map(len, branches))
    ids = np.zeros((len(rows), width), np.int64)
    positions = np.zeros((len(rows), width), np.int64)
    branch = np.full((len(rows), width), -1, np.int64)  # -1: padding, 0: the prompt, k: completion k
    predictors: list[int] = []  # of all completion tokens, as an index into [B * (width - num_prompt + 1)]
    kept = width - num_prompt + 1  # the last column of the prompts, and the completions
    for b, row in enumerate(rows):
        start = num_prompt - len(row.prompt_ids)  # prompts end in the same column
        ids[b, start:num_prompt] = row.prompt_ids
        positions[b, start:num_prompt] = np.arange(len(row.prompt_ids))
        branch[b, start:num_prompt] = 0
        column = num_prompt
        for k, completion in enumerate(row.completions, start=1):
            inner = len(completion) - 1
            ids[b, column : column + inner] = completion[:-1]
            positions[b, column : column + inner] = len(row.prompt_ids) + np.arange(inner)
            branch[b, column : column + inner] = k
            first = b * kept + column - num_prompt + 1
            predictors += [b * kept, *range(first, first + inner)]
            column += inner
    target = [token for row in rows for completion in row.completions for token in completion]
    lengths = np.array([len(c) for row in rows for c in row.completions])
    completion_mask = torch.as_tensor(np.arange(lengths.max()) < lengths[:, None], device=device)
    logits = model(
        input_ids=torch.as_tensor(ids, device=device),
        attention_mask=_branch_mask(torch.as_tensor(branch, device=device)),
        position_ids=torch.as_tensor(positions, device=device),
        logits_to_keep=kept,
        use_cache=False,
    ).logits  # (B, kept, V)
    used, index = np.unique(predictors, return_inverse=True)
    logits = logits.flatten(0, 1)[torch.as_tensor(used, device=device)].float()  # (P, V)
    at = torch.as_tensor(index, device=device)
    logprobs = logits[at, torch.as_tensor(target, device=device)] - torch.logsumexp(logits, dim=-1)[at]
    result = torch.zeros(completion_mask.shape, dtype=torch.float32, device=logprobs.device)
    return result.masked_scatter(completion_mask, logprobs), completion_mask


def _branch_mask(branch: Tensor) -> Tensor:
    """The attention mask ``[B, 1, L, L]`` of sequences ``[B, L]``: True where a token (row) sees another (column).

    A token sees the earlier ones of the prompt and of its own completion. Padding sees itself, so that no row is empty.
    """
    length = branch.shape[1]
    own, other = branch[:, :, None], branch[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    sees = causal & (own >= 0) & ((other == 0) | (other == own)) & (other >= 0)
    sees |= torch.eye(length, dtype=torch.bool, device=branch.device)
    return sees[:, None]


def split_completions(token_logprobs: Tensor, completion_mask: Tensor) -> list[np.ndarray]:
    """The token log-probabilities ``[R, T]`` as one array ``[T_r]`` for each completion."""
    lengths = completion_mask.sum(dim=1).tolist()
    return [logprobs[:n] for logprobs, n in zip(token_logprobs.cpu().numpy(), lengths, strict=True)]
