"""CUDA graphs of a function: all its kernels are started at once, which saves the time to start each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

NUM_WARM_UPS = 3  # calls before the recording, in which libraries allocate their work spaces


class RecordingError(RuntimeError):
    """The function does something that a graph cannot record."""


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class CudaGraphs:
    """Calls a function of CUDA tensors by replaying a graph. There is one graph for each combination of input shapes.

    At most ``max_graphs`` are kept, the last used ones, because each has inputs and outputs of its own.

    The function computes no gradients and reads no result, for example with ``item()``. The graph contains the
    addresses of the parameters that the function uses, so these may be changed in place, but not replaced. Only one
    thread may call it at a time.

    A call raises RecordingError if the function cannot be recorded.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], *, max_graphs: int = 16) -> None:
        self._function = function
        self._max_graphs = max_graphs
        self._graphs: OrderedDict[tuple[torch.Size, ...], _Graph] = OrderedDict()  # least recently used first
        self._pool: Any = None  # memory that the graphs share, since only one of them runs at a time

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        # Inference tensors could not be changed later.
        with torch.inference_mode(False), torch.no_grad():
            shapes = tuple(x.shape for x in inputs)
            if shapes not in self._graphs:
                if len(self._graphs) == self._max_graphs:
                    self._graphs.popitem(last=False)
                self._graphs[shapes] = self._record(inputs)
            self._graphs.move_to_end(shapes)
            graph, static_inputs, outputs = self._graphs[shapes]
            for static, given in zip(static_inputs, inputs, strict=True):
                static.copy_(given)
            graph.replay()
            return tuple(output.clone() for output in outputs)

    def _record(self, inputs: tuple[Tensor, ...]) -> _Graph:
        static_inputs = tuple(torch.empty_like(x).copy_(x) for x in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARM_UPS):
                self._function(*static_inputs)
        torch.cuda.current_stream().wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile; only this thread's operations are recorded.
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = self._function(*static_inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RecordingError(" ".join(str(error).split())[:200]) from error
        return _Graph(graph, static_inputs, outputs)
