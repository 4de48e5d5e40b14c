"""Writing and reading what a run has learned."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from priorzero.config import dump_settings
from priorzero.policy import PriorZeroPolicy
from priorzero.types import UserError
from priorzero.vocabulary import ActionIndexer


def save_checkpoint(
    folder: Path, *, policy: PriorZeroPolicy, indexer: ActionIndexer, settings: Any, counters: dict[str, int]
) -> Path:
    """Write a checkpoint, aside first and then under its name, so that it is whole or not there.

    It holds ``world_model.pt`` (state dict), ``llm/`` (``save_pretrained``: the model, or its adapters; and the
    tokenizer), ``actions.json`` (the numbering of the actions), ``config.yaml`` and ``counters.json``.

    Args:
        folder: where it goes; must not exist.
        policy: gives both models.
        indexer: the numbering of the actions.
        settings: all settings.
        counters: iteration, env_step, train_iter, llm_version.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        torch.save(policy.world_model_state(), aside / "world_model.pt")
        if policy.llm_learner is not None:
            policy.llm_learner.llm.model.save_pretrained(aside / "llm")
            policy.llm_learner.llm.tokenizer.save_pretrained(aside / "llm")
        (aside / "actions.json").write_text(json.dumps(indexer.state_dict(), ensure_ascii=False), encoding="utf-8")
        (aside / "counters.json").write_text(json.dumps(counters), encoding="utf-8")
        (aside / "config.yaml").write_text(dump_settings(settings), encoding="utf-8")
        aside.chmod(0o755)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def load_world_model(folder: Path, *, policy: PriorZeroPolicy, indexer: ActionIndexer) -> None:
    """Read the world model and the numbering of the actions back. The LLM is loaded by ``llm.path=FOLDER/llm``.

    Raises:
        UserError: the folder is no checkpoint, or one of a world model of another shape.
    """
    try:
        state = torch.load(folder / "world_model.pt", map_location="cpu", weights_only=True)
        actions = json.loads((folder / "actions.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: is not a checkpoint ({error}); give a folder under RUN/checkpoints") from error
    try:
        policy.load_world_model_state(state)
    except RuntimeError as error:
        raise UserError(
            f"{folder}: holds a world model of another shape; use the config.yaml beside it ({error})"
        ) from error
    indexer.load_state_dict(actions)
