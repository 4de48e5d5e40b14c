"""Results of the device against the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_context import Context, Outcome


def check_float32_is_exact(context: Context) -> Outcome:
    """Matrix products of float32 are computed in float32, not in TF32, which has 10 bits."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    product = (a.to(context.device) @ b.to(context.device)).cpu().double()
    error = float((product - exact).abs().max())
    return Outcome(error < 1e-3, {"error": error, "precision": torch.get_float32_matmul_precision()})


CHECKS: dict[str, Callable[[Context], Outcome]] = {"float32_is_exact": check_float32_is_exact}
