"""CUDA graphs of a function: all its kernels are started at once, which saves the time to start each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NUM_WARM_UPS = 3  # calls before the recording, in which libraries allocate their work spaces


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class CudaGraphs:
    """Calls a function of CUDA tensors by replaying a graph. There is one graph for each power of two of rows.

    The first axis of all inputs and outputs is the batch. A row of the outputs may only depend on the same row of the
    inputs, since the rows up to the next power of two contain old inputs. The shapes of the rows never change. The
    function computes no gradients and reads no result, for example with ``item()``. The graph contains the addresses of
    the parameters that the function uses, so these may be changed in place, but not replaced. For one thread only.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._graphs: dict[int, _Graph] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        num_rows = len(inputs[0])
        size = 1 << (num_rows - 1).bit_length()
        if size not in self._graphs:
            self._graphs[size] = self._record(inputs, size=size)
        graph, static_inputs, outputs = self._graphs[size]
        for static, given in zip(static_inputs, inputs, strict=True):
            static[:num_rows].copy_(given)
        graph.replay()
        return tuple(output[:num_rows].clone() for output in outputs)

    @torch.no_grad()
    def _record(self, inputs: tuple[Tensor, ...], *, size: int) -> _Graph:
        # The rows that are not used repeat the first one, so that their values are valid, too.
        padded = tuple(torch.cat([x, x[:1].expand(size - len(x), *x.shape[1:])]) for x in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARM_UPS):
                self._function(*padded)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile; only this thread's operations are recorded.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self._function(*padded)
        return _Graph(graph, padded, outputs)
