"""Saving a run and going on with it: which parts make up its state, and what happens when they cannot be written."""

from __future__ import annotations

import asyncio
import fcntl
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from loguru import logger

from priorzero.buffer import PriorZeroGameBuffer
from priorzero.checkpoint import (
    Checkpoint,
    load_training,
    remove_old_checkpoints,
    save_checkpoint,
    saved_checkpoints,
)
from priorzero.collector import Collector
from priorzero.config import dump_settings
from priorzero.policy import PriorZeroPolicy
from priorzero.records import Plain, RecordTable, global_random_state, read_records, set_global_random_state
from priorzero.types import NotFinite, PriorEngine, StepRecord, UserError
from priorzero.vocabulary import ActionIndexer


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
    settings: Any
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
            await self.engine.forget()
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


def plain_batch(batch: Sequence[Any]) -> Plain:
    """The arrays of LightZero's current and target batch, in their order."""
    parts = {"current": batch[0], "target": batch[1]}
    return {name: [torch.as_tensor(np.asarray(array)) for array in part] for name, part in parts.items()}


class DroppedUpdates:
    """Keeps what was to be learned from where an update was not applied, and ends the run after too many in a row.

    Args:
        folder: the batches go there, in plain data, the first ``KEPT`` of a run.
        limit: updates in a row, of one model.
    """

    KEPT = 5

    def __init__(self, folder: Path, *, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._in_a_row: dict[str, int] = {}
        self.total = 0

    def state_dict(self) -> Plain:
        return {"total": self.total, "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state: Plain) -> None:
        self.total, self._in_a_row = state["total"], dict(state["in_a_row"])

    def applied(self, model: str) -> None:
        self._in_a_row[model] = 0

    def dropped(self, model: str, error: NotFinite, *, records: Sequence[StepRecord], arrays: Plain) -> None:
        """Take note of an update that was not applied.

        Args:
            model: ``"world model"`` or ``"LLM"``.
            error: names the culprit.
            records: the decisions it began from.
            arrays: what was computed with, if there is more.

        Raises:
            UserError: it was the last in a row that is allowed.
        """
        self.total += 1
        self._in_a_row[model] = self._in_a_row.get(model, 0) + 1
        try:
            kept = self._keep(error, records, arrays)
        except (OSError, RuntimeError) as problem:  # torch raises RuntimeError for a full disk
            kept = f"; what it was to learn from could not be kept ({problem})"
        logger.error(f"update left out: {error}{kept}")
        if self._in_a_row[model] >= self._limit:
            raise UserError(f"{self._limit} updates in a row were left out (train.max_not_finite): {error}") from error

    def _keep(self, error: NotFinite, records: Sequence[StepRecord], arrays: Plain) -> str:
        files = (self._folder / f"batch_{n}.pt" for n in range(1, self.KEPT + 1))
        file = next((file for file in files if not file.exists()), None)
        if file is None:
            return ""
        table = RecordTable()
        for record in records:
            table.number(record)
        self._folder.mkdir(exist_ok=True)
        torch.save({"error": str(error), "records": table.state_dict(), "arrays": arrays}, file)
        return f"; what it was to learn from is in {file}"


def cut_files(folder: Path, sizes: dict[str, int]) -> None:
    """Shorten what a run appends to, to what it held when its checkpoint was written; what came later is done again.

    Args:
        folder: the run's.
        sizes: bytes of each file; event files that are not among them were begun later.
    """
    for path in [folder / "episodes.jsonl", folder / "evaluations.jsonl", *folder.glob("events.out.tfevents.*")]:
        if not path.exists():
            continue
        size = sizes.get(path.name, 0)
        if size == 0:
            path.unlink()
        elif path.stat().st_size > size:
            with path.open("r+b") as file:
                file.truncate(size)


def claim(folder: Path) -> TextIO:
    """Keep other processes from writing into a run's folder, for as long as the file is open.

    A file system that knows no locks keeps nobody out; this is logged.

    Raises:
        UserError: another process has it, or the folder cannot be written to.
    """
    try:
        file = (folder / ".lock").open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error})") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(f"{folder}: another process is running this run; end that one first") from error
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error}): see to it that no other process goes on with this run")
    return file


def set_unsaved_aside(folder: Path) -> Path | None:
    """Rename the folder of a run that ended before it saved anything, so that its name is free; None if there is none.

    Raises:
        UserError: the run is under way.
    """
    if not folder.is_dir() or saved_checkpoints(folder):
        return None
    claim(folder).close()
    names = (folder.with_name(f"{folder.name}.unsaved{n}") for n in range(1, 1000))
    return folder.rename(next(name for name in names if not name.exists()))
