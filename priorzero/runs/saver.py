"""Saving a run and going on with it: which parts make up its state, and what happens when they cannot be written."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from priorzero.config import dump_settings
from priorzero.play.action_vocabulary import ActionIndexer
from priorzero.play.collector import Collector
from priorzero.policy import PriorZeroPolicy
from priorzero.runs.checkpoint import (
    Checkpoint,
    load_training,
    remove_old_checkpoints,
    save_checkpoint,
)
from priorzero.runtime.random_state import global_random_state, set_global_random_state
from priorzero.settings import Settings
from priorzero.types import Plain, PriorEngine
from priorzero.world_model.records import RecordTable, read_records
from priorzero.world_model.replay import PriorZeroGameBuffer


@dataclass
class Saver:
    """Writes checkpoints of a run, and reads one back.

    A checkpoint holds ``world_model.pt`` (state dict), ``llm/`` (``save_pretrained`` form: the model, or its adapters;
    and the tokenizer), ``actions.json`` (the numbering of the actions), ``config.yaml``, ``training.pt`` (all else that
    the run's next step depends on, as plain data) and ``manifest.json`` (counters, games, versions, checksums).

    Attributes:
        run_folder: the run's.
        settings: all settings.
        games: what is trained on.
        keep: the last checkpoints that are kept; 0 keeps all.
        engine: the LLM's; None without one.
        last: the last checkpoint that this process wrote or went on from, and the phase it is of.
        failure: why the last attempt to write one failed; "" if it did not.
    """

    run_folder: Path
    settings: Settings
    games: Sequence[Any]
    policy: PriorZeroPolicy
    buffer: PriorZeroGameBuffer
    collector: Collector
    indexer: ActionIndexer
    engine: PriorEngine | None
    last: Path | None = None
    last_phase: str = ""
    failure: str = ""

    async def save(self, counters: dict[str, int], *, phase: str, told: Plain) -> None:
        """Write a checkpoint and remove the oldest. If the disk is full, say so and go on: the last good one stays.

        Args:
            counters: iteration, env_step, train_iter, llm_version.
            phase: what comes next: ``"collect"`` or ``"evaluate"``.
            told: what was told so far, as plain data.
        """
        if self.engine is not None:  # a run that goes on from here starts without, and is to do the same
            await self.engine.clear_cache()
        begun = self.collector.collected.env_steps
        name = f"iteration_{counters['iteration']}" + (f"+{begun}" if begun else "")
        folder = self.run_folder / "checkpoints" / name
        if folder.exists() and (folder, phase) == (self.last, self.last_phase):  # nothing has happened since
            return
        counters = {**counters, "llm_version": self.policy.llm_version}
        about = {
            "counters": counters,
            "phase": phase,
            "begun_env_steps": begun,
            "games": {game.name: game.md5 for game in self.games},
        }
        started = time.perf_counter()
        try:
            self._check()
            # In a thread, so that a second signal is heard; this process does nothing else meanwhile.
            write = functools.partial(self._write, counters=counters, phase=phase, told=told)
            await asyncio.to_thread(save_checkpoint, folder, write=write, about=about)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            self.failure = f"{name} could not be written ({' '.join(str(error).split())[:200]})"
            logger.error(f"checkpoint {self.failure}; the last one stays: {self.last or 'none yet'}")
            return
        self.last, self.last_phase, self.failure = folder, phase, ""
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        logger.debug(f"checkpoint {name}: {size / 1e6:.0f} MB in {time.perf_counter() - started:.1f} s")
        remove_old_checkpoints(self.run_folder, keep=self.settings.run.keep_checkpoints)

    def _check(self) -> None:
        """Raises RuntimeError if what would be saved is not fit to go on from."""
        learner = self.policy.llm_learner
        if learner is not None and not learner.is_whole:
            raise RuntimeError("the LLM's optimiser ran out of memory in the middle of a step")
        models = {"world model": self.policy.trained_world_model_parameters()}
        if self.policy.llm_learner is not None:
            models["LLM"] = list(self.policy.llm_learner.llm.model.named_parameters())
        for model, own in models.items():
            for name, p in own:
                if not p.isfinite().all():
                    raise RuntimeError(f"a parameter of the {model} is not finite: {name}")

    def _write(self, folder: Path, *, counters: dict[str, int], phase: str, told: Plain) -> None:
        torch.save(self.policy.world_model_state(), folder / "world_model.pt")
        if self.policy.llm_learner is not None:
            self.policy.llm_learner.llm.save(folder / "llm")
        (folder / "actions.json").write_text(json.dumps(self.indexer.state_dict()), encoding="utf-8")
        (folder / "config.yaml").write_text(dump_settings(self.settings), encoding="utf-8")
        table = RecordTable()
        state = {
            "counters": dict(counters),
            "phase": phase,
            "policy": self.policy.training_state(),
            "buffer": self.buffer.state_dict(table),
            "collector": self.collector.state_dict(table),
            "random": global_random_state(),
            "told": told,
        }
        torch.save({**state, "records": table.state_dict()}, folder / "training.pt")

    async def restore(self, checkpoint: Checkpoint) -> Plain:
        """Bring models, replay, games and random numbers to where they were; return the rest of the state."""
        state = load_training(checkpoint, policy=self.policy, indexer=self.indexer)
        records = read_records(state.pop("records"))
        self.buffer.load_state_dict(state.pop("buffer"), records)
        await self.collector.load_state_dict(state.pop("collector"), records)
        set_global_random_state(state["random"])
        self.last, self.last_phase = checkpoint.folder, state["phase"]
        return state


