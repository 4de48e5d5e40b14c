"""The classes that Ray runs as actors, each in a process of its own."""

from __future__ import annotations

import sys

import torch
from loguru import logger

from priorzero.llm.models import choose_device
from priorzero.settings import Settings


def set_up_process(settings: Settings, *, threads: int = 1) -> torch.device:
    """Set up the log of this process and torch's CPU threads; returns the device of its models."""
    logger.remove()
    logger.add(sys.stderr, level="INFO", format="{level: <7} {message}", filter=lambda r: "topic" not in r["extra"])
    torch.set_num_threads(settings.run.num_threads or threads)
    return choose_device(settings.run.device)
