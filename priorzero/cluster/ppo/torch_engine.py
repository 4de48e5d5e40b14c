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

from priorzero.cluster.actors.process import set_up_process
from priorzero.cluster.calls import kill, result_of
from priorzero.cluster.ppo.engine import Capabilities, PPOResult, SendParameters
from priorzero.cluster.ppo.learner import PPOLearner
from priorzero.cluster.ppo.trajectories import Trajectory
from priorzero.cluster.resources import Share
from priorzero.llm.models import load_language_model, save_parameters
from priorzero.llm.prompts import prompt_style
from priorzero.runs.checkpoint import read_state, save_checkpoint, save_tensors
from priorzero.runtime.process_group import ProcessGroup, TorchGroup
from priorzero.settings import Settings
from priorzero.types import ProcessError, UserError

STATE_FILE = "ppo.pt"


class LearnerProcess:
    """One PPO learner. All learners get the same calls at the same time, and wait for each other in them.

    Args:
        settings: all settings.
        rank: its index, from 0.
        size: number of learners.
    """

    def __init__(self, settings: Settings, rank: int, size: int) -> None:
        self._settings = settings
        self._rank, self._size = rank, size
        # The other processes of this machine wait for a PPO step anyway.
        self._device = set_up_process(settings, threads=max(1, len(os.sched_getaffinity(0)) // size))
        self._learner: PPOLearner | None = None

    @property
    def learner(self) -> PPOLearner:
        """The learner, after :meth:`join`."""
        assert self._learner is not None
        return self._learner

    def address(self) -> str:
        """A free address of this process, at which the learners can meet."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def join(self, address: str) -> int:
        """Connect to the other learners at the address of rank 0, and load the models.

        Returns:
            The version of the actor.
        """
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
        self._learner = PPOLearner(llm, settings, style=prompt_style(settings), group=group)
        return self._learner.version

    def step(self, trajectories: Sequence[Trajectory], step_id: int) -> PPOResult:
        """:meth:`PPOLearner.step`; the result is the same in all learners."""
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
        """:meth:`PPOEngine.load`."""
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

    The node of rank 0 must be able to write the folders that the methods get.

    Args:
        settings: all settings.
        share: the resources of each process.
        send_parameters: sends the actor to the prior servers.
    """

    capabilities = Capabilities(
        advantages_over_turns=True,
        valid_actions_only=True,
        drops_stale_samples=True,
        resumable=True,
        needs_gpu=False,
    )

    def __init__(self, settings: Settings, *, share: Share, send_parameters: SendParameters) -> None:
        self._settings = settings
        self._share = share
        self._send_parameters = send_parameters
        self._processes: list[Any] = []

    async def start(self) -> None:
        size = self._settings.cluster.num_learners
        actor = ray.remote(LearnerProcess).options(num_cpus=self._share.num_cpus, num_gpus=self._share.num_gpus)
        self._processes = [actor.remote(self._settings, rank, size) for rank in range(size)]
        limit = self._settings.cluster.start_timeout_s
        (address,) = await self._results([self._processes[0].address.remote()], start_timeout_s=limit)
        await self._results([p.join.remote(address) for p in self._processes], start_timeout_s=limit)

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
            kill(process)
        self._processes = []

    async def _results(self, references: Sequence[Any], *, start_timeout_s: float | None = None) -> list[Any]:
        """Wait for a call of all learners.

        Raises:
            ProcessError: a learner died or did not reply in time.
        """
        limit = start_timeout_s or self._settings.cluster.timeout_s
        setting = "cluster.start_timeout_s" if start_timeout_s else "cluster.timeout_s"
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
