"""Collectors: processes that play the games, with a copy of the world model."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch

from priorzero.agent import make_encoder, make_evaluators
from priorzero.cluster.actors import set_up_process
from priorzero.cluster.actors.prior_server import RemoteEngine
from priorzero.cluster.actors.registry import REGISTRY, RemoteVocabulary
from priorzero.cluster.ppo.trajectories import Trajectory, trajectories_from
from priorzero.envs import make_workers, resolve_games
from priorzero.llm.engines import RetryingPrior
from priorzero.llm.models import load_tokenizer
from priorzero.llm.prompts import prompt_style
from priorzero.play.collector import Collector
from priorzero.play.episode import EpisodeResult
from priorzero.play.evaluator import Evaluations, Evaluators
from priorzero.play.player import Player
from priorzero.play.transcript import EvaluationTranscript
from priorzero.policy import PriorZeroPolicy
from priorzero.runtime.concurrency import OwnerThread
from priorzero.runtime.random_state import seed_globals
from priorzero.runtime.timeline import Timeline, TimeUsage
from priorzero.settings import Settings
from priorzero.types import Plain
from priorzero.world_model.records import RecordTable

EPISODES_PER_COLLECTOR = 10**9  # collector n numbers its episodes from n times this


@dataclass(frozen=True)
class ModelVersions:
    """Versions of the models at their learners."""

    world_model: int = 0  # number of turns of the world model
    llm: int = 0  # number of PPO steps that have changed the LLM


@dataclass(frozen=True)
class CollectorReport:
    """What a collector reports about an iteration, besides the segments."""

    metrics: dict[str, float]  # of the collector
    prior: dict[str, float]  # metrics of the prior
    episodes: list[EpisodeResult]  # training episodes that ended
    env_steps: int
    time_usage: TimeUsage
    trajectories: list[Trajectory]
    pid: int
    recordings: list[EvaluationTranscript] = field(default_factory=list)  # their env_step is the collector's own


class CollectorProcess:
    """Plays games, one call at a time, with the priors of one of the ``servers``, which are given by name.

    The constructor loads nothing, because nobody would receive its errors.
    """

    # Set by `_load`:
    _prior: RetryingPrior
    _player: Player
    _collector: Collector

    def __init__(self, settings: Settings, servers: Sequence[str]) -> None:
        self._settings = settings
        self._servers = list(servers)
        self._is_loaded = False
        self._versions: ModelVersions | None = None
        self._evaluators: Evaluators | None = None
        self._loop = asyncio.new_event_loop()

    def feature_size(self) -> int:
        """Load everything; returns ``F``."""
        self._load()
        return self._player.encoder.feature_size

    @ray.method(num_returns=2)
    def collect(
        self, num_steps: int, versions: ModelVersions, world_model: dict[str, torch.Tensor] | None
    ) -> tuple[Plain, CollectorReport]:
        """Take at least ``num_steps`` environment steps, all games together.

        ``world_model`` holds the parameters of the world model; it is None before its first turn. Returns the segments
        for :meth:`WorldModelProcess.push`, and a report.
        """
        self._load_world_model(versions, world_model)
        collected = self._loop.run_until_complete(self._collector.collect(num_steps))
        assert collected is not None
        table = RecordTable()
        segments = {**collected.state_dict(table), "episodes": [], "recordings": []}
        report = CollectorReport(
            metrics=self._collector.scalars(collected),
            prior=self._prior.take_statistics(),
            episodes=collected.episodes,
            recordings=collected.recordings,
            env_steps=collected.env_steps,
            time_usage=self._player.timeline.finish_interval(),
            trajectories=trajectories_from(collected.segments),
            pid=os.getpid(),
        )
        return {"segments": segments, "records": table.state_dict()}, report

    def evaluate(self, versions: ModelVersions, world_model: dict[str, torch.Tensor] | None) -> Evaluations:
        """Evaluate; the arguments are those of :meth:`collect`."""
        self._load_world_model(versions, world_model)
        if self._evaluators is None:
            settings = self._settings
            games, unseen = resolve_games(settings.run.env_id), resolve_games(settings.eval.unseen)
            self._evaluators = make_evaluators(settings, games=games, unseen=unseen, player=self._player)
        results = self._loop.run_until_complete(self._evaluators.evaluate(self._collector.memories))
        self._player.timeline.discard_interval()
        self._prior.take_statistics()  # drop them, so that the next iteration does not count them
        return results

    def _load_world_model(self, versions: ModelVersions, world_model: dict[str, torch.Tensor] | None) -> None:
        self._load()
        if world_model is not None and (self._versions is None or versions.world_model != self._versions.world_model):
            self._player.policy.load_world_model_state(world_model)
        self._versions = versions

    def _load(self) -> None:
        if self._is_loaded:
            return
        settings, timeout_s = self._settings, self._settings.cluster.timeout_s
        device = set_up_process(settings)
        registry: Any = ray.get_actor(REGISTRY)
        number: int = ray.get(registry.new_collector.remote(), timeout=timeout_s)
        *global_seeds, collector_seed = np.random.SeedSequence([settings.run.seed, number]).spawn(4)
        seed_globals(global_seeds)
        games = resolve_games(settings.run.env_id)
        first_seed = settings.run.seed + number * settings.env.collector_env_num
        workers = make_workers(settings, games, count=settings.env.collector_env_num, first_seed=first_seed)
        encoder = make_encoder(settings, device=device)
        timeline = Timeline()
        self._prior = self._make_prior(ray.get_actor(self._servers[number % len(self._servers)]), timeline)
        self._player = Player(
            settings,
            policy=PriorZeroPolicy(settings, feature_size=encoder.feature_size, device=device.type, llm=None),
            encoder=encoder,
            indexer=RemoteVocabulary(registry, capacity=settings.env.num_actions, timeout_s=timeout_s),
            prior=self._prior,
            style=prompt_style(settings),
            tokenizer=load_tokenizer(settings.llm),
            world_model_thread=OwnerThread("world-model", timeline),
            timeline=timeline,
        )
        self._collector = Collector(
            workers,
            player=self._player,
            seed=collector_seed,
            first_episode=number * EPISODES_PER_COLLECTOR,
            games=[game.name for game in games],
        )
        self._is_loaded = True

    def _make_prior(self, server: Any, timeline: Timeline) -> RetryingPrior:
        settings, cluster = self._settings, self._settings.cluster
        return RetryingPrior(
            RemoteEngine(server, cluster),
            # The server applies prior.timeout_s. Here waiting for the server counts, too.
            settings.prior.model_copy(update={"timeout_s": cluster.timeout_s}),
            max_staleness=settings.ppo.max_staleness,
            learner_version=lambda: 0 if self._versions is None else self._versions.llm,
            timeline=timeline,
        )
