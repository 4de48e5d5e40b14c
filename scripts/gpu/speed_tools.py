"""Times on a device, what the device can do at most, and lower bounds that follow from it."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bench_prompts import forward_operations
from gpu_context import Context, Outcome

from priorzero.llm.models import LanguageModel

GIB = 2**30
FLOAT32, TF32, BFLOAT16 = "float32", "tf32", "bfloat16"


# ---- times ----


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what was asked of it. A CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    function: Callable[[], Any],
    device: torch.device,
    *,
    budget_s: float = 0.5,
    max_repeats: int = 10,
    warm_up: bool = True,
) -> tuple[float, Any]:
    """Call a function several times; return the median of the seconds and the last result.

    Args:
        function: what is measured.
        device: it is waited for before each reading of the clock.
        budget_s: no further call begins after this many seconds of measured calls. There is at least one call.
        max_repeats: largest number of measured calls.
        warm_up: call the function once before, without measuring it. The first call compiles, allocates and tunes.
    """
    if warm_up:
        function()
    times: list[float] = []
    while not times or (len(times) < max_repeats and sum(times) < budget_s):
        synchronize(device)
        started = time.perf_counter()
        result = function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times), result


# ---- ceilings ----


@dataclass(frozen=True)
class Ceilings:
    """What a device does at most.

    Attributes:
        bandwidth: bytes a second of a copy within the device's memory, read and written bytes together.
        rates: floating point operations a second of a large matrix product, by type.
    """

    bandwidth: float
    rates: dict[str, float]


@functools.cache
def measure_ceilings(device: torch.device, *, quick: bool) -> Ceilings:
    """Measure the ceilings of a device; later calls return the same result."""
    is_gpu = device.type == "cuda"
    size = 512 if quick else 8192 if is_gpu else 1024
    num_bytes = 2**24 if quick else 2**30 if is_gpu else 2**27
    rates = {}
    for name, dtype, precision in (
        (BFLOAT16, torch.bfloat16, "highest"),
        (TF32, torch.float32, "high"),
        (FLOAT32, torch.float32, "highest"),
    ):
        with matmul_precision(precision):
            rates[name] = 2 * size**3 / product_seconds(size, dtype, device)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s, _ = median_seconds(lambda: target.copy_(source), device, budget_s=0.2, max_repeats=20)
    return Ceilings(2 * num_bytes / copy_s, rates)


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Let float32 matrix products in the block use this precision: ``highest``, or ``high`` for TF32 on a GPU."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


def product_seconds(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one product of two square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return median_seconds(lambda: a @ b, device, budget_s=0.3, max_repeats=20)[0]


def launch_seconds(device: torch.device, *, count: int) -> float:
    """Seconds for one operation on a single number, of ``count`` in a loop."""
    x = torch.zeros(1, device=device)

    def loop() -> None:
        for _ in range(count):
            x.add_(1)

    return median_seconds(loop, device, budget_s=0.2, max_repeats=20)[0] / count


def graph_seconds(device: torch.device, *, count: int) -> float:
    """The same with the operations recorded in a CUDA graph, which is replayed."""
    x = torch.zeros(1, device=device)
    x.add_(1)  # the kernel must be loaded before the recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            x.add_(1)
    return median_seconds(graph.replay, device, budget_s=0.2, max_repeats=20)[0] / count


def check_ceilings(context: Context) -> Outcome:
    """Bandwidth, rates of matrix products, and seconds for the launch of a kernel."""
    ceilings = measure_ceilings(context.device, quick=context.quick)
    figures: dict[str, float | str | bool] = {"copy_gb_per_s": ceilings.bandwidth / 1e9}
    figures |= {f"{name}_tflops": rate / 1e12 for name, rate in ceilings.rates.items()}
    figures["launch_s"] = launch_seconds(context.device, count=100 if context.quick else 1000)
    if context.device.type == "cuda":
        figures["graph_launch_s"] = graph_seconds(context.device, count=100)
    return Outcome(None, figures, "launch: one operation on one number; graph: one of 100 in a replayed CUDA graph")


# ---- lower bounds ----


def dtype_name(llm: LanguageModel) -> str:
    """``float32`` or ``bfloat16``: the type that the model computes in."""
    return BFLOAT16 if llm.compute_dtype == torch.bfloat16 else FLOAT32


def parameter_bytes(llm: LanguageModel) -> float:
    """Bytes of all parameters in the type that the model computes in."""
    return float(sum(p.numel() for p in llm.model.parameters()) * llm.compute_dtype.itemsize)


def forward_floor(llm: LanguageModel, context: Context, *, tokens: int, predictors: int, passes: int) -> float:
    """Seconds that forward passes take at least: reading the parameters, or the products with them.

    Args:
        llm: the model.
        context: of the device.
        tokens: number of tokens of all passes together.
        predictors: tokens for which the output layer is computed.
        passes: number of forward passes. Each reads all parameters once.
    """
    ceilings = measure_ceilings(context.device, quick=context.quick)
    reading_s = passes * parameter_bytes(llm) / ceilings.bandwidth
    operations = forward_operations(llm, tokens=tokens, predictors=predictors)
    return max(reading_s, operations / ceilings.rates[dtype_name(llm)])
