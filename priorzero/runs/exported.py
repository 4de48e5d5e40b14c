"""The files of an exported agent. Those that a checkpoint has, too, are read alike from both.

An exported agent is a folder that :mod:`priorzero.exporting` writes. Unlike a checkpoint, it has no training state, and
no file of it has to be unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from priorzero.runs.files import EXPORTED_WORLD_MODEL, PLAY_STATE, TRAINING_STATE, WORLD_MODEL
from priorzero.types import Plain

Outcomes = dict[tuple[str, str], tuple[float, bool]]  # of a game, see GameMemory


@dataclass(frozen=True)
class PlayState:
    """What an agent has learned besides its models.

    Attributes:
        prior_weights: weights of the prior at the root by game, and how many targets they are from; see
            :class:`~priorzero.play.prior_weights.PriorWeights`. None for a run on a Ray cluster, whose checkpoints do
            not contain them.
        memories: the outcomes of actions by game; empty if the prompts contain no memory (``llm.memory_lines``).
    """

    prior_weights: Mapping[str, Mapping[str, list[float]]] | None = None
    memories: Mapping[str, Outcomes] = field(default_factory=dict)

    @property
    def prior_weights_state(self) -> Plain | None:
        """For ``PriorWeights.load_state_dict``, before the first episode; None if they are not known."""
        return None if self.prior_weights is None else {**self.prior_weights, "traces": {}}

    def to_json(self) -> str:
        """As a text that :meth:`from_json` reads; no digit is lost."""
        memories = {
            game: [[*place, *outcome] for place, outcome in outcomes.items()]
            for game, outcomes in self.memories.items()
        }
        return json.dumps({"prior_weights": self.prior_weights, "memories": memories}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PlayState:
        """The inverse of :meth:`to_json`."""
        content = json.loads(text)
        memories = {
            game: {(room, action): (points, lost) for room, action, points, lost in outcomes}
            for game, outcomes in content["memories"].items()
        }
        return cls(content["prior_weights"], memories)


def is_exported(folder: Path) -> bool:
    """Whether a folder contains an exported agent."""
    return (folder / EXPORTED_WORLD_MODEL).is_file()


def read_world_model(folder: Path) -> dict[str, Any]:
    """The world model's parameters and buffers by name, from a checkpoint or an exported agent.

    Raises:
        OSError: the file does not exist, or cannot be read.
    """
    if is_exported(folder):
        from safetensors.torch import load_file

        return load_file(folder / EXPORTED_WORLD_MODEL)
    import torch

    state: dict[str, Any] = torch.load(folder / WORLD_MODEL, map_location="cpu", weights_only=True)
    return state


def write_world_model(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the world model's parameters and buffers as safetensors.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    # safetensors refuses tensors that share memory, or have gaps in it.
    copies = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    (folder / EXPORTED_WORLD_MODEL).write_bytes(save(copies, metadata={"format": "pt"}))


def read_play_state(folder: Path, manifest: Mapping[str, Any]) -> PlayState:
    """What the agent has learned besides its models, from a checkpoint of either training loop or an exported agent.

    Raises:
        OSError: a file does not exist, or cannot be read.
    """
    if is_exported(folder):
        return PlayState.from_json((folder / PLAY_STATE).read_text(encoding="utf-8"))
    if TRAINING_STATE not in manifest["files"]:  # a run on a Ray cluster
        return PlayState()
    import torch

    state: Plain = torch.load(folder / TRAINING_STATE, map_location="cpu", weights_only=True, mmap=True)
    collector = state["collector"]
    weights = {name: collector["prior_weights"][name] for name in ("weights", "counts")}
    # The memories are in the order of the games; there are none if the prompts contain no memory.
    return PlayState(weights, dict(zip(manifest["games"], collector["memories"], strict=False)))
