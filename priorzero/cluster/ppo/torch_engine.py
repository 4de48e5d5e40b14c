"""The default PPO engine: one or several learners, each a Ray actor, joined by PyTorch's DDP or FSDP2."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from priorzero.cluster.actors import save_tensors, settle
from priorzero.cluster.handles import answer, kill
from priorzero.cluster.ppo.engine import Capabilities
from priorzero.cluster.ppo.learner import PPOLearner
from priorzero.cluster.ppo.trajectories import Trajectory
from priorzero.cluster.resources import Share
from priorzero.llm.models import load_language_model, save_parameters
from priorzero.llm.prompts import prompt_style
from priorzero.runs.checkpoint import read_state, save_checkpoint
from priorzero.runtime.process_group import ProcessGroup, TorchGroup
from priorzero.settings import Settings
from priorzero.types import ProcessError, UserError

STATE = "ppo.pt"


class LearnerProcess:
    """One learner. All learners are told the same at the same time, and wait for one another inside.

    Args:
        settings: all settings.
        rank: its number, from 0.
        size: how many there are.
    """

    def __init__(self, settings: Settings, rank: int, size: int) -> None:
        self._settings = settings
        self._rank, self._size = rank, size
        # The others wait for a step anyway, if all are on one machine.
        self._device = settle(settings, threads=max(1, len(os.sched_getaffinity(0)) // size))
        self._learner: PPOLearner | None = None

    def address(self) -> str:
        """Where rank 0 can be met."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def join(self, address: str) -> int:
        """Meet the others and load the models; returns the version of the actor."""
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
        torch.manual_seed(settings.run.seed)  # the same new parameters everywhere (adapters)
        llm = load_language_model(settings.llm, device=self._device)
        self._learner = PPOLearner(llm, settings, style=prompt_style(settings), group=group)
        return self._learner.version

    @property
    def learner(self) -> PPOLearner:
        assert self._learner is not None
        return self._learner

    def step(self, trajectories: Sequence[Trajectory], step_id: int) -> dict[str, Any]:
        """:meth:`PPOLearner.step`; its scalars are the same in all learners."""
        return self.learner.step(trajectories, step_id=step_id)

    @ray.method(num_returns=2)
    def actor(self) -> tuple[dict[str, torch.Tensor] | None, int]:
        """The actor's parameters (of rank 0 alone), and their version."""
        state = self.learner.actor_state()
        return (state if self._rank == 0 else None), self.learner.version

    def save(self, folder: str) -> None:
        """Rank 0 writes."""
        state = self.learner.state_dict()
        if self._rank == 0:
            about = {"step_id": self.learner.step_id, "llm_version": self.learner.version}
            save_checkpoint(Path(folder), write=lambda aside: save_tensors(state, aside / STATE), about=about)

    def load(self, folder: str) -> int:
        self.learner.load_state_dict(read_state(Path(folder), STATE))
        return self.learner.version

    def export(self, folder: str) -> None:
        """Rank 0 writes the actor in ``save_pretrained`` form."""
        state = self.learner.actor_state()
        if self._rank == 0:
            llm = self.learner.llm
            save_parameters(llm.model, Path(folder), state_dict=state)
            llm.tokenizer.save_pretrained(folder)


class TorchPPOEngine:
    """Implements :class:`~priorzero.cluster.ppo.engine.PPOEngine` with ``cluster.num_learners`` processes.

    Its folders must be within reach of the node that rank 0 runs on.

    Args:
        settings: all settings.
        share: what each process asks Ray for.
        hand_on: given a version and Ray's reference to the parameters, makes all servers take them over.
    """

    capabilities = Capabilities(
        advantages_over_turns=True,
        valid_actions_only=True,
        drops_stale_samples=True,
        resumable=True,
        needs_gpu=False,
    )

    def __init__(self, settings: Settings, *, share: Share, hand_on: Callable[[int, Any], Awaitable[None]]) -> None:
        self._settings = settings
        self._share = share
        self._hand_on = hand_on
        self._processes: list[Any] = []

    async def _all(self, calls: Sequence[Any], *, timeout_s: float | None = None) -> list[Any]:
        limit = timeout_s or self._settings.cluster.timeout_s
        setting = "cluster.start_timeout_s" if timeout_s else "cluster.timeout_s"
        asked = (answer(c, timeout_s=limit, who="a PPO learner", setting=setting) for c in calls)
        told = await asyncio.gather(*asked, return_exceptions=True)
        failures = [t for t in told if isinstance(t, BaseException)]
        for failure in failures:
            if isinstance(failure, (UserError, ProcessError)):
                raise failure
        if failures and len(self._processes) > 1 and isinstance(failures[0], RuntimeError):
            # Where one dies, the others' exchange breaks off, mostly before the death is told.
            raise ProcessError(
                f"the PPO learners lost touch ({' '.join(str(failures[0]).split())[-200:]})"
            ) from failures[0]
        if failures:
            raise failures[0]
        return told

    async def start(self) -> None:
        size = self._settings.cluster.num_learners
        actor = ray.remote(LearnerProcess).options(num_cpus=self._share.num_cpus, num_gpus=self._share.num_gpus)
        self._processes = [actor.remote(self._settings, rank, size) for rank in range(size)]
        limit = self._settings.cluster.start_timeout_s
        (address,) = await self._all([self._processes[0].address.remote()], timeout_s=limit)
        await self._all([p.join.remote(address) for p in self._processes], timeout_s=limit)

    async def ppo_step(self, trajectories: Sequence[Trajectory], step_id: int) -> dict[str, Any]:
        shared = ray.put(list(trajectories))
        told = await self._all([p.step.remote(shared, step_id) for p in self._processes])
        stats: dict[str, Any] = told[0]
        return stats

    async def publish(self) -> int:
        answers = [p.actor.remote() for p in self._processes]
        version, *_ = await self._all([version for _, version in answers])
        await self._hand_on(version, answers[0][0])
        return int(version)

    async def save(self, folder: Path) -> None:
        await self._all([p.save.remote(str(folder)) for p in self._processes])

    async def load(self, folder: Path) -> None:
        await self._all([p.load.remote(str(folder)) for p in self._processes])

    async def export(self, folder: Path) -> None:
        await self._all([p.export.remote(str(folder)) for p in self._processes])

    async def kill(self) -> None:
        for process in self._processes:
            kill(process)
        self._processes = []
