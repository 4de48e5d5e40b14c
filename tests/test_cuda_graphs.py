"""Which graphs are kept. Recording and replaying needs a GPU: scripts/gpu/check.py compares the results there."""

from __future__ import annotations

import pytest
import torch

from priorzero.runtime.cuda_graphs import CudaGraphs, _Graph


class FakeGraph:
    """In place of a recorded graph: computes the outputs from the inputs at that time."""

    def __init__(self, inputs, outputs):
        self.inputs, self.outputs = inputs, outputs

    def replay(self):
        self.outputs[0].copy_(self.inputs[0] * 2)


@pytest.fixture
def graphs(monkeypatch):
    """Graphs of ``x * 2``, at most two, whose attribute ``recorded`` has the recorded sizes."""

    def record(self, inputs):
        self.recorded.append(len(inputs[0]))
        static = tuple(x.clone() for x in inputs)
        outputs = (torch.zeros_like(static[0]),)
        return _Graph(FakeGraph(static, outputs), static, outputs)

    monkeypatch.setattr(CudaGraphs, "_record", record)
    made = CudaGraphs(lambda x: (x * 2,), max_graphs=2)
    made.recorded = []
    return made


def test_cuda_graphs_keep_the_last_used_shapes(graphs):
    for size in (1, 2, 1, 3, 1, 2):  # 3 replaces 2, since 1 was used later, and then 2 replaces 3
        [result] = graphs(torch.full((size,), 5.0))
        assert result.tolist() == [10.0] * size
    assert graphs.recorded == [1, 2, 3, 2]


def test_cuda_graphs_results_are_not_overwritten_by_the_next_call(graphs):
    [first] = graphs(torch.ones(2))
    [second] = graphs(torch.full((2,), 7.0))
    assert first.tolist() == [2.0, 2.0] and second.tolist() == [14.0, 14.0]


def test_cuda_graphs_results_can_be_changed_after_inference_mode(graphs):
    with torch.inference_mode():
        [result] = graphs(torch.ones(2))
    assert not result.is_inference()
