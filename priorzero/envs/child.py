"""Starting and ending of child processes."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from typing import TypeVar

PARENT_CHECK_S = 0.5
PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends
_libc = ctypes.CDLL(None)
T = TypeVar("T")
D = TypeVar("D")

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


def exit_with_parent(parent: int) -> None:
    """Exit when the parent process has ended, even while another thread hangs in C code without Python's lock."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


def run_in_fork(function: Callable[[], T], *, otherwise: D, timeout_s: float | None = None) -> T | D:
    """The result of ``function`` in a fork of this process, or ``otherwise`` if the fork crashes.

    After ``timeout_s`` seconds the fork is killed, and the result is ``otherwise`` too. None: it may take any time.
    """
    receiver, sender = Pipe(duplex=False)
    process = os.fork()
    if process == 0:
        try:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it must not outlive this process, even if it hangs
            sender.send(function())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    sender.close()
    try:
        if not receiver.poll(timeout_s):
            os.kill(process, signal.SIGKILL)
            return otherwise
        result: T = receiver.recv()
        return result
    except EOFError:
        return otherwise
    finally:
        receiver.close()
        os.waitpid(process, 0)
