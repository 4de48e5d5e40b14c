"""Scores with CUDA graphs: padded batches, and what happens if a graph cannot be recorded. The graphs need a GPU."""

from __future__ import annotations

import pytest
import torch

from priorzero.llm import scoring_graphs
from priorzero.llm.packing import PromptRow, pack, predicted_logprobs
from priorzero.llm.scoring_graphs import GraphScorer, pad_batch, padded_size
from priorzero.runtime.cuda_graphs import RecordingError
from tests.helpers.models import make_tiny_llm

ROWS = [
    PromptRow(list(range(1, 70)), [[1, 2, 3], [4]]),
    PromptRow([9, 3], [[7, 7], [1, 2, 3, 4], [8]]),
]


@pytest.fixture(scope="module")
def llm(smollm2):
    return make_tiny_llm(smollm2.tokenizer)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, 64), (48, 64), (64, 64), (65, 96), (96, 96), (97, 128), (128, 128), (513, 768), (769, 1024)],
)
def test_padded_size_is_a_power_of_two_or_three_quarters_of_one(size, expected):
    assert padded_size(size) == expected


@torch.no_grad()
def test_pad_batch_leaves_the_log_probabilities_as_they_are(llm):
    batch = pack(ROWS, dtype=torch.float32, device="cpu", block_size=1000)
    padded = pad_batch(batch)
    assert batch.input_ids.shape == (1, 77) and padded.input_ids.shape == (1, 96)
    assert padded.predictors.shape == padded.index.shape == padded.target.shape == (64,)
    expected = predicted_logprobs(llm.model, batch)
    got = predicted_logprobs(llm.model, padded)
    torch.testing.assert_close(got[: len(expected)], expected, atol=1e-5, rtol=0)
    assert got.isfinite().all()


class PlainCalls:
    """In place of CUDA graphs: calls the function."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *inputs):
        return self.function(*inputs)


class NoGraphs(PlainCalls):
    def __call__(self, *inputs):
        raise RecordingError("operation not permitted when stream is capturing")


@torch.no_grad()
@pytest.mark.parametrize("graphs", [PlainCalls, NoGraphs])
def test_graph_scorer_equals_the_model_with_and_without_graphs(llm, monkeypatch, graphs):
    monkeypatch.setattr(scoring_graphs, "CudaGraphs", graphs)
    # On a GPU, so many tokens are one block.
    monkeypatch.setattr("priorzero.llm.packing.CPU_BLOCK_SIZE", 1000)
    warnings = []
    monkeypatch.setattr(scoring_graphs.logger, "warning", warnings.append)
    scorer = GraphScorer(llm)
    expected, expected_mask = llm.token_logprobs(ROWS)
    for _ in range(2):
        logprobs, mask = scorer.token_logprobs(ROWS)
        assert torch.equal(mask, expected_mask)
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    assert len(warnings) == (graphs is NoGraphs)
