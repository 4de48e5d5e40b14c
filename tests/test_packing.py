"""Tests of packed rows against one sequence per completion with the model's own causal attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from priorzero.llm.packing import (
    PromptRow,
    completion_logprobs,
    pack,
    padded_logprobs,
    register_tree_attention,
)
from tests.helpers.models import make_tiny_llm

token = st.integers(0, 4)  # few, so that completions share prefixes
row = st.builds(
    PromptRow,
    st.lists(token, min_size=1, max_size=9),
    st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=4),
)


def one_sequence_each(model, rows):
    """Each completion in its own sequence, without padding, masks and position ids."""
    results = []
    for r in rows:
        for completion in r.completions:
            ids = torch.tensor([[*r.prompt_ids, *completion]])
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
            n = len(r.prompt_ids)
            results.append(torch.stack([logprobs[n - 1 + t, c] for t, c in enumerate(completion)]))
    return results


@pytest.fixture(scope="module")
def model(smollm2):
    return make_tiny_llm(smollm2.tokenizer).model


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=4))
def test_completion_logprobs_equals_one_sequence_per_completion(model, rows):
    with torch.no_grad():
        batch = pack(rows, dtype=torch.float32, device="cpu")
        packed = completion_logprobs(model, batch)
        plain = one_sequence_each(model, rows)
    assert packed.shape == (sum(len(r.completions) for r in rows), max(len(c) for r in rows for c in r.completions))
    for got, mask, want in zip(packed, batch.completion_mask, plain, strict=True):
        assert mask.sum() == len(want)
        torch.testing.assert_close(got[mask], want, atol=1e-4, rtol=0)
        assert (got[~mask] == 0).all()


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=4))
def test_padded_logprobs_equals_one_sequence_per_completion(model, rows):
    with torch.no_grad():
        padded, completion_mask = padded_logprobs(model, rows, device="cpu")
        plain = one_sequence_each(model, rows)
    assert padded.shape == (sum(len(r.completions) for r in rows), max(len(c) for r in rows for c in r.completions))
    for got, mask, want in zip(padded, completion_mask, plain, strict=True):
        assert mask.sum() == len(want)
        torch.testing.assert_close(got[mask], want, atol=1e-4, rtol=0)
        assert (got[~mask] == 0).all()


def test_completion_logprobs_gradient_equals_that_of_one_sequence_per_completion(model):
    rows = [PromptRow([5, 6, 7, 8], [[1, 2, 3], [4]]), PromptRow([9, 3], [[7, 7], [1, 2, 3, 4], [8]])]

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.ravel() for p in model.parameters() if p.grad is not None])

    packed = gradient(completion_logprobs(model, pack(rows, dtype=torch.float32, device="cpu")).sum())
    plain = gradient(torch.cat(one_sequence_each(model, rows)).sum())
    assert plain.norm() > 1
    assert (packed - plain).norm() / plain.norm() < 1e-5


def episode_rows(steps):
    """Decisions of an episode: a transcript that grows, a tail of each decision, and its commands."""
    transcript, rows = [9, 8, 7, 9, 8], []
    for step in range(steps):
        rows.append(PromptRow([*transcript, 6, step, 5], [[1, 2, 3], [1, 2], [4, step]]))
        transcript += [3, step]
    return rows


@pytest.mark.parametrize("block_size", [1, 3, 7, 128, 2048])
def test_completion_logprobs_does_not_depend_on_the_block_size(model, block_size):
    rows = episode_rows(6)
    with torch.no_grad():
        packed = completion_logprobs(model, pack(rows, dtype=torch.float32, device="cpu", block_size=block_size))
        plain = torch.cat(one_sequence_each(model, rows))
    torch.testing.assert_close(packed[packed != 0], plain, atol=1e-4, rtol=0)


def test_pack_computes_every_distinct_prefix_once():
    rows = episode_rows(6)
    batch = pack(rows, dtype=torch.float32, device="cpu")
    transcript, tails, commands = 5 + 5 * 2, 6 * 3, 6 * 3  # of a decision's commands: 1, 1 2, and 4
    assert batch.input_ids.shape == (1, transcript + tails + commands)
    assert pack([*rows, *rows], dtype=torch.float32, device="cpu").input_ids.tolist() == batch.input_ids.tolist()


def test_attention_blocks_hold_only_the_keys_that_they_need():
    trunk = list(range(8))
    rows = [PromptRow([*trunk, branch, *range(10, 17)], [[1]]) for branch in (20, 21, 22)]
    first, *branches = pack(rows, dtype=torch.float32, device="cpu", block_size=8).blocks
    assert first.keys.tolist() == list(range(8))
    for number, block in enumerate(branches):
        own = range(8 + 8 * number, 16 + 8 * number)
        assert (block.nodes.start, block.nodes.stop) == (own.start, own.stop)
        assert block.keys.tolist() == [*range(8), *own]
        seen = (block.mask[0, 0] == 0).tolist()
        assert seen == [[True] * (8 + n + 1) + [False] * (7 - n) for n in range(8)]


class CopyCounter(TorchDispatchMode):
    """Counts the copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.device != args[0].device:
            self.copies += 1
        return result


def test_pack_copies_once_to_a_gpu_and_computes_nothing_on_the_cpu(smollm2):
    """On the device ``meta``, which stands for a GPU, an operation fails if it needs a value on the CPU."""
    rows = [PromptRow([5, 6, 7, 8] * 1200, [[1, 2, 3], [4]]), PromptRow([9, 3] * 300, [[7, 7], [1, 2, 3, 4], [8]])]
    with CopyCounter() as counter:
        batch = pack(rows, dtype=torch.float32, device="meta")
    assert counter.copies == 1
    assert len(batch.blocks) == 3  # of up to 2048 nodes
    tensors = [t for t in vars(batch).values() if isinstance(t, torch.Tensor)]
    tensors += [t for block in batch.blocks for t in (block.keys, block.mask) if t is not None]
    assert {t.device.type for t in tensors} == {"meta"}
    model = make_tiny_llm(smollm2.tokenizer).model.to("meta")
    logprobs = completion_logprobs(model, batch)
    assert logprobs.shape == (5, 4)
    logprobs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_attention_masks_have_aligned_rows():
    """Otherwise the attention of a GPU copies them in each layer."""
    for length in range(1, 20):
        [block] = pack([PromptRow(list(range(length)), [[1]])], dtype=torch.float32, device="cpu").blocks
        assert block.mask.shape == (1, 1, length, length) and block.mask.stride()[-2:] == (-(-length // 8) * 8, 1)


def test_register_tree_attention_turns_off_the_attention_of_cudnn():
    torch.backends.cuda.enable_cudnn_sdp(True)
    register_tree_attention()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
