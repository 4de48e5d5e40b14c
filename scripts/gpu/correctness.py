"""Results of the device against the CPU: float32 within 1e-4, bfloat16 within the bounds of ``correctness_llm``."""

from __future__ import annotations

from collections.abc import Callable

import correctness_llm
import correctness_state
import correctness_world_model
import torch
from gpu_context import Context, Outcome


def check_float32_is_exact(context: Context) -> Outcome:
    """Matrix products of float32 are computed in float32, not in TF32, which has 10 bits.

    torch's default is float32, and neither this package nor LightZero and DI-engine change it.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    product = (a.to(context.device) @ b.to(context.device)).cpu().double()
    error = float((product - exact).abs().max())  # TF32: 0.02
    precision = torch.get_float32_matmul_precision()
    return Outcome(error < 1e-3 and precision == "highest", {"error": error, "precision": precision})


CHECKS: dict[str, Callable[[Context], Outcome]] = {
    "float32_is_exact": check_float32_is_exact,
    **correctness_llm.CHECKS,
    **correctness_world_model.CHECKS,
    **correctness_state.CHECKS,
}
