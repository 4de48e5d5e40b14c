"""Command lines that run a function of this package in a new Python process."""

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
    """The command line that calls ``target`` (``"module:function"``) with string arguments in a new process.

    The new process uses this process's import path. Unlike multiprocessing's "spawn", it does not import the parent's
    main module. That module may import torch, which takes seconds and hundreds of megabytes, or start a training run.
    """
    return [sys.executable, "-c", _RUN, json.dumps(sys.path), target, *arguments]
