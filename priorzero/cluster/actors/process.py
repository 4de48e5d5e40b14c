"""What every process of a run does first."""

from __future__ import annotations

import sys

import torch
from loguru import logger

from priorzero.llm.models import choose_device
from priorzero.settings import Settings


def set_up_process(settings: Settings, *, threads: int = 1) -> torch.device:
    """Set up the log and the CPU threads of this process.

    Args:
        settings: all settings.
        threads: CPU threads of torch, unless ``run.num_threads`` is set.

    Returns:
        The device of this process's models.
    """
    logger.remove()
    logger.add(sys.stderr, level="INFO", format="{level: <7} {message}", filter=lambda r: "topic" not in r["extra"])
    torch.set_num_threads(settings.run.num_threads or threads)
    return choose_device(settings.run.device)
