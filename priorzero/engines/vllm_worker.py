"""What runs inside vLLM's worker processes."""

from __future__ import annotations

from typing import Any


class CPUReload:
    """Mixed into vLLM's CPU workers by ``worker_extension_cls``."""

    model_runner: Any

    def repack_output_layers(self) -> int:
        """Bring the output layer's packed copy up to date after ``reload_weights``; returns how many were packed.

        On a CPU vLLM multiplies with packed copies of its weights. ``reload_weights`` (0.32.0) packs again what it has
        loaded, but an output layer that shares its weights with the input embedding is not loaded itself and keeps its
        copy of the old ones: seen as a parity error that grew by 1% of each update.
        """
        packed = 0
        for module in self.model_runner.get_model().modules():
            if hasattr(module, "cpu_linear") and module.weight.numel() > 0:  # weights of other layers are let go of
                module.quant_method.process_weights_after_loading(module)
                packed += 1
        return packed
