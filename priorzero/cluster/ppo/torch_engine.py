"""The default PPO engine: one or several learners, each a Ray actor, connected by PyTorch's DDP or FSDP2."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from priorzero.cluster.actors import set_up_process
from priorzero.cluster.calls import result_of
from priorzero.cluster.connection import Share
from priorzero.cluster.ppo.engine import PPOResult, SendParameters
from priorzero.cluster.ppo.learner import PPOLearner
from priorzero.cluster.ppo.trajectories import Trajectory
from priorzero.llm.model_files import warn_of_other_prompt
from priorzero.llm.models import load_language_model, save_parameters
from priorzero.llm.prompts import prompt_style
from priorzero.runs.checkpoint import read_state, save_checkpoint, save_tensors
from priorzero.runtime.process_group import ProcessGroup, TorchGroup
from priorzero.settings import Settings
from priorzero.types import ProcessError, UserError

STATE_FILE = "ppo.pt"


class LearnerProcess:
    """One of ``size`` PPO learners. All get the same calls at the same time, and wait for each other in them."""

    learner: PPOLearner  # after `join`

    def __init__(self, settings: Settings, rank: int, size: int) -> None:
        self._settings = settings
        self._rank, self._size = rank, size
        # The other processes of this machine wait for a PPO step anyway.
        self._device = set_up_process(settings, threads=max(1, len(os.sched_getaffinity(0)) // size))

    def address(self) -> str:
        """A free address of this process, at which the learners can meet."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def join(self, address: str) -> int:
        """Connect to the other learners at the address of rank 0, and load the models; returns the actor's version."""
        settings = self._settings
        group = ProcessGroup()
        if self._size > 1:
            group = TorchGroup(
                rank=self._rank,
                size=self._size,
                address=address,
                sharding=settings.ppo.sharding,
                device=self._device,
                timeout_s=settings.cluster.timeout_s,
            )
        torch.manual_seed(settings.run.seed)  # new adapters start with the same parameters in all learners
        llm = load_language_model(settings.llm, device=self._device)
        if self._rank == 0:
            warn_of_other_prompt(settings.llm)
        self.learner = PPOLearner(llm, settings, style=prompt_style(settings), group=group)
        return self.learner.version

    def step(self, trajectories: Sequence[Trajectory], step_id: int) -> PPOResult:
        """The result is the same in all learners."""
        return self.learner.step(trajectories, step_id=step_id)

    @ray.method(num_returns=2)
    def actor(self) -> tuple[dict[str, torch.Tensor] | None, int]:
        """The actor's parameters (None except for rank 0), and their version."""
        state = self.learner.actor_state()
        return (state if self._rank == 0 else None), self.learner.version

    def save(self, folder: Path) -> None:
        """:meth:`PPOEngine.save`; rank 0 writes."""
        state = self.learner.state_dict()
        if self._rank == 0:
            about = {"step_id": self.learner.step_id, "llm_version": self.learner.version}
            save_checkpoint(folder, write=lambda temporary: save_tensors(state, temporary / STATE_FILE), about=about)

    def load(self, folder: Path) -> None:
        self.learner.load_state_dict(read_state(folder, STATE_FILE))

    def export(self, folder: Path) -> None:
        """:meth:`PPOEngine.export`; rank 0 writes."""
        state = self.learner.actor_state()
        if self._rank == 0:
            llm = self.learner.llm
            save_parameters(llm.model, folder, state_dict=state)
            llm.tokenizer.save_pretrained(folder)


class TorchPPOEngine:
    """Implements :class:`~priorzero.cluster.ppo.engine.PPOEngine` with ``cluster.num_learners`` processes.

    The node of rank 0 must be able to write the folders that the methods get. ``share`` is that of each process.
    """

    resumable = True

    def __init__(self, settings: Settings, *, share: Share, send_parameters: SendParameters) -> None:
        self._settings = settings
        self._share = share
        self._send_parameters = send_parameters
        self._processes: list[Any] = []

    async def start(self) -> None:
        size = self._settings.cluster.num_learners
        actor = ray.remote(LearnerProcess).options(num_cpus=self._share.num_cpus, num_gpus=self._share.num_gpus)
        self._processes = [actor.remote(self._settings, rank, size) for rank in range(size)]
        (address,) = await self._results([self._processes[0].address.remote()], starting=True)
        await self._results([p.join.remote(address) for p in self._processes], starting=True)

    async def ppo_step(self, trajectories: Sequence[Trajectory], step_id: int) -> PPOResult:
        reference = ray.put(list(trajectories))
        results: list[PPOResult] = await self._results([p.step.remote(reference, step_id) for p in self._processes])
        return results[0]

    async def publish(self) -> int:
        replies = [p.actor.remote() for p in self._processes]
        version, *_ = await self._results([version for _, version in replies])
        await self._send_parameters(version, replies[0][0])
        return int(version)

    async def save(self, folder: Path) -> None:
        await self._results([p.save.remote(folder) for p in self._processes])

    async def load(self, folder: Path) -> None:
        await self._results([p.load.remote(folder) for p in self._processes])

    async def export(self, folder: Path) -> None:
        await self._results([p.export.remote(folder) for p in self._processes])

    async def kill(self) -> None:
        for process in self._processes:
            ray.kill(process)
        self._processes = []

    async def _results(self, references: Sequence[Any], *, starting: bool = False) -> list[Any]:
        """Wait for a call of all learners. Raises ProcessError if one died or did not reply in time."""
        setting = "cluster.start_timeout_s" if starting else "cluster.timeout_s"
        limit = self._settings.cluster.start_timeout_s if starting else self._settings.cluster.timeout_s
        results = await asyncio.gather(
            *(result_of(r, timeout_s=limit, process="a PPO learner", setting=setting) for r in references),
            return_exceptions=True,
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        for error in errors:
            if isinstance(error, (UserError, ProcessError)):
                raise error
        if errors and len(self._processes) > 1 and isinstance(errors[0], RuntimeError):
            # If a learner dies, the collective operations of the others fail, mostly before Ray reports the death.
            message = " ".join(str(errors[0]).split())[-200:]
            raise ProcessError(f"the PPO learners lost their connection ({message})") from errors[0]
        if errors:
            raise errors[0]
        return results
