"""Log-probabilities of completions of many prompts, where the model computes each distinct prefix only once.

A row is a prompt with its completions. All rows are packed into one token tree. A node is a distinct prefix of a prompt
and a completion, but not the whole completion, whose last token predicts nothing. The parent of a node is this prefix
without its last token. Consecutive decisions of an episode share most of their prompts, so they share most of their
nodes. A node sees itself and its ancestors, and its position is its depth. The result equals that of one sequence per
completion.

Attention is computed in blocks of nodes (:func:`tree_attention`). A block uses only the keys that one of its nodes
sees, so its time does not depend on the other branches of the tree. A GPU needs large blocks, because starting the
operations of a block in each layer takes longer than computing the keys that a small block would save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

CPU_BLOCK_SIZE, GPU_BLOCK_SIZE = 128, 2048  # nodes in a block of the attention
MAX_SINGLE_BLOCK = 4096  # on a GPU, so many nodes are one block
MASK_ALIGNMENT = 8  # the attention of a GPU copies a mask in each layer unless the stride of its rows is a multiple
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
    slots: Tensor  # [N], index of each completion token in the flattened [R, T]
    completion_mask: Tensor  # [R, T], True where a completion has a token; the N True entries are in reading order


def pack(
    rows: Sequence[PromptRow],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    num_cached: int = 0,
    block_size: int | None = None,
) -> PackedBatch:
    """Pack rows for one forward pass. The completions keep their order, row by row.

    Args:
        rows: prompts and completions.
        dtype: type of the attention masks: the type that the model computes in.
        device: device of the model.
        num_cached: number C of first prompt tokens whose keys and values are cached; they are not packed. If it is not
            0, there must be a single row, and at least one token of its prompt must not be cached.
        block_size: largest number of nodes in a block of the attention; None: the best for the device.
    """
    if num_cached and not (len(rows) == 1 and num_cached < len(rows[0].prompt_ids)):
        raise ValueError(f"num_cached={num_cached} needs exactly one row with a longer prompt")
    device = torch.device(device)
    tree = _TokenTree()
    nodes = [node for row in rows for node in tree.add(row.prompt_ids[num_cached:], row.completions)]
    completions = [completion for row in rows for completion in row.completions]
    lengths = np.array([len(completion) for completion in completions])
    mask = np.arange(lengths.max()) < lengths[:, None]  # (R, T)
    if block_size is None:
        gpu_block_size = MAX_SINGLE_BLOCK if len(tree.tokens) <= MAX_SINGLE_BLOCK else GPU_BLOCK_SIZE
        block_size = CPU_BLOCK_SIZE if device.type == "cpu" else gpu_block_size
    runs = _Runs.of(tree.parents)
    blocks = runs.blocks(block_size)
    arrays: list[Any] = [tree.tokens, np.array(tree.depths) + num_cached, *runs.intervals()]
    arrays += np.unique(nodes, return_inverse=True)
    arrays += [[token for completion in completions for token in completion], np.flatnonzero(mask), mask.ravel()]
    arrays += [seen for _, seen in blocks]
    tensors = iter(_to_device(arrays, device))
    input_ids, position_ids, first, last = (next(tensors) for _ in range(4))
    return PackedBatch(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        predictors=next(tensors),
        index=next(tensors),
        target=next(tensors),
        slots=next(tensors),
        completion_mask=next(tensors).bool().view(mask.shape),
        blocks=[
            _attention_block(block, next(tensors), first=first, last=last, num_cached=num_cached, dtype=dtype)
            for block, _ in blocks
        ],
    )


def _to_device(arrays: Sequence[Any], device: torch.device) -> list[Tensor]:
    """One-dimensional integer arrays or lists on a device, int64, in a single copy, since every copy takes time."""
    arrays = [np.asarray(array, dtype=np.int64) for array in arrays]
    joined = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        joined = joined.pin_memory()  # so that the copy does not wait for the GPU
    return list(joined.to(device, non_blocking=True).split([len(array) for array in arrays]))


class _TokenTree:
    """The distinct prefixes of some rows, one node each, parents before children. Node -1 is the empty prefix."""

    def __init__(self) -> None:
        self.tokens: list[int] = []  # last token of each node's prefix
        self.depths: list[int] = []  # number of tokens before it
        self.parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}  # (node, token) -> node

    def add(self, prompt_ids: Sequence[int], completions: Sequence[Sequence[int]]) -> list[int]:
        """Add a row; returns the node that predicts each token of each completion."""
        end = self._path(-1, prompt_ids)[-1]
        predictors = []
        for completion in completions:
            predictors += [end, *self._path(end, completion[:-1])]  # the last token predicts nothing
        return predictors

    def _path(self, node: int, tokens: Sequence[int]) -> list[int]:
        """The nodes of the prefixes that extend the prefix of ``node`` by 1, 2, ... of the tokens."""
        path: list[int] = []
        for token in tokens:
            child = self._children.get((node, token))
            if child is None:
                break
            path.append(child)
            node = child
        first, rest = len(self.tokens), list(tokens[len(path) :])
        if rest:  # new nodes, each the parent of the next
            new = range(first, first + len(rest))
            parents = [node, *new[:-1]]
            depth = 0 if node < 0 else self.depths[node] + 1
            self.tokens += rest
            self.depths += range(depth, depth + len(rest))
            self.parents += parents
            self._children.update(zip(zip(parents, rest, strict=True), new, strict=True))
            path += new
        return path


@dataclass(frozen=True)
class _Runs:
    """The nodes of a tree as runs: each node of a run but the first is a child of the node before.

    There are far fewer runs than nodes, so the loops over runs are fast.
    """

    parents: np.ndarray  # [L], the parent of each node, or -1
    run_of: np.ndarray  # [L], the run of each node
    starts: np.ndarray  # [R], the first node of each run

    @classmethod
    def of(cls, parents: Sequence[int]) -> _Runs:
        array = np.array(parents)
        is_start = array != np.arange(len(array)) - 1
        is_start[0] = True
        return cls(array, np.cumsum(is_start) - 1, np.flatnonzero(is_start))

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers ``[L]`` of the nodes in depth-first order, and of the last descendant of each node.

        Node a is node b or an ancestor of it if ``first[a] <= first[b] <= last[a]``. The next node of a run comes after
        all other children, so all nodes of a run have the same last descendant.
        """
        length, run_of = len(self.parents), self.run_of.tolist()
        run_parents = self.parents[self.starts].tolist()
        sizes = np.diff(self.starts, append=length).tolist()  # number of nodes of a run, and of the runs below it
        below = [0] * (length + 1)  # the same for the runs below a node; the last entry is that of node -1
        for run in range(len(sizes) - 1, -1, -1):
            parent = run_parents[run]
            below[parent] += sizes[run]
            if parent >= 0:
                sizes[run_of[parent]] += sizes[run]
        offsets = np.cumsum([0, *below[: length - 1]]) + np.arange(length)
        offsets -= offsets[self.starts][self.run_of]  # position of a node after the start of its run
        position = offsets.tolist()
        firsts: list[int] = []  # of each run
        used = [0] * (length + 1)  # nodes below a node that have a number already
        for parent, size in zip(run_parents, sizes, strict=True):
            before = firsts[run_of[parent]] + position[parent] + 1 if parent >= 0 else 0
            firsts.append(before + used[parent])
            used[parent] += size
        first, last = np.array(firsts), np.array(firsts) + sizes - 1
        return first[self.run_of] + offsets, last[self.run_of]

    def blocks(self, size: int) -> list[tuple[slice, np.ndarray]]:
        """Consecutive nodes in blocks of at most ``size``, each with the nodes ``[S]`` that any of them sees."""
        blocks = []
        for start in range(0, len(self.parents), size):
            stop = min(start + size, len(self.parents))
            seen = np.zeros(stop, dtype=bool)
            seen[start:] = True
            outside = self.parents[start:stop]
            for node in np.unique(outside[outside < start]):
                while node >= 0 and not seen[node]:
                    first = self.starts[self.run_of[node]]
                    seen[first : node + 1] = True
                    node = self.parents[first]
            blocks.append((slice(start, stop), np.flatnonzero(seen)))
        return blocks


def _attention_block(
    nodes: slice, seen: Tensor, *, first: Tensor, last: Tensor, num_cached: int, dtype: torch.dtype
) -> AttentionBlock:
    """A block of Q nodes from the nodes ``seen`` ``[S]`` and the intervals ``[L]`` of :meth:`_Runs.intervals`."""
    numbers = first[nodes, None]
    visible = (first[seen] <= numbers) & (numbers <= last[seen])  # (Q, S)
    num_queries, num_keys = visible.shape
    width = -(-(num_cached + num_keys) // MASK_ALIGNMENT) * MASK_ALIGNMENT
    mask = torch.zeros((1, 1, num_queries, width), dtype=dtype, device=first.device)[..., : num_cached + num_keys]
    mask[0, 0, :, num_cached:].masked_fill_(~visible, torch.finfo(dtype).min)
    if num_keys == len(first):
        return AttentionBlock(nodes, None, mask)
    cached = torch.arange(num_cached, device=first.device)
    return AttentionBlock(nodes, torch.cat([cached, num_cached + seen]), mask)


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
    """Make :func:`tree_attention` known to transformers; returns its name for ``attn_implementation``.

    It also turns off cuDNN's attention, which torch prefers on an H100: cuDNN builds an execution plan for each new
    number of nodes, and this takes longer than a forward pass.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
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
    return scatter_logprobs(predicted_logprobs(model, batch, past=past), batch.slots, batch.completion_mask)


def predicted_logprobs(model: Any, batch: PackedBatch, *, past: Any = None) -> Tensor:
    """The log-probabilities of :func:`completion_logprobs` in reading order, ``[N]`` float32."""
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
    return _select(logits, batch.index, batch.target)


def _select(logits: Tensor, index: Tensor, target: Tensor) -> Tensor:
    """The log-probability of each token ``target`` ``[N]`` by the logits ``[P, V]`` of the row ``index`` ``[N]``.

    logsumexp is computed once for each row, since a node can predict the first token of many completions.
    """
    return logits[index, target] - torch.logsumexp(logits, dim=-1)[index]


def scatter_logprobs(logprobs: Tensor, slots: Tensor, completion_mask: Tensor) -> Tensor:
    """The log-probabilities ``[N]`` of the tokens of all completions as ``[R, T]``, zero elsewhere.

    ``slots`` and ``completion_mask`` are those of a :class:`PackedBatch`.
    """
    result = torch.zeros(completion_mask.numel(), dtype=torch.float32, device=logprobs.device)
    return result.index_copy(0, slots, logprobs).view(completion_mask.shape)


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
    completions = [completion for row in rows for completion in row.completions]
    lengths = np.array([len(completion) for completion in completions])
    mask = np.arange(lengths.max()) < lengths[:, None]  # (R, T)
    arrays = [ids.ravel(), positions.ravel(), branch.ravel(), *np.unique(predictors, return_inverse=True)]
    arrays += [np.concatenate(completions), np.flatnonzero(mask), mask.ravel()]
    tensors = iter(_to_device(arrays, torch.device(device)))
    input_ids, position_ids, branches_of = (next(tensors).view(ids.shape) for _ in range(3))
    logits = model(
        input_ids=input_ids,
        attention_mask=_branch_mask(branches_of),
        position_ids=position_ids,
        logits_to_keep=kept,
        use_cache=False,
    ).logits  # (B, kept, V)
    used, index, target, slots, completion_mask = tensors
    completion_mask = completion_mask.bool().view(mask.shape)
    logprobs = _select(logits.flatten(0, 1)[used].float(), index, target)
    return scatter_logprobs(logprobs, slots, completion_mask), completion_mask


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
