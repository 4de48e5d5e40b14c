"""Handles of the registry, of the prior servers and of the world model's learner."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from loguru import logger
from ray.exceptions import RayError

from priorzero.cluster.actors.prior_server import PriorServer
from priorzero.cluster.actors.registry import REGISTRY, Registry
from priorzero.cluster.actors.world_model import WorldModelProcess
from priorzero.cluster.calls import kill_if_hanging, result_of, wait_for_restart, wait_for_start
from priorzero.cluster.connection import Share
from priorzero.settings import Settings
from priorzero.types import Plain, ProcessError, UserError

WORLD_MODEL = "the world model's learner"  # in messages


class RegistryHandle:
    """Starts the registry. The run ends if it fails, because nothing else knows its state."""

    def __init__(self, settings: Settings) -> None:
        self._timeout_s = settings.cluster.timeout_s
        self._actor = ray.remote(Registry).options(num_cpus=0, name=REGISTRY).remote(settings)

    async def publish(self, version: int, parameters: Any) -> None:
        """:meth:`Registry.publish`; ``parameters`` is Ray's reference to them."""
        await self._result_of(self._actor.publish.remote(version, [parameters]))

    async def actions(self) -> Plain:
        """State of the action vocabulary."""
        actions: Plain = await self._result_of(self._actor.actions.remote())
        return actions

    async def _result_of(self, reference: Any) -> Any:
        try:
            return await result_of(reference, timeout_s=self._timeout_s, process="the registry")
        except ProcessError as error:
            raise UserError(f"{error}; a run cannot continue without it") from error


class PriorServers:
    """Starts the prior servers. Ray restarts those that die; those that hang are killed, so that Ray restarts them.

    ``share`` is that of each server; vLLM's log files are in ``log_folder``.
    """

    def __init__(self, settings: Settings, *, share: Share, log_folder: Path) -> None:
        self.names = [f"server {n}" for n in range(settings.cluster.num_servers)]  # in Ray's namespace of the run
        self.restarts = 0  # that were noticed
        self._cluster = settings.cluster
        options = {
            "num_cpus": share.num_cpus,
            "num_gpus": share.num_gpus,
            "max_concurrency": 1000,
            "max_restarts": self._cluster.max_restarts,
        }
        self._actors = {
            name: ray.remote(PriorServer)
            .options(name=name, **options)
            .remote(settings, log_folder / f"vllm{n or ''}.log")
            for n, name in enumerate(self.names)
        }
        self._pids: dict[str, int] = {}

    async def start(self) -> None:
        """Wait until all servers are ready."""
        await asyncio.gather(
            *(
                wait_for_start(actor.ready.remote(), cluster=self._cluster, process=f"prior {name}")
                for name, actor in self._actors.items()
            )
        )

    async def load_parameters(self, version: int, parameters: Any) -> None:
        """Send the LLM's parameters, Ray's reference to them, to all servers, and wait until all serve them."""
        await self._call_all(lambda actor: actor.load_parameters.remote(version, [parameters]))

    async def statistics(self) -> dict[str, float]:
        """Means of the servers' metrics since the last call. Restarts are counted here."""
        replies = await self._call_all(lambda actor: actor.statistics.remote())
        for name, (pid, _) in replies.items():
            self.restarts += self._pids.setdefault(name, pid) != pid
            self._pids[name] = pid
        all_metrics = [metrics for _, metrics in replies.values()]
        return {name: float(np.mean([metrics[name] for metrics in all_metrics])) for name in all_metrics[0]}

    async def _call_all(self, call: Callable[[Any], Any]) -> dict[str, Any]:
        """The reply of each server, by name."""
        replies = await asyncio.gather(*(self._call(name, call) for name in self.names))
        return dict(zip(self.names, replies, strict=True))

    async def _call(self, name: str, call: Callable[[Any], Any]) -> Any:
        """Call a server; if it fails, wait for its restart and call it again."""
        cluster, actor, process = self._cluster, self._actors[name], f"prior {name}"
        while True:
            try:
                return await result_of(call(actor), timeout_s=cluster.timeout_s, process=process)
            except ProcessError as error:
                kill_if_hanging(actor, error)
                logger.warning(f"{error}; it is restarted")
                if not await wait_for_restart(actor, cluster=cluster, process=process):
                    raise UserError(
                        f"{error}, and it could not be restarted (cluster.max_restarts={cluster.max_restarts}, "
                        f"cluster.start_timeout_s={cluster.start_timeout_s:g})"
                    ) from error

    async def close(self) -> None:
        """Close the engines, and kill all servers."""
        for actor in self._actors.values():
            try:
                await result_of(actor.close.remote(), timeout_s=30.0, process="a prior server", setting="fixed")
            except (ProcessError, RayError, UserError) as error:
                logger.debug(f"a prior server could not close its engine: {error}")
            ray.kill(actor)


class WorldModelHandle:
    """Starts the world model's learner; a :class:`~priorzero.cluster.restart.Restartable`.

    ``folder`` is the run's. ``feature_size`` returns ``F``.
    """

    def __init__(
        self, settings: Settings, *, share: Share, folder: Path, feature_size: Callable[[], Awaitable[int]]
    ) -> None:
        self._settings, self._share, self._folder = settings, share, folder
        self._get_feature_size = feature_size
        self._feature_size: int | None = None
        self._actor: Any = None

    async def start(self) -> None:
        if self._feature_size is None:
            self._feature_size = await self._get_feature_size()
        actor = ray.remote(WorldModelProcess).options(num_cpus=self._share.num_cpus, num_gpus=self._share.num_gpus)
        self._actor = actor.remote(self._settings, self._feature_size, self._folder)
        await wait_for_start(self._actor.__ray_ready__.remote(), cluster=self._settings.cluster, process=WORLD_MODEL)

    async def push(self, segments: Any) -> dict[str, float]:
        """:meth:`WorldModelProcess.push`; ``segments`` is Ray's reference to them."""
        metrics: dict[str, float] = await self._result_of(self._actor.push.remote(segments))
        return metrics

    async def learn(self) -> tuple[dict[str, float], int]:
        result: tuple[dict[str, float], int] = await self._result_of(self._actor.learn.remote())
        return result

    async def parameters(self) -> tuple[Any, int]:
        """Ray's reference to the parameters, and their version."""
        parameters, version = self._actor.parameters.remote()
        return parameters, await self._result_of(version)

    async def save(self, folder: Path) -> None:
        await self._result_of(self._actor.save.remote(folder))

    async def load(self, folder: Path) -> None:
        await self._result_of(self._actor.load.remote(folder))

    async def kill(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)

    async def _result_of(self, reference: Any) -> Any:
        return await result_of(reference, timeout_s=self._settings.cluster.timeout_s, process=WORLD_MODEL)
