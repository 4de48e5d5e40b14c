"""Made-up episodes, for looking at segments and the buffer without a game or a model (and for tests).

python -m priorzero.demo segment
python -m priorzero.demo buffer
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from priorzero.buffer import PriorZeroGameBuffer
from priorzero.config import resolve_settings
from priorzero.lightzero import unizero_config
from priorzero.segment import PriorZeroGameSegment, SegmentWriter
from priorzero.types import GameState, StepRecord

FEATURE_SIZE = 6
COMMANDS = ("north", "south", "take lamp", "open box")


def demo_settings(*, segment_length: int = 4, buffer_size: int = 500, batch_size: int = 4) -> Any:
    """Settings of a very small world model without an LLM."""
    return resolve_settings(
        {
            "env": {"action_space_size": 8},
            "world_model": {
                "embed_dim": 16,
                "num_heads": 2,
                "num_unroll_steps": 4,
                "context_length": 4,
                "dropout": 0.0,
            },
            "prior": {"enabled": False},
            "replay": {"segment_length": segment_length, "buffer_size": buffer_size},
            "train": {"batch_size": batch_size, "td_steps": 2},
            "eval": {"modes": ["world_model"]},
        }
    )


def demo_config(**changes: int) -> Any:
    """LightZero's configuration for :func:`demo_settings`."""
    return unizero_config(demo_settings(**changes), feature_size=FEATURE_SIZE, device="cpu")


def demo_record(step: int, *, episode: int = 0, done: bool = False, reward: float | None = None) -> StepRecord:
    """Decision ``step`` of a made-up episode; its features, action and reward say which one it is."""
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
    """Decisions of an episode, each with the features of the state after it."""
    for step in range(length):
        record = demo_record(step, episode=episode, done=ends and step == length - 1)
        yield record, np.full(FEATURE_SIZE, 100 * episode + step + 1, dtype=np.float32)


def demo_segments(config: Any, *, lengths: Sequence[int]) -> list[PriorZeroGameSegment]:
    """Segments of several episodes."""
    segments = []
    for episode, length in enumerate(lengths):
        writer = SegmentWriter(config)
        for record, next_features in demo_episode(length=length, episode=episode):
            segments += writer.add(record, next_features=next_features)
    return segments


def show_segments() -> None:
    """Cut an episode of 7 decisions into segments of 4."""
    writer = SegmentWriter(demo_config(segment_length=4))
    for record, next_features in demo_episode(length=7):
        for segment in writer.add(record, next_features=next_features):
            print(f"segment of {len(segment.records)} decisions and {len(segment) - len(segment.records)} of padding")
            for made, value in zip(segment.records, segment.returns, strict=True):
                print(f"  step {made.step}: {made.action_text!r} reward {made.reward:g} return {value:.3f}")


def show_buffer() -> None:
    """Fill a small buffer and draw one batch."""
    from priorzero.policy import PriorZeroPolicy

    settings = demo_settings(segment_length=8, buffer_size=60)
    config = unizero_config(settings, feature_size=FEATURE_SIZE, device="cpu")
    policy = PriorZeroPolicy(settings, feature_size=FEATURE_SIZE, device="cpu", llm=None)
    buffer = PriorZeroGameBuffer(config, rng=np.random.default_rng(0))
    buffer.push(demo_segments(config, lengths=[5, 20, 30, 12]))
    current_batch, target_batch, game_segments = buffer.sample(4, policy)
    print(f"{buffer.get_num_of_transitions()} decisions in {buffer.get_num_of_game_segments()} segments")
    print(
        f"observations {current_batch[0].shape} rewards {target_batch[0].shape} visit targets {target_batch[2].shape}"
    )
    for made, value in zip(game_segments.records(), game_segments.returns(), strict=True):
        print(f"  episode {made.episode} step {made.step}: {made.action_text!r} return {value:.3f}")


if __name__ == "__main__":
    checks = {"segment": show_segments, "buffer": show_buffer}
    if len(sys.argv) != 2 or sys.argv[1] not in checks:
        sys.exit("usage: python -m priorzero.demo segment|buffer")
    checks[sys.argv[1]]()
