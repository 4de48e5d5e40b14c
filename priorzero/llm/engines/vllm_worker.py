"""Code that runs inside vLLM's worker processes, which import it through ``worker_extension_cls``."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import threading
from typing import Any

OWNER_VARIABLE = "PRIORZERO_VLLM_OWNER"  # "PID FOLDER": the process that started vLLM, and its temporary folder


class WorkerExtension:
    """Mixin of vLLM's workers. Its methods are called with ``collective_rpc``."""

    model_runner: Any

    def repack_output_layers(self) -> int:
        """Update the packed copy of the output layer after ``reload_weights``; returns the number of packed layers.

        On a CPU vLLM multiplies with packed copies of its weights. ``reload_weights`` (0.32.0) packs the layers that it
        has loaded. It does not load an output layer that shares its weights with the input embedding, so this layer
        keeps a packed copy of the old weights. The parity error then grew by 1% of each update.
        """
        packed = 0
        for module in self.model_runner.get_model().modules():
            if hasattr(module, "cpu_linear") and module.weight.numel() > 0:  # other layers free their weights
                module.quant_method.process_weights_after_loading(module)
                packed += 1
        return packed

    def ignored_adapter_layers(self) -> list[str]:
        """The layers that have weights in a loaded adapter, and for which vLLM ignores them.

        vLLM (0.32.0) reports only at the level debug that it ignores weights.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        loaded = {name for adapter in manager.list_adapters().values() for name in adapter.loras}
        return sorted(loaded - set(manager.modules))


def end_with_owner(owner: int | None, engine: int | None, folder: str) -> None:
    """Wait until the owner or vLLM's engine has ended, then end this process.

    If it is the owner, end the engine as well and delete the owner's temporary folder. Without this, vLLM's processes
    would survive a killed owner or a killed engine and keep their GPU memory. ``owner`` and ``engine`` are pidfds.
    ``owner`` is None if it has ended already, ``engine`` is None if it is this process.
    """
    if owner is not None:
        ended, _, _ = select.select([fd for fd in (owner, engine) if fd is not None], [], [])
    if owner is None or owner in ended:
        shutil.rmtree(folder, ignore_errors=True)
        if engine is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(engine, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def watch_owner(pid: int, folder: str) -> None:
    """Run :func:`end_with_owner` in a thread."""
    try:
        owner = os.pidfd_open(pid)
    except ProcessLookupError:
        owner = None
    parent = os.getppid()  # vLLM's engine, or the owner if the worker runs inside the engine's process
    # Opened while the owner runs: a process whose parent has ended gets another parent, which must not be killed.
    engine = os.pidfd_open(parent) if owner is not None and parent != pid else None
    threading.Thread(target=end_with_owner, args=(owner, engine, folder), daemon=True).start()


def exit_at_sigterm_of(sender: int) -> None:
    """Wait for a SIGTERM of the process ``sender``, then end this process.

    The stop signals are blocked in vLLM's processes, so that those of a batch system do not end them
    (:func:`priorzero.runtime.signals.children_ignore_stop_signals`). But the engine ends its workers with SIGTERM if it
    cannot start, and waits until they have ended.
    """
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != sender:
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if OWNER_VARIABLE in os.environ:
    _pid, _, _folder = os.environ[OWNER_VARIABLE].partition(" ")
    watch_owner(int(_pid), _folder)
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []):
        threading.Thread(target=exit_at_sigterm_of, args=(os.getppid(),), daemon=True).start()
