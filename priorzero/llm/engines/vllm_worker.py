"""What runs inside vLLM's worker processes; imported there by ``worker_extension_cls``."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import threading
from typing import Any

OWNER_VARIABLE = "PRIORZERO_VLLM_OWNER"  # "PID FOLDER" of the process that started vLLM, and its temporary folder


class WorkerExtension:
    """Mixed into vLLM's workers."""

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


def end_with_owner(owner: int | None, engine: int | None, folder: str) -> None:
    """Wait for the owner to end, however it does, and then end vLLM and remove the folder.

    vLLM's processes outlive a killed owner and would hold its GPU memory for ever.

    Args:
        owner: file descriptor of the process that started vLLM; None if it has ended already.
        engine: likewise of the process of vLLM's engine, taken while the owner lived (a process whose parent has ended
            gets another one, which is none of our business); None if this is it.
        folder: the owner's temporary folder.
    """
    if owner is not None:
        select.select([owner], [], [])
    shutil.rmtree(folder, ignore_errors=True)
    if engine is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(engine, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def watch_owner(pid: int, folder: str) -> None:
    """Start :func:`end_with_owner` in a thread."""
    try:
        owner = os.pidfd_open(pid)
    except ProcessLookupError:
        owner = None
    parent = os.getppid()  # vLLM's engine or, if the worker runs within it, the owner
    engine = os.pidfd_open(parent) if owner is not None and parent != pid else None
    threading.Thread(target=end_with_owner, args=(owner, engine, folder), daemon=True).start()


if OWNER_VARIABLE in os.environ:
    _pid, _, _folder = os.environ[OWNER_VARIABLE].partition(" ")
    watch_owner(int(_pid), _folder)
