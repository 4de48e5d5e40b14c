"""Checkpoints without models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from priorzero.runs.checkpoint import save_checkpoint


def write_checkpoint(folder: Path, *, config: str = "run: {env_id: zork1.z5, seed: 3}", **about: Any) -> Path:
    """A checkpoint whose files have no meaningful contents except ``config.yaml``."""

    def write(temporary: Path) -> None:
        for name in ("training.pt", "world_model.pt", "actions.json"):
            (temporary / name).write_text("x" * 100)
        (temporary / "config.yaml").write_text(config)

    return save_checkpoint(folder, write=write, about=about)
