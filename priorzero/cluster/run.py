"""A run on a cluster: its processes, its state, and the operations that the loop is made of."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger
from ray.exceptions import RayError

from priorzero.cluster.actors.collector import CollectorReport
from priorzero.cluster.calls import NodeEndedError, result_of
from priorzero.cluster.collectors import CollectorResult, Collectors
from priorzero.cluster.connection import Share
from priorzero.cluster.handles import PriorServers, RegistryHandle, WorldModelHandle
from priorzero.cluster.ppo.engine import PPOEngine
from priorzero.cluster.ppo.orz_engine import OrzPPOEngine
from priorzero.cluster.ppo.torch_engine import TorchPPOEngine
from priorzero.cluster.ppo.trajectories import Trajectory
from priorzero.cluster.restart import RestartableLearner
from priorzero.play.collector import RECENT_EPISODES
from priorzero.play.evaluator import Evaluation
from priorzero.play.transcript import EvaluationTranscript
from priorzero.policy import add_total_loss
from priorzero.runs.checkpoint import write_world_model
from priorzero.runs.counters import Counters
from priorzero.runs.files import LLM_FOLDER
from priorzero.runs.logger import RunLogger
from priorzero.runs.nonfinite import NonFiniteUpdates
from priorzero.runs.report import report_at_end
from priorzero.runs.saver import Saver
from priorzero.runs.summary import RunSummary, format_table, summary_rows, summary_text, time_text
from priorzero.runtime.activity import activities, announced
from priorzero.runtime.concurrency import StopRequest, gather_or_cancel
from priorzero.runtime.timeline import TimeUsage
from priorzero.settings import Settings
from priorzero.types import NonFiniteError, ProcessError, UserError


@dataclass
class ClusterCounters(Counters):
    """How far a run on a cluster is."""

    wm_turns: int = 0  # turns of the world model
    ppo_steps: int = 0  # with those that did not change the LLM


class ClusterRun:
    """Everything that :mod:`priorzero.cluster.train` works with. The processes are created, but not waited for.

    ``games`` are their names, ``plan`` is the share of each process by role, and ``folder`` is the run's, which exists.
    """

    def __init__(self, settings: Settings, *, games: str, plan: dict[str, Share], folder: Path) -> None:
        self.settings, self.games, self.folder = settings, games, folder
        self.counters = ClusterCounters()
        self.stop = StopRequest()
        self.saver = Saver(folder, keep=settings.run.keep_checkpoints, resumable=False)
        self.nonfinite = NonFiniteUpdates(folder / "not_finite", limit=settings.train.max_nonfinite_updates)
        self.logger = RunLogger(folder, settings)
        self.registry = RegistryHandle(settings)
        self.servers = PriorServers(settings, share=plan["server"], log_folder=folder / "log")
        self.collectors = Collectors(settings, share=plan["collector"], servers=self.servers.names)
        self._world_model = WorldModelHandle(
            settings, share=plan["world_model"], folder=folder, feature_size=self.collectors.feature_size
        )
        self._engine = self._make_ppo_engine(plan["learner"])
        restartable = functools.partial(
            RestartableLearner, folder=folder / "learners", save_every=settings.cluster.save_every
        )
        limit = settings.cluster.max_restarts
        self.world_model = restartable(self._world_model, name="world model", max_restarts=limit)
        self.ppo = restartable(self._engine, name="PPO learner", max_restarts=limit if self._engine.resumable else 0)
        self._trajectories: list[Trajectory] = []
        self._metrics: dict[str, float] = {}  # of the iteration
        self._returns: deque[float] = deque(maxlen=RECENT_EPISODES)
        self._num_episodes = 0
        self._time_usage = TimeUsage(0.0, {}, 0.0, 0.0)
        self._evaluations: dict[str, Evaluation] = {}
        self._error: BaseException | None = None  # it ends the run
        self._start_up_s = 0.0

    def _make_ppo_engine(self, share: Share) -> PPOEngine:
        engines: dict[str, Any] = {"torch": TorchPPOEngine, "orz": OrzPPOEngine}
        engine: PPOEngine = engines[self.settings.ppo.engine](
            self.settings, share=share, send_parameters=self._send_parameters
        )
        return engine

    async def _send_parameters(self, version: int, parameters: Any) -> None:
        await self.registry.publish(version, parameters)  # first, for servers that are restarted meanwhile
        await self.servers.load_parameters(version, parameters)

    @property
    def is_finished(self) -> bool:
        return self.counters.is_finished(self.settings.run)

    async def start(self) -> None:
        """Wait until all processes are ready. They load at the same time."""
        started = time.monotonic()
        if not self._engine.resumable:
            logger.warning(f"ppo.engine={self.settings.ppo.engine} cannot be restarted: if it dies, the run ends")
        with announced("starting the processes, which load the models"):
            await gather_or_cancel(self._engine.start(), self.servers.start(), self._world_model.start())
        logger.info(f"all processes are ready after {time.monotonic() - started:.0f} s")
        self._start_up_s = activities.elapsed_s

    # ---- the steps of an iteration ----

    async def collect(self) -> CollectorResult | None:
        """Wait for the first collector that finishes; None if a stop is requested."""
        self.logger.progress.start(iteration=self.counters.iteration, env_step=self.counters.env_step)
        with announced("collecting"):
            return await self.stop.run_or_cancel(self.collectors.next_result())

    async def store(self, result: CollectorResult) -> None:
        """Put the collected segments into the replay buffer, and keep the trajectories for the next PPO step."""
        self._metrics = await self.world_model.apply(functools.partial(self._world_model.push, result.segments))
        self._trajectories += result.report.trajectories
        self.counters.iteration += 1
        self.counters.env_step += result.report.env_steps

    async def learn(self) -> None:
        """The turns that are due in this iteration, both models at the same time."""
        turns = []
        if self.counters.is_due(self.settings.train.update_every):
            turns.append(self._update_world_model())
        if self.counters.is_due(self.settings.llm.update_every):
            turns.append(self._update_llm())
        await gather_or_cancel(*turns)

    async def _update_world_model(self) -> None:
        started = time.perf_counter()
        with announced("learning: world model"):
            metrics, self.counters.train_iter = await self.world_model.step(self._world_model.learn)
        self.counters.wm_turns += 1
        parameters, version = await self.world_model.query(self._world_model.parameters)
        self._metrics["cluster/world_model_turn_s"] = time.perf_counter() - started
        self.collectors.world_model = parameters
        self.collectors.versions = dataclasses.replace(self.collectors.versions, world_model=version)
        add_total_loss(metrics)
        self.logger.writer.write(metrics, step=self.counters.train_iter, axis="train_iter")

    async def _update_llm(self) -> None:
        trajectories, self._trajectories = self._trajectories, []
        step_id = self.counters.ppo_steps + 1
        started = time.perf_counter()
        with announced("learning: LLM"):
            result = await self.ppo.step(lambda: self._engine.ppo_step(trajectories, step_id))
        self.counters.ppo_steps = step_id
        learned = time.perf_counter()
        if result.nonfinite:
            records = [record for trajectory in trajectories for record in trajectory.records]
            self.nonfinite.skipped("LLM", NonFiniteError(result.nonfinite), records=records, arrays={})
        else:
            self.nonfinite.applied("LLM")
        version = await self.ppo.query(self._engine.publish)
        self.counters.llm_version = version
        self.collectors.versions = dataclasses.replace(self.collectors.versions, llm=version)
        self._metrics["cluster/ppo_step_s"] = learned - started
        self._metrics["cluster/publish_s"] = time.perf_counter() - learned
        self.logger.writer.write(
            {**result.metrics, "ppo/steps": float(step_id)}, step=self.counters.iteration, axis="iteration"
        )

    async def log(self, report: CollectorReport) -> None:
        env_step = self.counters.env_step
        episodes = [dataclasses.replace(episode, env_step=env_step) for episode in report.episodes]
        recordings: list[EvaluationTranscript] = [{**r, "env_step": env_step} for r in report.recordings]
        self._returns.extend(episode.total_reward for episode in episodes)
        self._num_episodes += len(episodes)
        self._time_usage += report.time_usage
        scalars = {**report.metrics, "collector_iter/env_steps": float(env_step)}
        if self._returns:
            scalars["collector_iter/reward_mean"] = float(np.mean(self._returns))
        at_servers = await self.servers.statistics()
        self.logger.log_iteration(
            self.counters,
            scalars={**scalars, **self._metrics, **self._restart_counts()},
            prior=merge_prior_metrics(report.prior, at_servers),
            time_usage=report.time_usage,
            episodes=episodes,
            recordings=recordings,
        )

    def _restart_counts(self) -> dict[str, float]:
        return {
            "cluster/collector_restarts": float(self.collectors.restarts),
            "cluster/collectors_lost": float(self.collectors.lost),
            "cluster/server_restarts": float(self.servers.restarts),
            "cluster/world_model_restarts": float(self.world_model.restarts),
            "cluster/learner_restarts": float(self.ppo.restarts),
            "cluster/calls_replayed": float(self.world_model.replayed + self.ppo.replayed),
        }

    async def evaluate(self, collector: int) -> None:
        """Let an idle collector evaluate. If it fails, or if a stop is requested, the evaluation is skipped."""
        with announced("evaluating"):
            results = await self.stop.run_or_cancel(self.collectors.evaluate(collector))
        if results:
            self._evaluations = self.logger.log_evaluations(results, env_step=self.counters.env_step)

    async def save(self) -> None:
        """Write a checkpoint: both models and the action vocabulary. A run cannot be resumed from it."""
        name, about = f"iteration_{self.counters.iteration}", {"counters": self.counters.as_dict()}
        if self.saver.is_saved(name, about=about):
            return
        with announced("saving"):
            await self._write_checkpoint(name, about)

    async def _write_checkpoint(self, name: str, about: dict[str, Any]) -> None:
        reference, _ = await self.world_model.query(self._world_model.parameters)
        limit = self.settings.cluster.timeout_s
        parameters = await result_of(reference, timeout_s=limit, process="the world model's learner")
        actions = await self.registry.actions()
        exported = self.folder / "learners" / LLM_FOLDER
        shutil.rmtree(exported, ignore_errors=True)  # of a checkpoint that could not be written
        await self.ppo.query(lambda: self._engine.export(exported))

        def write(folder: Path) -> None:
            write_world_model(folder, parameters=parameters, actions=actions, settings=self.settings)
            exported.rename(folder / LLM_FOLDER)

        await self.saver.save(name, write=write, about=about)

    # ---- ending ----

    async def save_after(self, error: BaseException) -> None:
        """An error ends the run: save what can be saved of both models."""
        self._error = error
        if not self.counters.iteration:
            return
        if isinstance(error, NodeEndedError):
            logger.error(f"{error}; the parameters are lost with it, and the last checkpoint is {self.saver.last}")
            return
        logger.warning(f"an error ends the run: {' '.join(str(error).split())[:200]}")
        try:
            await self.save()
        except (UserError, ProcessError, RayError, OSError) as second_error:
            logger.error(f"what was learned could not be saved ({' '.join(str(second_error).split())[:200]})")
            return
        self.saver.log_last()

    async def close(self) -> None:
        """Kill all processes, close the files, and write the report."""
        if not isinstance(self._error, NodeEndedError):  # otherwise nobody would reply
            await self.collectors.close()
            await self.servers.close()
            await self._engine.kill()
        self.logger.close(failed=self._error is not None)
        report_at_end(self.folder, error=self._error)

    def summary(self) -> RunSummary:
        """Log and return the summary of the run. Raises UserError if the last checkpoint could not be written."""
        self.logger.progress.end()
        self.saver.check()
        rows = self._rows()
        stopped = self.stop.requested
        logger.debug("details:\n" + format_table(rows))
        logger.info(self._summary_text(stopped=stopped))
        return RunSummary(self.folder, rows, dict(self.logger.writer.last), self._evaluations, stopped)

    def _summary_text(self, *, stopped: bool) -> str:
        counters = self.counters
        return summary_text(
            counters,
            stopped=stopped,
            folder=self.folder,
            settings=self.settings,
            games=self.games,
            num_episodes=self._num_episodes,
            updates=f"world model {counters.train_iter}, LLM {counters.llm_version}",
            time=time_text(activities.seconds, start_up_s=self._start_up_s, total_s=activities.elapsed_s, spent_s=0.0),
            checkpoint=self.saver.last,
            resumable=False,
        )

    def _rows(self) -> dict[str, Any]:
        counters = self.counters
        restarts = [
            f"{name.removeprefix('cluster/').removesuffix('_restarts')} {count:g}"
            for name, count in self._restart_counts().items()
            if name.endswith("_restarts") and count
        ]
        return summary_rows(
            counters,
            settings=self.settings,
            games=self.games,
            num_episodes=self._num_episodes,
            recent_returns=self._returns,
            updates={
                "world-model updates": f"{counters.train_iter} in {counters.wm_turns} turns",
                "PPO steps": f"{counters.ppo_steps}, of which {counters.llm_version} changed the LLM",
                "restarts": ", ".join(restarts) or "none",
            },
            evaluations=self._evaluations,
            resources={
                "time of the collectors": self._time_usage.describe(),
                "wall time": f"{self.logger.seconds:.0f} s",
            },
            checkpoint=self.saver.last,
        )


def merge_prior_metrics(collector: dict[str, float], servers: dict[str, float]) -> dict[str, float]:
    """The servers' metrics of the prior, with the failures that the collector saw added to theirs."""
    merged = {**collector, **servers}
    for name in ("prior/fallbacks", "prior/retries", "prior/timeouts"):
        merged[name] = servers[name] + collector[name]
    return merged
