"""Tests of packed rows against one sequence per completion with the model's own causal attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from priorzero.llm.packing import PromptRow, completion_logprobs, pack
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
