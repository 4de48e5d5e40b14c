"""Builds what both training loops need from the settings: models, prior engine, policy, replay, player, games."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from priorzero.envs import GameSpec, GameWorker, make_workers
from priorzero.llm.engines import RetryingPrior, cores_for_training
from priorzero.llm.engines.make import make_engine
from priorzero.llm.models import LanguageModel, load_language_model
from priorzero.llm.prompts import prompt_style
from priorzero.play.action_vocabulary import ActionVocabulary
from priorzero.play.evaluator import Evaluator, Evaluators
from priorzero.play.player import Player
from priorzero.play.text_encoder import TextEncoder
from priorzero.policy import PriorZeroPolicy
from priorzero.runs.results import FIRST_EVALUATION_SEED
from priorzero.runtime.activity import announced
from priorzero.runtime.concurrency import OwnerThread
from priorzero.runtime.timeline import Timeline
from priorzero.settings import Settings
from priorzero.types import PriorEngine, UserError
from priorzero.world_model.best_episodes import BestEpisodes
from priorzero.world_model.replay import PriorZeroGameBuffer


@dataclass(frozen=True)
class Agent:
    """Both models and everything around them.

    While the loop runs, only ``world_model_thread`` uses the world model and the replay buffer, and only ``llm_thread``
    changes the training copy of the LLM.

    Attributes:
        device: device of the models.
        policy: the world model and the LLM's learner.
        player: makes decisions.
        buffer: the replay buffer.
        best_episodes: the best episode of each game; None unless ``llm.imitation_share`` is set.
        llm: the training copy of the LLM; None for UniZero alone, like ``engine`` and ``prior``.
        engine: computes the LLM's priors.
        prior: the engine with retries.
        timeline: records what runs when.
        world_model_thread: see above.
        llm_thread: see above.
    """

    device: torch.device
    policy: PriorZeroPolicy
    player: Player
    buffer: PriorZeroGameBuffer
    best_episodes: BestEpisodes | None
    llm: LanguageModel | None
    engine: PriorEngine | None
    prior: RetryingPrior | None
    timeline: Timeline
    world_model_thread: OwnerThread
    llm_thread: OwnerThread

    @property
    def indexer(self) -> ActionVocabulary:
        """The action vocabulary."""
        return self.player.indexer


def make_agent(
    settings: Settings, *, device: torch.device, buffer_seed: np.random.SeedSequence, vllm_log: Path
) -> Agent:
    """Load both models and build everything around them. The prior engine is not started.

    Args:
        settings: all settings.
        device: device of the models.
        buffer_seed: seed of the samples of the replay buffer and of the best episodes.
        vllm_log: vLLM's log file.

    Raises:
        UserError: a model cannot be loaded, or settings do not fit it.
    """
    timeline = Timeline(keep=settings.run.trace_iterations)
    world_model_thread = OwnerThread("world-model", timeline)
    with announced("loading the text encoder"):
        encoder = make_encoder(settings, device=device)
    with announced("loading the LLM"):
        llm = load_language_model(settings.llm, device=device) if settings.prior.enabled else None
    with announced("building the world model and compiling the search"):
        policy = PriorZeroPolicy(settings, feature_size=encoder.feature_size, device=device.type, llm=llm)
    engine, prior = None, None
    if llm is not None:
        engine = make_engine(settings, llm=llm, vllm_log=vllm_log)
        prior = RetryingPrior(
            engine,
            settings.prior,
            sync_every=settings.vllm.sync_every,
            max_staleness=settings.vllm.max_staleness,
            learner_version=lambda: policy.llm_version,
            timeline=timeline,
        )
    player = Player(
        settings,
        policy=policy,
        encoder=encoder,
        indexer=ActionVocabulary(settings.env.num_actions),
        prior=prior,
        style=prompt_style(settings),
        tokenizer=llm.tokenizer if llm is not None else None,
        world_model_thread=world_model_thread,
        timeline=timeline,
    )
    return Agent(
        device=device,
        policy=policy,
        player=player,
        buffer=PriorZeroGameBuffer(policy.lightzero_config, rng=np.random.default_rng(buffer_seed)),
        best_episodes=make_best_episodes(settings, seed=buffer_seed.spawn(1)[0]),
        llm=llm,
        engine=engine,
        prior=prior,
        timeline=timeline,
        world_model_thread=world_model_thread,
        llm_thread=OwnerThread("llm", timeline),
    )


def make_best_episodes(settings: Settings, *, seed: np.random.SeedSequence) -> BestEpisodes | None:
    """The store of the best episodes, empty; None if the LLM does not imitate them."""
    uses_them = settings.prior.enabled and settings.llm.imitation_share > 0
    return BestEpisodes(rng=np.random.default_rng(seed)) if uses_them else None


# ---- models ----


def set_num_threads(settings: Settings, *, device: torch.device) -> None:
    """Set torch's CPU threads: ``run.num_threads``, or half of the cores if vLLM runs on the CPU, too."""
    if settings.run.num_threads:
        torch.set_num_threads(settings.run.num_threads)
    elif settings.prior.enabled and settings.prior.engine == "vllm" and device.type == "cpu":
        torch.set_num_threads(cores_for_training())


def make_encoder(settings: Settings, *, device: torch.device) -> TextEncoder:
    """The frozen text encoder."""
    return TextEncoder(settings.encoder.path, device=device, with_look=settings.env.look_and_inventory)


# ---- games ----


async def start_workers(workers: Sequence[GameWorker], *, meanwhile: Callable[[], Agent]) -> Agent:
    """Start all workers, and build the agent while they start.

    Only a :class:`UserError` of a worker is raised. After any other failure the collector tries again.
    """
    starting = asyncio.gather(*(worker.start() for worker in workers), return_exceptions=True)
    await asyncio.sleep(0)  # the processes are started now
    try:
        agent = meanwhile()
        with announced("starting the games"):
            outcomes = await starting
        for outcome in outcomes:
            if isinstance(outcome, UserError):
                raise outcome
    except BaseException:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in workers))
        raise
    return agent


def evaluation_seed(settings: Settings) -> int:
    """Seed of the first game of an evaluation, and of the modes that sample. Training uses other seeds."""
    return settings.run.seed + FIRST_EVALUATION_SEED


def make_evaluation_workers(settings: Settings, game: GameSpec, *, count: int) -> list[GameWorker]:
    """Processes that play ``game`` with the seeds of an evaluation. They are not started."""
    return make_workers(settings, [game], count=count, first_seed=evaluation_seed(settings))


def make_evaluators(
    settings: Settings,
    *,
    games: Sequence[GameSpec],
    unseen: Sequence[GameSpec],
    player: Player,
    step_limit: int | None = None,
) -> Evaluators:
    """Evaluators for the games that are trained on and for the unseen ones. Their workers are not started.

    ``step_limit`` is that of :class:`~priorzero.play.evaluator.Evaluator`.
    """

    def make(game: GameSpec) -> Evaluator:
        return Evaluator(
            game.name,
            make_evaluation_workers(settings, game, count=settings.env.evaluator_env_num),
            player=player,
            episodes=settings.eval.episodes,
            seed=evaluation_seed(settings),
            step_limit=step_limit,
        )

    return Evaluators(settings.eval.modes, [make(game) for game in games], [make(game) for game in unseen])
