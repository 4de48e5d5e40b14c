"""The processes of a run on a cluster, and how they see one another.

Each is an ordinary class around the parts of the single-process run; Ray makes actors of them. A collector has the
whole of the world model to search with, and asks a server for priors; servers and learners hold the language model.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from loguru import logger

from priorzero.agent import Evaluators, choose_engine, make_encoder, make_engine, make_workers
from priorzero.cluster.handles import answer
from priorzero.cluster.ppo.trajectories import trajectories_from
from priorzero.envs import resolve_games
from priorzero.llm.engines import RetryingPrior
from priorzero.llm.models import choose_device, load_language_model, load_tokenizer
from priorzero.llm.prompts import prompt_style
from priorzero.play.action_vocabulary import ActionVocabulary, make_action_indexer
from priorzero.play.collector import Collected, Collector
from priorzero.play.evaluator import Evaluation, evaluate_all
from priorzero.play.player import Player
from priorzero.policy import PriorZeroPolicy
from priorzero.runs.checkpoint import read_state, save_checkpoint
from priorzero.runs.nonfinite import DroppedUpdates
from priorzero.runtime.concurrency import OwnerThread, ReadersWriterLock
from priorzero.runtime.random_state import global_random_state, seed_globals, set_global_random_state
from priorzero.runtime.timeline import Timeline
from priorzero.settings import Settings
from priorzero.train import buffer_scalars, update_world_model
from priorzero.types import ActionPrior, EngineError, PriorRequest, ProcessError
from priorzero.world_model.lightzero import unizero_config
from priorzero.world_model.records import RecordTable, read_records
from priorzero.world_model.replay import PriorZeroGameBuffer

EPISODES_OF_A_COLLECTOR = 10**9  # numbers that belong to one collector


def settle(settings: Settings, *, threads: int = 1) -> torch.device:
    """What every process does first: short log lines, its threads; returns where its models live."""
    logger.remove()
    logger.add(sys.stderr, level="INFO", format="{level: <7} {message}", filter=lambda r: "topic" not in r["extra"])
    torch.set_num_threads(settings.run.num_threads or threads)
    return choose_device(settings.run.device)


def save_tensors(state: Any, path: Path) -> None:
    """``torch.save``.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    try:
        torch.save(state, path)
    except RuntimeError as error:  # what torch raises for a full disk
        raise OSError(f"{path.name}: {error}") from error


# ---- what all look up ----


class Registry:
    """Numbers the actions for all collectors, and knows the LLM parameters that were published last."""

    def __init__(self, settings: Settings) -> None:
        self._indexer = make_action_indexer("vocabulary", settings.env.action_space_size)
        self._collectors = 0
        self._version = 0
        self._parameters: list[Any] = []

    def new_collector(self) -> int:
        """A number that no other collector has, nor had."""
        self._collectors += 1
        return self._collectors - 1

    def assign(self, actions: Sequence[str]) -> tuple[np.ndarray, int, int]:
        """Indices of actions ``[K]``, how many have been given out, and how many found none of their own."""
        return self._indexer.indices(actions), self._indexer.num_used, self._indexer.num_overflows

    def actions(self) -> dict[str, Any]:
        """All of them, as :meth:`priorzero.play.action_vocabulary.ActionVocabulary.state_dict`."""
        return self._indexer.state_dict()

    def publish(self, version: int, parameters: list[Any]) -> None:
        """``parameters``: Ray's reference to them, in a list, which keeps Ray from looking it up."""
        self._version, self._parameters = version, parameters

    def published(self) -> tuple[int, list[Any]]:
        return self._version, self._parameters


class SharedVocabulary:
    """An :class:`~priorzero.play.action_vocabulary.ActionIndexer` whose numbers are the registry's.

    What was numbered once is not asked for again, as long as there are free numbers. When they run out, numbers are
    given anew (counted); a collector that has not asked since goes on using the old ones until it does.

    Args:
        registry: handle of the :class:`Registry`.
        capacity: ``A``.
        timeout_s: the longest that the registry may take.
    """

    def __init__(self, registry: Any, *, capacity: int, timeout_s: float) -> None:
        self.capacity = capacity
        self.num_overflows = 0
        self._registry = registry
        self._timeout_s = timeout_s
        self._known: dict[str, int] = {}
        self._num_used = 0
        self._num_cut = 0

    @property
    def num_used(self) -> int:
        return self._num_used

    def keep(self, actions: Sequence[str]) -> tuple[str, ...]:
        self._num_cut += max(0, len(actions) - self.capacity)
        return tuple(actions[: self.capacity])

    def indices(self, actions: Sequence[str]) -> np.ndarray:
        if self.num_overflows == 0 and all(action in self._known for action in actions):
            return np.array([self._known[action] for action in actions], dtype=np.int64)
        told = ray.get(self._registry.assign.remote(list(actions)), timeout=self._timeout_s)
        indices, self._num_used, overflows = told
        self.num_overflows = overflows + self._num_cut
        self._known.update(zip(actions, indices.tolist(), strict=True))
        return indices

    def __deepcopy__(self, memo: Any) -> ActionVocabulary:
        """A vocabulary of its own, which leaves no trace: for evaluation."""
        copied = ActionVocabulary(self.capacity)
        copied.load_state_dict(ray.get(self._registry.actions.remote(), timeout=self._timeout_s))
        return copied

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = ray.get(self._registry.actions.remote(), timeout=self._timeout_s)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("the registry's numbers are not a collector's to change")


# ---- the prior ----


class PriorServer:
    """Runs a prior engine for collectors elsewhere. Started again, it fetches what was published last.

    Args:
        settings: all settings.
        registry: name of the :class:`Registry`. Names, since Ray may lose handles by the time it starts it again.
        log_file: where vLLM's own log goes.
    """

    def __init__(self, settings: Settings, registry: str, log_file: str) -> None:
        """Nothing is loaded yet: what is raised here would reach nobody."""
        self._settings = settings
        self._registry_name = registry
        self._log_file = Path(log_file)
        self._lock = ReadersWriterLock()
        self._starting = asyncio.Lock()
        self._prior: RetryingPrior | None = None
        self._llm: Any = None

    async def ready(self) -> int:
        """Start, and return the version of the parameters that it serves.

        Raises:
            UserError: the model cannot be loaded.
            EngineError: vLLM cannot be started.
        """
        async with self._starting:
            if self._prior is None:
                settings = self._settings
                device = settle(settings)
                settings.prior.engine = choose_engine(settings.prior.engine, device=device)
                self._llm = load_language_model(settings.llm, device=device)
                engine = make_engine(settings, llm=self._llm, log_file=self._log_file)
                prior = RetryingPrior(
                    engine,
                    attempts=settings.prior.attempts,
                    backoff_s=settings.prior.backoff_s,
                    timeout_s=settings.prior.timeout_s,
                )
                version, parameters = await ray.get_actor(self._registry_name).published.remote()
                if parameters:
                    await self._load(engine, version, await parameters[0])
                await engine.ready()
                self._prior = prior
        return self._prior.engine.version

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        """As :meth:`priorzero.llm.engines.RetryingPrior.priors`: retried, and then answered for with a uniform prior."""
        await self.ready()
        assert self._prior is not None
        async with self._lock.shared():
            return await self._prior.priors(requests)

    async def take_over(self, version: int, parameters: list[Any]) -> int:
        """Serve these from now on; what was asked before is answered first."""
        await self.ready()
        assert self._prior is not None
        engine = self._prior.engine
        if version != engine.version:
            state = await parameters[0]
            async with self._lock.exclusive():
                await engine.suspend()
                await self._load(engine, version, state)
        return engine.version

    async def _load(self, engine: Any, version: int, state: Any) -> None:
        load_trained_parameters(self._llm.model, state)
        await engine.sync_weights(version)

    async def statistics(self) -> tuple[int, dict[str, float]]:
        """This process's number, and the metrics since the last call."""
        await self.ready()
        assert self._prior is not None
        return os.getpid(), self._prior.take_statistics()

    async def close(self) -> None:
        if self._prior is not None:
            await self._prior.engine.close()


def load_trained_parameters(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Load what a learner trains; the rest (what is frozen, what shares its storage with these) stays.

    Raises:
        ValueError: a parameter that is trained is missing, or one is unknown.
    """
    missing, unknown = model.load_state_dict(state, strict=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}  # of tied ones the first name alone
    if unknown or trained & set(missing):
        raise ValueError(f"parameters do not fit: missing {sorted(trained & set(missing))}, unknown {unknown}")


class RemoteEngine:
    """A :class:`~priorzero.types.PriorEngine` that is a server elsewhere.

    A server that has died is started again by Ray; until it answers, so many seconds as its start may take are waited.

    Args:
        server: handle of the :class:`PriorServer`.
        start_timeout_s: the longest that it may take to come back.
        timeout_s: the longest that an answer may take.
    """

    exclusive = False

    def __init__(self, server: Any, *, start_timeout_s: float, timeout_s: float) -> None:
        self.version = 0
        self._server = server
        self._start_timeout_s = start_timeout_s
        self._timeout_s = timeout_s
        self._is_up = False

    async def ready(self) -> None:
        if self._is_up:
            return
        began = time.monotonic()
        while not self._is_up:
            left = self._start_timeout_s - (time.monotonic() - began)
            try:
                version = await answer(self._server.ready.remote(), timeout_s=max(1.0, left), who="the prior server")
                self.version, self._is_up = max(self.version, version), True
            except ProcessError as error:
                if left < 1.0:
                    raise EngineError(str(error)) from error
                await asyncio.sleep(1.0)  # Ray is starting it again

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        reference = self._server.priors.remote(list(requests))
        try:
            priors: list[ActionPrior] = await answer(reference, timeout_s=self._timeout_s, who="the prior server")
        except ProcessError:
            self._is_up = False
            raise
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        self.version = max(self.version, *(prior.version for prior in priors))
        return priors

    async def check(self) -> None:
        """Nothing: whoever runs the servers looks after them."""

    async def suspend(self) -> None: ...

    async def sync_weights(self, version: int) -> None: ...

    async def clear_cache(self) -> None: ...

    def take_statistics(self) -> dict[str, float]:
        return {}

    async def close(self) -> None: ...


# ---- playing ----


class CollectorProcess:
    """Plays games, one call at a time.

    Args:
        settings: all settings.
        registry: name of the :class:`Registry`.
        servers: names of the prior servers, of which it asks one.
    """

    def __init__(self, settings: Settings, registry: str, servers: Sequence[str]) -> None:
        """Nothing is loaded yet: what is raised here would reach nobody."""
        self.settings = settings
        self._registry, self._servers = registry, list(servers)
        self._is_loaded = False
        self._loop = asyncio.new_event_loop()

    def _load(self) -> None:
        if self._is_loaded:
            return
        settings, servers = self.settings, self._servers
        device = settle(settings)
        cluster = settings.cluster
        known: Any = ray.get_actor(self._registry)
        number = ray.get(known.new_collector.remote(), timeout=cluster.timeout_s)
        seeds = np.random.SeedSequence([settings.run.seed, number]).spawn(4)
        seed_globals(seeds[:3])
        games = resolve_games(settings.run.env_id)
        first_seed = settings.run.seed + number * settings.env.collector_env_num
        workers = make_workers(settings, games, count=settings.env.collector_env_num, first_seed=first_seed)
        encoder = make_encoder(settings, device=device)
        self._policy = PriorZeroPolicy(settings, feature_size=encoder.feature_size, device=device.type, llm=None)
        self._config = unizero_config(settings, feature_size=encoder.feature_size, device=device.type)
        self._versions = {"world model": -1, "LLM": 0}
        timeline = Timeline()
        self._prior = RetryingPrior(
            RemoteEngine(
                ray.get_actor(servers[number % len(servers)]),
                start_timeout_s=cluster.start_timeout_s,
                timeout_s=cluster.timeout_s,
            ),
            attempts=settings.prior.attempts,
            backoff_s=settings.prior.backoff_s,
            timeout_s=cluster.timeout_s,  # the server sees to prior.timeout_s; here waiting for its turn counts
            max_staleness=settings.ppo.max_staleness,
            learner_version=lambda: self._versions["LLM"],
            timeline=timeline,
        )
        positional = settings.env.action_space == "positional"
        capacity = settings.env.action_space_size
        self._player = Player(
            settings,
            policy=self._policy,
            encoder=encoder,
            indexer=make_action_indexer("positional", capacity)
            if positional
            else SharedVocabulary(known, capacity=capacity, timeout_s=cluster.timeout_s),
            prior=self._prior,
            style=prompt_style(settings),
            tokenizer=load_tokenizer(settings.llm),
            world_model_thread=OwnerThread("world-model", timeline),
            timeline=timeline,
        )
        self._collector = Collector(
            workers,
            player=self._player,
            config=self._config,
            seed=seeds[3],
            first_episode=number * EPISODES_OF_A_COLLECTOR,
            num_games=len(games),
        )
        self._evaluators: Evaluators | None = None
        self._is_loaded = True

    def feature_size(self) -> int:
        """``F``; answers once everything is loaded.

        Raises:
            UserError: a model or a game cannot be loaded.
        """
        self._load()
        return self._player.encoder.feature_size

    def _take_over(self, versions: dict[str, int], world_model: dict[str, torch.Tensor] | None) -> None:
        self._load()
        if world_model is not None and versions["world model"] != self._versions["world model"]:
            self._policy.load_world_model_state(world_model)
        self._versions = dict(versions)

    @ray.method(num_returns=2)
    def collect(
        self, num_steps: int, versions: dict[str, int], world_model: dict[str, torch.Tensor] | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take at least ``num_steps`` environment steps.

        Args:
            num_steps: all games together.
            versions: of the world model and of the LLM at the learners, when this was asked for.
            world_model: that world model's parameters; None before the first.

        Returns:
            The segments as plain data for :meth:`WorldModelProcess.push`; and what is told of them: ``scalars``,
            ``prior`` (statistics), ``episodes``, ``env_steps``, ``pid``, ``shares`` and ``trajectories``.
        """
        self._take_over(versions, world_model)
        collected = self._loop.run_until_complete(self._collector.collect(num_steps))
        assert collected is not None
        table = RecordTable()
        segments = {**collected.state_dict(table), "episodes": []}
        told = {
            "scalars": self._collector.scalars(collected),
            "prior": self._prior.take_statistics(),
            "episodes": collected.episodes,
            "env_steps": collected.env_steps,
            "pid": os.getpid(),
            "shares": self._player.timeline.finish_interval(),
            "trajectories": trajectories_from(collected.segments),
        }
        return {"segments": segments, "records": table.state_dict()}, told

    def evaluate(
        self, versions: dict[str, int], world_model: dict[str, torch.Tensor] | None
    ) -> dict[tuple[str, bool], dict[str, Evaluation]]:
        """What :func:`priorzero.train.evaluate_all` returns."""
        self._take_over(versions, world_model)
        if self._evaluators is None:
            games, unseen = (resolve_games(names) for names in (self.settings.run.env_id, self.settings.eval.unseen))
            self._evaluators = Evaluators(self.settings, games=games, unseen=unseen, player=self._player)
        played = self._loop.run_until_complete(evaluate_all(self._evaluators))
        self._player.timeline.discard_interval()
        self._prior.take_statistics()  # not the next iteration's
        return played


# ---- learning ----


class WorldModelProcess:
    """The world model's learner with the replay buffer. Equal calls after an equal state lead to an equal state.

    Args:
        settings: all settings.
        feature_size: ``F``.
        folder: the run's.
    """

    def __init__(self, settings: Settings, feature_size: int, folder: str) -> None:
        device = settle(settings)
        *global_seeds, buffer_seed, _ = np.random.SeedSequence(settings.run.seed).spawn(5)
        seed_globals(global_seeds)
        self._settings = settings
        self._policy = PriorZeroPolicy(settings, feature_size=feature_size, device=device.type, llm=None)
        self._config = unizero_config(settings, feature_size=feature_size, device=device.type)
        self._buffer = PriorZeroGameBuffer(self._config, rng=np.random.default_rng(buffer_seed))
        self._dropped = DroppedUpdates(Path(folder, "not_finite"), limit=settings.train.max_nonfinite_updates)
        self._counters = {"train_iter": 0}
        self._version = 0

    def push(self, collected: dict[str, Any]) -> dict[str, float]:
        """Store what a collector has sent; returns the buffer's metrics."""
        records = read_records(collected["records"])
        segments = Collected.from_state_dict(collected["segments"], records, config=self._config).segments
        self._buffer.push(segments)
        return buffer_scalars(self._buffer)

    def learn(self) -> tuple[dict[str, float], int]:
        """A turn of ``train.update_per_collect`` updates, none while there is less than a batch.

        Returns:
            The metrics, and how many updates there have been in all.

        Raises:
            UserError: too many updates in a row were left out.
        """
        learned: dict[str, float] = {}
        batch_size = self._settings.train.batch_size
        if self._buffer.get_num_of_transitions() >= batch_size:
            for _ in range(self._settings.train.update_per_collect):
                _, metrics = update_world_model(
                    self._policy, self._buffer, self._dropped, batch_size=batch_size, counters=self._counters
                )
                learned.update(metrics)
            self._version += 1
            learned["train/updates_left_out"] = float(self._dropped.total)
        return learned, self._counters["train_iter"]

    @ray.method(num_returns=2)
    def parameters(self) -> tuple[dict[str, torch.Tensor], int]:
        """The world model's parameters, and how many turns have changed them."""
        return {name: tensor.cpu() for name, tensor in self._policy.world_model_state().items()}, self._version

    def save(self, folder: str) -> None:
        """Write everything that the next call depends on."""
        table = RecordTable()
        state = {
            "world_model": self._policy.world_model_state(),
            "policy": self._policy.training_state(),
            "buffer": self._buffer.state_dict(table),
            "records": table.state_dict(),
            "counters": self._counters,
            "version": self._version,
            "dropped": self._dropped.state_dict(),
            "random": global_random_state(),
        }
        save_checkpoint(
            Path(folder), write=lambda aside: save_tensors(state, aside / "world_model_learner.pt"), about={}
        )

    def load(self, folder: str) -> None:
        state = read_state(Path(folder), "world_model_learner.pt")
        self._policy.load_world_model_state(state["world_model"])
        self._policy.load_training_state(state["policy"])
        self._buffer.load_state_dict(state["buffer"], read_records(state["records"]))
        self._counters, self._version = state["counters"], state["version"]
        self._dropped.load_state_dict(state["dropped"])
        set_global_random_state(state["random"])
