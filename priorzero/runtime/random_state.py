"""The global random number generators, which LightZero and torch use."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from priorzero.types import Plain


def seed_globals(seeds: Sequence[np.random.SeedSequence]) -> None:
    """Seed the generators of Python, numpy and torch, in this order, each from a seed sequence of its own."""
    numbers = [int(seed.generate_state(1)[0]) for seed in seeds]
    random.seed(numbers[0])
    np.random.seed(numbers[1])
    torch.manual_seed(numbers[2])


def global_random_state() -> Plain:
    """The state of the generators of Python, numpy and torch, as plain data."""
    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": (version, list(numbers), gauss),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_global_random_state(state: Plain) -> None:
    """Restore :func:`global_random_state`. GPU generators are restored only if the number of GPUs is the same."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": inner["key"].numpy().astype(np.uint32)}})
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
