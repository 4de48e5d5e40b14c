"""The state of a single-process run: what a checkpoint contains, and how a run is restored from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from priorzero.agent import Agent
from priorzero.play.action_vocabulary import ActionVocabulary
from priorzero.play.collector import Collector
from priorzero.policy import PriorZeroPolicy
from priorzero.runs.checkpoint import Checkpoint, save_tensors, write_world_model
from priorzero.runs.exported import read_world_model
from priorzero.runs.files import ACTIONS, LLM_FOLDER, TRAINING_STATE
from priorzero.runtime.random_state import global_random_state, set_global_random_state
from priorzero.settings import Settings
from priorzero.types import Plain, UserError
from priorzero.world_model.records import RecordTable, read_records
from priorzero.world_model.unizero import UniZeroLearner


@dataclass(frozen=True)
class RunState:
    """Writes and restores everything that the next step of a run depends on.

    A checkpoint holds ``world_model.pt`` (state dict), ``llm/`` (``save_pretrained`` form: the model or its adapters,
    and the tokenizer), ``actions.json`` (the action vocabulary), ``config.yaml`` and ``training.pt`` (all else).
    """

    settings: Settings
    agent: Agent
    collector: Collector

    def write(self, folder: Path, *, loop: Plain) -> None:
        """Write the files of a checkpoint; ``loop`` is the state of the training loop.

        Raises:
            OSError: a file cannot be written.
            RuntimeError: a parameter is not finite.
        """
        policy, agent, table = self.agent.policy, self.agent, RecordTable()
        _check_parameters(policy)
        write_world_model(
            folder,
            parameters=policy.world_model_state(),
            actions=agent.indexer.state_dict(),
            settings=self.settings,
        )
        if agent.llm is not None:
            agent.llm.save(folder / LLM_FOLDER)
        state = {
            "loop": loop,
            "policy": policy.training_state(),
            "buffer": agent.buffer.state_dict(table),
            "collector": self.collector.state_dict(table),
            "best_episodes": agent.best_episodes and agent.best_episodes.state_dict(table),
            "random": global_random_state(),
        }
        save_tensors({**state, "records": table.state_dict()}, folder / TRAINING_STATE)

    async def restore(self, checkpoint: Checkpoint) -> Plain:
        """Restore models, replay buffer, games and random numbers; returns the state of the training loop.

        Raises:
            UserError: the checkpoint belongs to models of another shape.
        """
        load_world_model_state(checkpoint.folder, policy=self.agent.policy, indexer=self.agent.indexer)
        state = torch.load(checkpoint.folder / TRAINING_STATE, map_location="cpu", weights_only=True)
        if self.agent.llm is not None:
            self.agent.llm.load(checkpoint.folder / LLM_FOLDER)
        self.agent.policy.load_training_state(state["policy"])
        records = read_records(state["records"])
        self.agent.buffer.load_state_dict(state["buffer"], records)
        await self.collector.load_state_dict(state["collector"], records)
        if self.agent.best_episodes is not None:
            self.agent.best_episodes.load_state_dict(state["best_episodes"], records)
        set_global_random_state(state["random"])
        loop: Plain = state["loop"]
        return loop


def load_world_model_state(folder: Path, *, policy: UniZeroLearner, indexer: ActionVocabulary) -> None:
    """Load the world model and the action vocabulary from a checkpoint of either loop, or an exported agent.

    The LLM is loaded with ``llm.path=FOLDER/llm``.

    Raises:
        UserError: the folder is not a checkpoint, or its world model has another shape.
    """
    try:
        state = read_world_model(folder)
        actions = json.loads((folder / ACTIONS).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: is not a checkpoint ({error}); give a folder under RUN/checkpoints") from error
    try:
        policy.load_world_model_state(state)
    except RuntimeError as error:
        raise UserError(
            f"{folder}: its world model does not fit these settings; use the config.yaml in this folder ({error})"
        ) from error
    indexer.load_state_dict(actions)


def _check_parameters(policy: PriorZeroPolicy) -> None:
    """Raises RuntimeError if a run could not be resumed from these parameters."""
    models = {"world model": policy.trained_world_model_parameters()}
    if not policy.is_consistent:
        raise RuntimeError("the world model's optimiser ran out of memory in the middle of a step")
    if policy.llm_learner is not None:
        if not policy.llm_learner.is_consistent:
            raise RuntimeError("the LLM's optimiser ran out of memory in the middle of a step")
        models["LLM"] = list(policy.llm_learner.llm.model.named_parameters())
    for model, parameters in models.items():
        for name, p in parameters:
            if not p.isfinite().all():
                raise RuntimeError(f"a parameter of the {model} is not finite: {name}")
