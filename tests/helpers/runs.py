"""Short runs of the training loop, and reading what a run has written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch

from priorzero.runs.checkpoint import Checkpoint
from priorzero.runs.summary import RunSummary
from priorzero.settings import Settings
from priorzero.train import run_training
from tests.helpers.models import make_settings

# A run of a few seconds with toy games. NO_LLM leaves the LLM out.
SHORT: dict[str, dict[str, Any]] = {
    "run": {"env_id": "toy", "max_iter": 6, "checkpoint_every": 3, "num_threads": 1, "exp_name": "run"},
    "env": {"max_episode_steps": 8},
    "world_model": {"embed_dim": 64, "num_heads": 2},
    "search": {"num_simulations": 4, "deviation_prob": 0.5},
    "train": {"collect_env_steps": 10, "batch_size": 8, "update_per_collect": 2, "novelty_bonus": 0.1},
    "llm": {"batch_size": 2, "micro_batch_size": 1},
    "replay": {"segment_length": 5, "buffer_size": 30},
    "eval": {"every": 3},
}
NO_LLM: dict[str, dict[str, Any]] = {"prior": {"enabled": False}, "eval": {"modes": ["world_model"]}}


def short_settings(folder, *layers: dict[str, dict[str, Any]]) -> Settings:
    """Settings of a short run under ``folder``."""
    return make_settings(SHORT, {"run": {"output_dir": str(folder)}}, *layers)


@contextlib.contextmanager
def restored_threads() -> Iterator[None]:
    """Restore the number of torch's threads, which a run or an agent sets."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(settings: Settings, *, checkpoint: Checkpoint | None = None) -> RunSummary:
    """``run_training``; the number of torch's threads is restored."""
    with restored_threads():
        return run_training(settings, checkpoint=checkpoint)


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def lines(folder, name):
    """The lines of a JSON-lines file, without the time."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "wall_s"} for line in found]
