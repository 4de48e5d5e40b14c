"""Synthetic episodes: step records, segments and the settings of a small world model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from easydict import EasyDict

from priorzero.config import resolve_settings
from priorzero.settings import Settings
from priorzero.types import GameState, StepRecord
from priorzero.world_model.lightzero import unizero_config
from priorzero.world_model.segment import PriorZeroGameSegment, SegmentWriter

FEATURE_SIZE = 6
COMMANDS = ("north", "south", "take lamp", "open box")
WORLD_MODEL = {"embed_dim": 16, "num_heads": 2, "num_unroll_steps": 4, "context_length": 4, "dropout": 0.0}


def demo_settings(*, segment_length: int = 4, buffer_size: int = 500, batch_size: int = 4) -> Settings:
    """Settings of a small world model without an LLM."""
    return resolve_settings(
        {
            "env": {"action_space_size": 8},
            "world_model": WORLD_MODEL,
            "prior": {"enabled": False},
            "replay": {"segment_length": segment_length, "buffer_size": buffer_size},
            "train": {"batch_size": batch_size, "td_steps": 2},
            "eval": {"modes": ["world_model"]},
        }
    )


def demo_config(**changes: int) -> EasyDict:
    """LightZero's policy configuration of :func:`demo_settings`."""
    return unizero_config(demo_settings(**changes), feature_size=FEATURE_SIZE, device="cpu")


def demo_record(step: int, *, episode: int = 0, done: bool = False, reward: float | None = None) -> StepRecord:
    """Decision ``step`` of a synthetic episode. Features, action and reward are functions of ``step``."""
    actions = COMMANDS[: 2 + step % 3]
    chosen = step % len(actions)
    return StepRecord(
        state=GameState(f"episode {episode}, room {step}", actions, score=0.0, max_score=10.0, moves=step),
        features=np.full(FEATURE_SIZE, 100 * episode + step, dtype=np.float32),
        action_indices=np.array([7 - 2 * COMMANDS.index(action) for action in actions]),  # 7, 5, 3, 1
        prompt=f"prompt of episode {episode}, step {step}",
        prior=None,
        visit_counts=np.array([3 if k == chosen else 1 for k in range(len(actions))]),
        root_value=0.5,
        predicted_value=0.25,
        chosen=chosen,
        reward=float(step) if reward is None else reward,
        done=done,
        episode=episode,
        step=step,
    )


def demo_episode(*, length: int, episode: int = 0, ends: bool = True) -> Iterator[tuple[StepRecord, np.ndarray]]:
    """The decisions of an episode, each with the features of the state after it."""
    for step in range(length):
        record = demo_record(step, episode=episode, done=ends and step == length - 1)
        yield record, np.full(FEATURE_SIZE, 100 * episode + step + 1, dtype=np.float32)


def demo_segments(
    config: EasyDict, *, lengths: Sequence[int], ends: bool = True, truncated: bool = False
) -> list[PriorZeroGameSegment]:
    """The segments of one episode of each length. If ``ends`` is false, the episodes are interrupted."""
    segments = []
    for episode, length in enumerate(lengths):
        writer = SegmentWriter(config)
        for record, next_features in demo_episode(length=length, episode=episode, ends=ends):
            segments += writer.add(record, next_features=next_features, truncated=truncated)
        if not ends:
            segments += writer.flush(final_features=next_features)
    return segments
