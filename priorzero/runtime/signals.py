"""The signals that ask a run to stop, and their effect on the processes that a run starts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

# What a terminal, a closed connection and the batch systems send before they kill a process. Which of them, and how
# long before, depends on the system and its settings: Slurm sends SIGTERM or what `--signal` names, LSF SIGUSR2 or
# SIGINT and later SIGTERM, Grid Engine SIGUSR1, SIGUSR2 or SIGXCPU, PBS SIGTERM. The kernel sends SIGXCPU every second
# from the limit of the CPU time on.
STOP_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)


@contextmanager
def children_ignore_stop_signals() -> Iterator[None]:
    """Processes that this thread starts within the block do not react to stop signals, nor do the ones they start.

    A terminal or a batch system sends its signal to all processes of a run. This process handles it and still needs
    the others to finish its step. So they can only be ended by SIGKILL, or by what they read from this process.

    The signals are blocked: unlike handlers, this is inherited when another program is executed. In this process,
    another thread receives them meanwhile, or this thread does after the block.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
