"""Whether this machine can have a GPU, found out without importing torch, which takes seconds."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import runpy
from pathlib import Path

from priorzero.types import UserError


def no_gpu_error() -> UserError:
    """The error of ``run.device=cuda`` without a GPU."""
    return UserError("run.device=cuda: torch sees no GPU; type --set run.device=cpu")


def gpu_is_ruled_out() -> bool:
    """True if torch will certainly see no GPU: it is a CPU build, all GPUs are hidden, or there is no driver.

    False does not mean that there is a GPU.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return True
    spec = importlib.util.find_spec("torch")  # finds the package without importing it
    version = Path(spec.origin).parent / "version.py" if spec is not None and spec.origin else None
    if version is None or not version.is_file():
        return False
    build = runpy.run_path(str(version))
    if build.get("hip") or build.get("rocm"):
        return False
    if build.get("cuda") is None:
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False
