"""Command lines that run one of this package's functions in a fresh Python process."""

from __future__ import annotations

import json
import sys

_RUN = (
    "import importlib, json, sys; "
    "sys.path[:] = json.loads(sys.argv[1]); "
    "module, function = sys.argv[2].split(':'); "
    "getattr(importlib.import_module(module), function)(*sys.argv[3:])"
)


def python_command(target: str, *arguments: str) -> list[str]:
    """The command line that calls ``target`` (``"module:function"``) with string arguments in a fresh process.

    The fresh process gets this one's import path, so it finds whatever is importable here. Unlike multiprocessing's
    "spawn", it does not import the parent's main module first: that one may import torch (seconds and hundreds of
    megabytes for each process) or start a second training run.
    """
    # "" stands for the working folder; a process may change that, a child must still find the same modules.
    return [sys.executable, "-c", _RUN, json.dumps(sys.path), target, *arguments]
