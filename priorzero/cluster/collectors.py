"""The handle of the collectors."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import ray
from loguru import logger

from priorzero.cluster.actors.collector import CollectorProcess, CollectorReport, ModelVersions
from priorzero.cluster.calls import kill, kill_if_hanging, result_of, wait_for_restart
from priorzero.cluster.resources import Share
from priorzero.play.evaluator import Evaluations
from priorzero.settings import Settings
from priorzero.types import GameWorkerError, ProcessError, UserError


@dataclass(frozen=True)
class CollectorResult:
    """The result of an iteration of a collector.

    Attributes:
        collector: index of the collector, which is idle now.
        segments: Ray's reference to the segments.
        report: see :class:`CollectorReport`.
    """

    collector: int
    segments: Any
    report: CollectorReport


class Collectors:
    """Starts the collectors. Each is idle or busy with one call. Ray restarts those that die.

    Args:
        settings: all settings.
        share: resources of each collector.
        servers: names of the prior servers.

    Attributes:
        versions: versions of the models, for the next calls.
        world_model: Ray's reference to the world model's parameters, for the next calls; None before its first turn.
        restarts: number of restarts, after a crash or because a collector did not reply in time.
        lost: number of collectors that were given up.
    """

    def __init__(self, settings: Settings, *, share: Share, servers: list[str]) -> None:
        self.versions = ModelVersions()
        self.world_model: Any = None
        self.restarts = 0
        self.lost = 0
        self._settings, self._cluster = settings, settings.cluster
        actor = ray.remote(CollectorProcess).options(
            num_cpus=share.num_cpus, num_gpus=share.num_gpus, max_restarts=self._cluster.max_restarts
        )
        self._actors = [actor.remote(settings, servers) for _ in range(self._cluster.num_collectors)]
        self._busy: dict[asyncio.Task[CollectorResult | None], int] = {}
        self._pids: dict[int, int] = {}

    async def feature_size(self) -> int:
        """Wait until all collectors have loaded everything; returns ``F``."""
        limit, setting = self._cluster.start_timeout_s, "cluster.start_timeout_s"
        sizes = await asyncio.gather(
            *(
                result_of(actor.feature_size.remote(), timeout_s=limit, process="a collector", setting=setting)
                for actor in self._actors
            )
        )
        size: int = sizes[0]
        return size

    def start_all(self) -> None:
        """Let all collectors play."""
        for index in range(len(self._actors)):
            self.start(index)

    def start(self, index: int, *, wait_until_ready: bool = False) -> None:
        """Let an idle collector play.

        Args:
            index: index of the collector.
            wait_until_ready: it may have died, so that Ray has to restart it first.
        """
        self._busy[asyncio.create_task(self._collect(index, wait_until_ready=wait_until_ready))] = index

    async def _collect(self, index: int, *, wait_until_ready: bool) -> CollectorResult | None:
        """The collector's result; None if it is lost."""
        actor, cluster, process = self._actors[index], self._cluster, f"collector {index}"
        if wait_until_ready and not await wait_for_restart(actor, timeout_s=cluster.start_timeout_s, process=process):
            return None
        segments, reference = actor.collect.remote(
            self._settings.train.collect_env_steps, self.versions, self.world_model
        )
        limit = cluster.start_timeout_s + cluster.timeout_s  # it may have to load everything, or wait for its server
        setting = "cluster.start_timeout_s + cluster.timeout_s"
        try:
            report = await result_of(reference, timeout_s=limit, process=process, setting=setting)
        except GameWorkerError as error:
            logger.error(f"{process}: {error}")
            return None
        return CollectorResult(index, segments, report)

    async def next_result(self) -> CollectorResult:
        """Wait for the first collector that finishes. Collectors that fail are restarted meanwhile.

        Raises:
            UserError: no collector is left.
        """
        while True:
            if not self._busy:
                raise UserError(
                    f"none of {len(self._actors)} collectors is left: each has died more than cluster.max_restarts="
                    f"{self._cluster.max_restarts} times, or could not be restarted in time"
                )
            done, _ = await asyncio.wait(self._busy, return_when=asyncio.FIRST_COMPLETED)
            task = done.pop()
            index = self._busy.pop(task)
            try:
                result = task.result()
            except ProcessError as error:
                self.restarts += 1
                self._pids.pop(index, None)
                kill_if_hanging(self._actors[index], error)
                logger.warning(f"{error}; Ray restarts collector {index}")
                self.start(index, wait_until_ready=True)
                continue
            if result is not None:
                self._count_restart(index, result.report.pid)
                return result
            self.lost += 1
            logger.error(f"collector {index} cannot be restarted; the run continues with the others")

    def _count_restart(self, index: int, pid: int) -> None:
        """Count a restart while the collector was idle: its process id has changed."""
        self.restarts += self._pids.setdefault(index, pid) != pid
        self._pids[index] = pid

    async def evaluate(self, index: int) -> Evaluations | None:
        """Let an idle collector evaluate; None if it fails, which is logged."""
        actor, settings = self._actors[index], self._settings
        reference = actor.evaluate.remote(self.versions, self.world_model)
        limit = self._cluster.timeout_s * len(settings.eval.modes) * settings.eval.episodes
        setting = "cluster.timeout_s for each episode and mode"
        try:
            results: Evaluations = await result_of(
                reference, timeout_s=limit, process=f"the evaluation on collector {index}", setting=setting
            )
        except ProcessError as error:
            kill_if_hanging(actor, error)
            logger.error(f"{error}; this evaluation is skipped")
            return None
        return results

    async def close(self) -> None:
        """Kill all collectors."""
        for task in self._busy:
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)
        for actor in self._actors:
            kill(actor)
