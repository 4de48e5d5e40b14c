"""Training on a Ray cluster, to be read from top to bottom: UniZero as in :mod:`priorzero.train`, the LLM by PPO.

Collectors play all the time, each with the parameters that were the latest when it was last asked. An iteration is what
one collector brings: it is stored, then the learners have their turns, the world model's every ``train.update_every``
iterations and the LLM's every ``llm.update_every``.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import errno
import functools
import json
import logging
import os
import re
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from loguru import logger
from ray.exceptions import RayError, RayTaskError

from priorzero.agent import check_games
from priorzero.cluster.actors import CollectorProcess, PriorServer, Registry, WorldModelProcess, save_tensors
from priorzero.cluster.handles import Durable, answer, comes_back, kill
from priorzero.cluster.ppo.engine import PPOEngine
from priorzero.cluster.ppo.orz_engine import OrzPPOEngine, why_not_orz
from priorzero.cluster.ppo.torch_engine import TorchPPOEngine
from priorzero.cluster.resources import Share, plan_resources
from priorzero.config import differences, dump_settings
from priorzero.envs import resolve_games
from priorzero.play.evaluator import Evaluation
from priorzero.runs.checkpoint import remove_old_checkpoints, save_checkpoint
from priorzero.runs.folder import begin_files, new_run_folder
from priorzero.runs.logger import Teller
from priorzero.runs.metrics import peak_memory_mb, table
from priorzero.runs.nonfinite import DroppedUpdates
from priorzero.runtime.concurrency import StopRequest, gather_or_cancel
from priorzero.runtime.timeline import TimeUsage
from priorzero.settings import Settings
from priorzero.train import RunSummary
from priorzero.types import EngineError, GameWorkerError, NonFiniteError, ProcessError, UserError

# Settings of the single process that nothing here looks at.
IGNORED = {
    "run": ("trace_iterations",),
    "train": ("overlap",),
    "vllm": ("sync_every", "max_staleness"),
    "llm": (
        *("updates_per_turn", "enable_sft", "enable_rft", "rft_clip", "rft_baseline"),
        *("llm_loss_weight", "rft_loss_weight"),
    ),
}
REGISTRY = "registry"  # its name, in the namespace of the run


def run_on_cluster(settings: Settings) -> RunSummary:
    """Train as ``settings`` say, on ``cluster.address`` or on a Ray that is started here and ends with the run.

    Raises:
        UserError: something a person can put right; before anything was written where possible.
    """
    settings = copy.deepcopy(settings)
    games, unseen = resolve_games(settings.run.env_id), resolve_games(settings.eval.unseen)
    check_games(settings, games=games, unseen=unseen)
    check_settings(settings)
    folder = new_run_folder(settings, games).absolute()  # other processes may be elsewhere
    settings.run.output_dir = str(folder.parent)
    connect(settings, namespace=f"priorzero-{folder.name}-{os.getpid()}")
    try:
        return asyncio.run(_train(settings, folder=folder, names=", ".join(game.name for game in games)))
    except (GameWorkerError, EngineError, ProcessError, RayError) as error:
        said = " ".join(str(error.cause if isinstance(error, RayTaskError) else error).split())[-500:]
        raise UserError(f"{said}; the run's files are in {folder}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        raise UserError(f"{folder}: cannot be written to any more ({error})") from error
    finally:
        ray.shutdown()


def check_settings(settings: Settings) -> None:
    """Raises UserError if PPO cannot learn with these settings, or its engine is not there."""
    if not settings.prior.enabled:
        raise UserError("prior.enabled=False leaves PPO nothing to learn; priorzero.entry trains UniZero alone")
    if settings.prior.mode != "score" or settings.llm.objective == "tokens":
        raise UserError(
            "PPO's policy is the prior over the valid commands: it needs prior.mode=score and llm.objective=actions"
        )
    if settings.ppo.sharding == "fsdp" and settings.llm.use_lora:
        raise UserError("ppo.sharding=fsdp does not go with llm.use_lora=true; type --set ppo.sharding=ddp")
    if settings.run.max_env_step == 0:
        raise UserError("run.max_env_step=0 trains nothing; python -m priorzero.entry evaluates")
    if settings.ppo.engine == "orz":
        why = why_not_orz(settings)
        if why:
            raise UserError(why)
    changed = differences(settings)
    ignored = [f"{group}.{key}" for group, keys in IGNORED.items() for key in keys if key in changed.get(group, {})]
    if ignored:
        raise UserError(f"{', '.join(ignored)}: no meaning on a cluster, where the LLM learns by PPO; leave it out")


def connect(settings: Settings, *, namespace: str) -> None:
    """Join the cluster, or start one in this machine.

    Args:
        settings: all settings.
        namespace: in which the run's processes find one another.

    Raises:
        UserError: there is none at ``cluster.address``.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no report home
    address = settings.cluster.address
    named = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if named:  # Ray itself tries for minutes
        try:
            socket.create_connection((named[1], int(named[2])), timeout=10.0).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"cluster.address={address}: nobody answers there ({error}); ray status tells") from error
    try:
        if address:
            ray.init(address=address, namespace=namespace, logging_level=logging.ERROR)
        else:
            ray.init(address="local", namespace=namespace, include_dashboard=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"cluster.address={address}" if address else "Ray could not be started here"
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error


@dataclass
class _Collectors:
    """The collectors, each busy with one call, and the parameters that they are given next.

    Attributes:
        restarts: collectors that died, or did not answer in time, and were started again by Ray.
        lost: collectors that were given up.
    """

    settings: Settings
    actors: list[Any]
    versions: dict[str, int]
    world_model: Any = None
    restarts: int = 0
    lost: int = 0
    _busy: dict[asyncio.Task[Any], int] = field(default_factory=dict)
    _pids: dict[int, int] = field(default_factory=dict)

    def ask(self, index: int, *, again: bool = False) -> None:
        """Have a collector play; ``again``: as soon as Ray has started it again."""
        self._busy[asyncio.create_task(self._outcome(index, again=again))] = index

    async def _outcome(self, index: int, *, again: bool) -> tuple[int, Any, dict[str, Any]] | None:
        actor, cluster, who = self.actors[index], self.settings.cluster, f"collector {index}"
        if again and not await comes_back(actor, timeout_s=cluster.start_timeout_s, who=who):
            return None
        steps = self.settings.train.collect_env_steps
        segments, told = actor.collect.remote(steps, self.versions, self.world_model)
        limit = cluster.start_timeout_s + cluster.timeout_s  # it may wait for its server, or have to load first
        try:
            return (
                index,
                segments,
                await answer(told, timeout_s=limit, who=who, setting="cluster.start_timeout_s + cluster.timeout_s"),
            )
        except GameWorkerError as error:
            logger.error(f"{who}: {error}")
            return None

    async def next(self) -> tuple[int, Any, dict[str, Any]]:
        """What the first that is ready brings: its index, Ray's reference to the segments, and what is told of them.

        Raises:
            UserError: no collector is left.
        """
        while True:
            if not self._busy:
                raise UserError(
                    f"none of {len(self.actors)} collectors is left: each has died more than cluster.max_restarts="
                    f"{self.settings.cluster.max_restarts} times, or did not come back in time"
                )
            done, _ = await asyncio.wait(self._busy, return_when=asyncio.FIRST_COMPLETED)
            task = done.pop()
            index = self._busy.pop(task)
            try:
                outcome: tuple[int, Any, dict[str, Any]] | None = task.result()
            except ProcessError as error:
                self.restarts += 1
                self._pids.pop(index, None)
                if isinstance(error.__cause__, TimeoutError):
                    ray.kill(self.actors[index], no_restart=False)
                logger.warning(f"{error}; it begins again")
                self.ask(index, again=True)
            else:
                if outcome is not None:
                    pid = outcome[2]["pid"]
                    self.restarts += self._pids.setdefault(index, pid) != pid  # it died while nobody waited for it
                    self._pids[index] = pid
                    return outcome
                self.lost += 1
                logger.error(f"collector {index} does not come back; the others go on")

    async def close(self) -> None:
        for task in self._busy:
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)
        for actor in self.actors:
            kill(actor)


class _WorldModel:
    """The world model's learner process, as :class:`~priorzero.cluster.handles.Durable` has it."""

    def __init__(self, settings: Settings, *, share: Share, feature_size: int, folder: Path) -> None:
        self._settings, self._share, self._feature_size, self._folder = settings, share, feature_size, folder
        self._process: Any = None

    async def _answer(self, reference: Any) -> Any:
        timeout_s = self._settings.cluster.timeout_s
        return await answer(reference, timeout_s=timeout_s, who="the world model's learner")

    async def start(self) -> None:
        actor = ray.remote(WorldModelProcess).options(num_cpus=self._share.num_cpus, num_gpus=self._share.num_gpus)
        self._process = actor.remote(self._settings, self._feature_size, str(self._folder))
        who, limit = "the world model's learner", self._settings.cluster.start_timeout_s
        up = self._process.__ray_ready__.remote()
        await answer(up, timeout_s=limit, who=who, setting="cluster.start_timeout_s")

    async def push(self, segments: Any) -> dict[str, float]:
        stored: dict[str, float] = await self._answer(self._process.push.remote(segments))
        return stored

    async def learn(self) -> tuple[dict[str, float], int]:
        learned: tuple[dict[str, float], int] = await self._answer(self._process.learn.remote())
        return learned

    async def parameters(self) -> tuple[Any, int]:
        """Ray's reference to them, and their version."""
        parameters, version = self._process.parameters.remote()
        return parameters, await self._answer(version)

    async def save(self, folder: Path) -> None:
        await self._answer(self._process.save.remote(str(folder)))

    async def load(self, folder: Path) -> None:
        await self._answer(self._process.load.remote(str(folder)))

    async def kill(self) -> None:
        if self._process is not None:
            kill(self._process)


class _Servers:
    """The prior servers. Ray starts again what dies; who hangs is killed for that.

    Attributes:
        restarts: servers that were found to be another process than before.
    """

    def __init__(self, settings: Settings, registry: Any, *, share: Share, folder: Path) -> None:
        self.restarts = 0
        self._settings, self._registry = settings, registry
        self.names = [f"server {n}" for n in range(settings.cluster.num_servers)]
        self.actors: list[Any] = [
            ray.remote(PriorServer)
            .options(
                name=name,
                num_cpus=share.num_cpus,
                num_gpus=share.num_gpus,
                max_concurrency=1000,
                max_restarts=settings.cluster.max_restarts,
            )
            .remote(settings, REGISTRY, str(folder / "log" / f"vllm{n or ''}.log"))
            for n, name in enumerate(self.names)
        ]
        self._pids: dict[int, int] = {}

    async def ready(self) -> None:
        limit = self._settings.cluster.start_timeout_s
        await asyncio.gather(
            *(
                answer(s.ready.remote(), timeout_s=limit, who=f"prior {n}")
                for n, s in zip(self.names, self.actors, strict=True)
            )
        )

    async def hand_on(self, version: int, parameters: Any) -> None:
        """Publish parameters, and wait until all servers have taken them over (or have started again with them)."""
        registry = self._registry.publish.remote(version, [parameters])
        try:
            await answer(registry, timeout_s=self._settings.cluster.timeout_s, who="the registry")
        except ProcessError as error:
            raise UserError(f"{error}; a run cannot go on without it") from error
        await self._each(lambda server: server.take_over.remote(version, [parameters]))

    async def statistics(self) -> dict[str, float]:
        """Means over the servers; those whose process is a new one are counted."""
        told = await self._each(lambda server: server.statistics.remote())
        for n, (pid, _) in enumerate(told):
            self.restarts += self._pids.setdefault(n, pid) != pid
            self._pids[n] = pid
        return {name: float(np.mean([scalars[name] for _, scalars in told])) for name in told[0][1]}

    async def _each(self, call: Any) -> list[Any]:
        """The answer of each; from those that have died once they are back.

        Raises:
            UserError: one does not come back.
        """
        cluster = self._settings.cluster

        async def ask(name: str, server: Any) -> Any:
            while True:
                try:
                    return await answer(call(server), timeout_s=cluster.timeout_s, who=f"prior {name}")
                except ProcessError as error:
                    if isinstance(error.__cause__, TimeoutError):
                        ray.kill(server, no_restart=False)
                    logger.warning(f"{error}; it begins again")
                    if not await comes_back(server, timeout_s=cluster.start_timeout_s, who=f"prior {name}"):
                        raise UserError(
                            f"{error}, and does not come back (cluster.max_restarts={cluster.max_restarts}, "
                            f"cluster.start_timeout_s={cluster.start_timeout_s:g})"
                        ) from error

        return list(await asyncio.gather(*(ask(n, s) for n, s in zip(self.names, self.actors, strict=True))))

    async def close(self) -> None:
        for server in self.actors:
            try:
                await answer(server.close.remote(), timeout_s=30.0, who="a prior server", setting="fixed")
            except (ProcessError, RayError, UserError) as error:
                logger.debug(f"{error} while it was asked to end")
            kill(server)


def make_ppo_engine(settings: Settings, *, share: Share, servers: _Servers) -> PPOEngine:
    """The engine that ``ppo.engine`` names; it has yet to be started."""
    engines: dict[str, Any] = {"torch": TorchPPOEngine, "orz": OrzPPOEngine}
    engine: PPOEngine = engines[settings.ppo.engine](settings, share=share, hand_on=servers.hand_on)
    return engine


class ClusterTeller(Teller):
    """Tells what the loop of this module does."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        super().__init__(folder, settings)
        self._returns: deque[float] = deque(maxlen=20)
        self._num_episodes = 0
        self._total = TimeUsage(0.0, {}, 0.0, 0.0)

    def tell(
        self,
        told: dict[str, Any],
        scalars: dict[str, float],
        *,
        at_servers: dict[str, float],
        counters: dict[str, int],
    ) -> None:
        """What an iteration brought.

        Args:
            told: by the collector, see :meth:`CollectorProcess.collect`.
            scalars: of everybody else.
            at_servers: the prior servers' own.
            counters: of the run.
        """
        iteration, env_step = counters["iteration"], counters["env_step"]
        ended = [dataclasses.replace(episode, env_step=env_step) for episode in told["episodes"]]
        self._returns.extend(episode.total_reward for episode in ended)
        self._num_episodes += len(ended)
        self._total += told["shares"]
        self.tell_episodes(ended)
        asked = {**told["prior"], **at_servers}
        for name in ("prior/fallbacks", "prior/retries", "prior/timeouts"):  # on either side
            asked[name] += told["prior"][name]
        self.tell_prior(asked, iteration=iteration)
        own = {**told["scalars"], "collector_iter/env_steps": float(env_step), "memory/peak_mb": peak_memory_mb()}
        if self._returns:
            own["collector_iter/reward_mean"] = float(np.mean(self._returns))
        self.writer.write({**own, **scalars, **told["shares"].scalars()}, step=iteration)
        self.show(counters)

    def rows(self, counters: dict[str, int]) -> dict[str, Any]:
        """For the summary."""
        restarts = [
            f"{name.removeprefix('cluster/').removesuffix('_restarts')} {value:g}"
            for name, value in self.writer.last.items()
            if name.endswith("_restarts") and value
        ]
        mean = f"{np.mean(self._returns):.2f} over the last {len(self._returns)} episodes" if self._returns else "-"
        return {
            "iterations": counters["iteration"],
            "environment steps": counters["env_step"],
            "episodes finished": self._num_episodes,
            "mean return": mean,
            "world-model updates": f"{counters['train_iter']} in {counters['wm_turns']} turns",
            "PPO steps": f"{counters['ppo_steps']}, of which {counters['llm_version']} changed the LLM",
            "restarts": ", ".join(restarts) or "none",
            "time of the collectors": self._total.describe(),
            "wall time": f"{self.seconds:.0f} s",
        }


async def _train(settings: Settings, *, folder: Path, names: str) -> RunSummary:
    run, cluster = settings.run, settings.cluster
    resources = ray.cluster_resources()
    plan = plan_resources(settings, cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0))
    lock = begin_files(settings, folder, again=False)
    logger.info(f"{names}, seed {run.seed}, on a Ray cluster; everything about this run is in {folder}")
    changed = [f"{group}.{key}={value}" for group, own in differences(settings).items() for key, value in own.items()]
    logger.info(f"settings that differ from the defaults: {', '.join(changed) or 'none'}")
    logger.info("; ".join(f"{role}: {share.num_cpus:g} CPU, {share.num_gpus:g} GPU" for role, share in plan.items()))

    # ---- start: all processes load at the same time ----
    started = time.monotonic()
    registry = ray.remote(Registry).options(num_cpus=0, name=REGISTRY).remote(settings)
    servers = _Servers(settings, registry, share=plan["server"], folder=folder)
    share = plan["collector"]
    actor = ray.remote(CollectorProcess).options(
        num_cpus=share.num_cpus, num_gpus=share.num_gpus, max_restarts=cluster.max_restarts
    )
    collectors = _Collectors(
        settings,
        [actor.remote(settings, REGISTRY, servers.names) for _ in range(cluster.num_collectors)],
        versions={"world model": 0, "LLM": 0},
    )
    engine = make_ppo_engine(settings, share=plan["learner"], servers=servers)
    teller, stop = ClusterTeller(folder, settings), StopRequest()
    dropped = DroppedUpdates(folder / "not_finite", limit=settings.train.max_nonfinite_updates)
    counters = {"iteration": 0, "env_step": 0, "train_iter": 0, "llm_version": 0, "wm_turns": 0, "ppo_steps": 0}
    evaluations: dict[str, Evaluation] = {}
    checkpoint: Path | None = None
    trajectories: list[Any] = []
    spent: dict[str, float] = {}  # seconds of the turns of this iteration

    def finished() -> bool:
        return counters["iteration"] >= run.max_iter or counters["env_step"] >= run.max_env_step

    async def save() -> Path:
        parameters, _ = await world_model.ask(world_model_part.parameters)
        return await _save(settings, folder, counters, parameters=parameters, ppo=ppo, engine=engine, registry=registry)

    async def world_model_turn() -> None:
        began = time.perf_counter()
        metrics, counters["train_iter"] = await world_model.step(world_model_part.learn)
        counters["wm_turns"] += 1
        parameters, version = await world_model.ask(world_model_part.parameters)
        spent["cluster/world_model_turn_s"] = time.perf_counter() - began
        collectors.world_model, collectors.versions["world model"] = parameters, version
        if "train/wm_total_loss" in metrics:
            metrics["train/total_loss"] = metrics["train/wm_total_loss"]
        teller.writer.write(metrics, step=counters["train_iter"])

    async def llm_turn() -> None:
        learned_from = trajectories.copy()
        trajectories.clear()
        step_id = counters["ppo_steps"] + 1
        began = time.perf_counter()
        stats = dict(await ppo.step(lambda: engine.ppo_step(learned_from, step_id)))
        counters["ppo_steps"] = step_id
        learned = time.perf_counter()
        left_out = stats.pop("left_out")
        if left_out:
            records = [record for trajectory in learned_from for record in trajectory.records]
            dropped.dropped("LLM", NonFiniteError(left_out), records=records, arrays={})
        else:
            dropped.applied("LLM")
        counters["llm_version"] = collectors.versions["LLM"] = await ppo.ask(engine.publish)
        spent["cluster/ppo_step_s"] = learned - began
        spent["cluster/publish_s"] = time.perf_counter() - learned
        teller.writer.write({**stats, "ppo/steps": float(step_id)}, step=counters["iteration"])

    try:
        sizes = asyncio.gather(
            *(
                answer(c.feature_size.remote(), timeout_s=cluster.start_timeout_s, who="a collector")
                for c in collectors.actors
            )
        )
        _, _, (feature_size, *_) = await asyncio.gather(engine.start(), servers.ready(), sizes)
        world_model_part = _WorldModel(settings, share=plan["world_model"], feature_size=feature_size, folder=folder)
        await world_model_part.start()
        states, limits = folder / "learners", {"save_every": cluster.save_every, "max_restarts": cluster.max_restarts}
        world_model = Durable(world_model_part, name="world_model", folder=states, **limits)
        if not engine.capabilities.resumable:
            limits["max_restarts"] = 0
            logger.warning(f"ppo.engine={settings.ppo.engine} cannot be started again: if it dies, the run ends")
        ppo = Durable(engine, name="ppo", folder=states, **limits)
        logger.info(f"all parts are up after {time.monotonic() - started:.0f} s")
        for index in range(cluster.num_collectors):
            collectors.ask(index)

        with stop.handle_signals():
            while not finished():
                # ---- store what the first collector brings ----
                arrived = await stop.run_or_cancel(collectors.next())
                if arrived is None:
                    break
                index, segments, told = arrived
                stored = await world_model.call(functools.partial(world_model_part.push, segments))
                trajectories += told["trajectories"]
                counters["iteration"] += 1
                counters["env_step"] += told["env_steps"]

                # ---- learn: each model when it is its turn, both at the same time ----
                turns = []
                spent.clear()
                if counters["iteration"] % settings.train.update_every == 0:
                    turns.append(world_model_turn())
                if counters["iteration"] % settings.llm.update_every == 0:
                    turns.append(llm_turn())
                await gather_or_cancel(*turns)

                # ---- tell, evaluate, and have the collector play on with the latest parameters ----
                restarts = {
                    "cluster/collector_restarts": float(collectors.restarts),
                    "cluster/collectors_lost": float(collectors.lost),
                    "cluster/server_restarts": float(servers.restarts),
                    "cluster/world_model_restarts": float(world_model.restarts),
                    "cluster/learner_restarts": float(ppo.restarts),
                    "cluster/calls_replayed": float(world_model.replayed + ppo.replayed),
                }
                at_servers = await servers.statistics()
                teller.tell(told, {**stored, **restarts, **spent}, at_servers=at_servers, counters=counters)
                if finished() or counters["iteration"] % settings.eval.every == 0:
                    evaluation = _evaluate(collectors, index, teller, env_step=counters["env_step"])
                    evaluations = await stop.run_or_cancel(evaluation) or evaluations
                if run.checkpoint_every and counters["iteration"] % run.checkpoint_every == 0:
                    checkpoint = await save()
                if not finished():
                    collectors.ask(index, again=True)
        teller.progress.end()
        checkpoint = await save()
    except (UserError, ProcessError, EngineError, GameWorkerError, RayError, asyncio.CancelledError) as error:
        if counters["iteration"]:
            await _save_what_is_left(save, error)
        raise
    finally:
        await collectors.close()
        await servers.close()
        await engine.kill()
        teller.writer.close()
        if lock is not None:
            lock.close()
    rows = {"game": names, **teller.rows(counters), "checkpoint": checkpoint}
    rows |= {
        f"evaluation, {mode}": f"mean score {e.mean_score:.2f} of {e.max_score:g}" for mode, e in evaluations.items()
    }
    rows["charts"] = f"tensorboard --logdir {run.output_dir}"
    logger.info(f"{'stopped' if stop.requested else 'done'}:\n" + table(rows))
    return RunSummary(folder, rows, dict(teller.writer.last), evaluations, stop.requested)


async def _evaluate(collectors: _Collectors, index: int, teller: Teller, *, env_step: int) -> dict[str, Evaluation]:
    """Have an idle collector evaluate; a collector that fails is left to begin again, and this is said."""
    evaluate = collectors.actors[index].evaluate.remote(collectors.versions, collectors.world_model)
    settings = collectors.settings
    try:
        limit = settings.cluster.timeout_s * len(settings.eval.modes) * settings.eval.episodes
        who = f"collector {index}, which evaluates,"
        played = await answer(evaluate, timeout_s=limit, who=who, setting="cluster.timeout_s for each episode and mode")
    except ProcessError as error:
        if isinstance(error.__cause__, TimeoutError):
            ray.kill(collectors.actors[index], no_restart=False)
        logger.error(f"{error}; the evaluation at {env_step} env steps is left out")
        return {}
    return teller.tell_evaluations(played, env_step=env_step)


async def _save_what_is_left(save: Any, error: BaseException) -> None:
    """Before a run ends for another reason: what can be had of both models."""
    try:
        logger.warning(f"the run ends ({' '.join(str(error).split())[:200]}); what was learned is in {await save()}")
    except (UserError, ProcessError, RayError, OSError) as again:
        logger.error(f"what was learned could not be saved ({' '.join(str(again).split())[:200]})")


async def _save(
    settings: Settings,
    folder: Path,
    counters: dict[str, int],
    *,
    parameters: Any,
    ppo: Durable,
    engine: PPOEngine,
    registry: Any,
) -> Path:
    """Both models and the numbering of the actions, as :mod:`priorzero.entry` leaves them; not enough to go on from."""
    timeout_s = settings.cluster.timeout_s
    state = await answer(parameters, timeout_s=timeout_s, who="the world model's learner")
    if settings.env.action_space == "positional":
        actions = {"num_used": settings.env.action_space_size, "num_overflows": 0}
    else:
        actions = await answer(registry.actions.remote(), timeout_s=timeout_s, who="the registry")
    exported = folder / "learners" / "llm"
    await ppo.ask(lambda: engine.export(exported))

    def write(aside: Path) -> None:
        save_tensors(state, aside / "world_model.pt")
        (aside / "actions.json").write_text(json.dumps(actions), encoding="utf-8")
        (aside / "config.yaml").write_text(dump_settings(settings), encoding="utf-8")
        exported.rename(aside / "llm")

    name = f"iteration_{counters['iteration']}"
    saved = save_checkpoint(folder / "checkpoints" / name, write=write, about={"counters": counters})
    remove_old_checkpoints(folder, keep=settings.run.keep_checkpoints)
    return saved
