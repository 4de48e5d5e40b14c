"""Builds what both training loops need from the settings: models, engine, policy, replay, games."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from priorzero.envs import GameSpec, make_worker
from priorzero.settings import Settings


def check_games(settings: Settings, *, games: Sequence[GameSpec], unseen: Sequence[GameSpec]) -> None:
    """Raises UserError if a run cannot be on these games."""
    if not games:
        raise UserError("run.env_id is empty; name a game, such as zork1.z5 or textworld:simple?seed=7")
    if settings.env.collector_env_num % len(games):
        raise UserError(
            f"env.collector_env_num={settings.env.collector_env_num} must be a multiple of the {len(games)} games of "
            f"run.env_id; type --set env.collector_env_num={len(games)}"
        )
    both = {game.md5 for game in games} & {game.md5 for game in unseen}
    if both:
        names = ", ".join(game.env_id for game in unseen if game.md5 in both)
        raise UserError(f"eval.unseen: {names} is trained on (run.env_id); name other games")


def choose_engine(engine: str, *, device: torch.device) -> str:
    """``auto`` takes vLLM on a GPU and the in-process engine on a CPU.

    Raises:
        UserError: vLLM is to be used and is not installed.
    """
    chosen = engine if engine != "auto" else "vllm" if device.type == "cuda" else "transformers"
    if chosen == "vllm" and importlib.util.find_spec("vllm") is None:
        how = "pip install --no-deps -r requirements/gpu.txt" if device.type == "cuda" else "scripts/set_up.sh test"
        raise UserError(
            f"prior.engine={engine}: vLLM is not installed; type {how}, or --engine transformers to do without it"
        )
    return chosen


@dataclass(frozen=True)
class Agent:
    """Both models and what they are fed with.

    ``world_model_thread`` alone touches the world model and the replay buffer while the loop runs; ``llm_thread`` alone
    changes the training copy of the LLM.
    """

    llm: LanguageModel | None
    engine: PriorEngine | None
    prior: RobustPrior | None
    policy: PriorZeroPolicy
    buffer: PriorZeroGameBuffer
    player: Player
    config: Any
    timeline: Timeline
    world_model_thread: OwnerThread
    llm_thread: OwnerThread
    dropped: DroppedUpdates


async def _load(
    settings: Settings,
    *,
    games: Sequence[GameSpec],
    device: torch.device,
    buffer_seed: np.random.SeedSequence,
    folder: Path,
) -> tuple[Agent, list[Any]]:
    """Both models, and the games to collect from, which load in their processes while the models load in this one."""
    workers = make_workers(settings, games, count=settings.env.collector_env_num, first_seed=settings.run.seed)
    starting = asyncio.gather(*(worker.start() for worker in workers), return_exceptions=True)
    await asyncio.sleep(0)  # now every process has been started
    try:
        agent = load_agent(settings, device=device, buffer_seed=buffer_seed, folder=folder)
        for outcome in await starting:
            if isinstance(outcome, UserError):  # after any other failure the collector tries once more
                raise outcome
    except BaseException:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)  # taken note of: what counts is what is raised here
        await asyncio.gather(*(worker.close() for worker in workers))
        raise
    return agent, workers


def load_agent(settings: Settings, *, device: torch.device, buffer_seed: np.random.SeedSequence, folder: Path) -> Agent:
    """Both models and what they are fed with; nothing is learned or played yet.

    Args:
        settings: all settings.
        device: where the models live.
        buffer_seed: replay draws from it.
        folder: the run's, for vLLM's log and what is kept of updates that are left out.

    Raises:
        UserError: a model cannot be loaded, or settings do not go with it.
    """
    timeline = Timeline(keep=settings.run.trace_iterations)
    world_model_thread = OwnerThread("world-model", timeline)
    encoder = make_encoder(settings, device=device)
    llm = load_language_model(settings.llm, device=device) if settings.prior.enabled else None
    policy = PriorZeroPolicy(settings, feature_size=encoder.feature_size, device=device.type, llm=llm)
    config = unizero_config(settings, feature_size=encoder.feature_size, device=device.type)
    engine, prior = None, None
    if llm is not None:
        engine = make_engine(settings, llm=llm, log_file=folder / "log" / "vllm.log")
        prior = RobustPrior(
            engine,
            attempts=settings.prior.attempts,
            backoff_s=settings.prior.backoff_s,
            timeout_s=settings.prior.timeout_s,
            sync_every=settings.vllm.sync_every,
            max_staleness=settings.vllm.max_staleness,
            learner_version=lambda: policy.llm_version,
            timeline=timeline,
        )
    player = Player(
        settings,
        policy=policy,
        encoder=encoder,
        indexer=make_action_indexer(settings.env.action_space, settings.env.action_space_size),
        prior=prior,
        style=prompt_style(settings),
        tokenizer=llm.tokenizer if llm is not None else None,
        world_model_thread=world_model_thread,
        timeline=timeline,
    )
    return Agent(
        llm=llm,
        engine=engine,
        prior=prior,
        policy=policy,
        buffer=PriorZeroGameBuffer(config, rng=np.random.default_rng(buffer_seed)),
        player=player,
        config=config,
        timeline=timeline,
        world_model_thread=world_model_thread,
        llm_thread=OwnerThread("llm", timeline),
        dropped=DroppedUpdates(folder / "not_finite", limit=settings.train.max_nonfinite_updates),
    )


def make_encoder(settings: Settings, *, device: torch.device) -> TextEncoder:
    """The frozen text encoder."""
    return TextEncoder(
        settings.encoder.path,
        device=device,
        pooling=settings.encoder.pooling,
        parts=settings.encoder.parts,
        cache_size=settings.encoder.cache_size,
        with_look=settings.env.look_and_inventory,
        max_moves=settings.env.max_episode_steps,
    )


def make_engine(settings: Settings, *, llm: LanguageModel, log_file: Path) -> PriorEngine:
    """The prior engine that ``prior.engine`` names (not ``auto``); it has yet to be started.

    Raises:
        UserError: settings of vLLM that this model or machine does not take.
    """
    maker = PriorMaker(
        llm,
        prompt_style(settings),
        normalise=settings.prior.normalise,
        temperature=settings.prior.temperature,
        generate_max_len=settings.llm.generate_max_len,
    )
    if settings.prior.engine == "transformers":
        if llm.device.type == "cpu":  # a row alone keeps a CPU busy, and can go on where an earlier prompt ended
            return TransformersEngine(maker, rows_per_forward=1, prompt_cache_tokens=settings.prior.prompt_cache_tokens)
        return TransformersEngine(maker, rows_per_forward=16)
    longest = max(4096, 2 * (settings.llm.prompt_max_len + settings.llm.generate_max_len))
    if llm.max_length is not None:
        longest = min(longest, llm.max_length)
        if settings.vllm.max_model_len > llm.max_length:
            raise UserError(
                f"vllm.max_model_len={settings.vllm.max_model_len} is more than the {llm.max_length} tokens that "
                "the model takes; leave it at 0"
            )
    if settings.vllm.sleep and llm.device.type == "cpu":
        raise UserError("vllm.sleep=True frees a GPU's memory, and this run is on a CPU; leave it out")
    return VLLMEngine(
        maker,
        model=resolve_model(settings.llm.path, setting="llm.path"),
        cfg=settings.vllm,
        max_model_len=settings.vllm.max_model_len or longest,
        log_file=log_file,
        trust_remote_code=settings.llm.trust_remote_code,
    )


def make_workers(settings: Settings, games: Sequence[GameSpec], *, count: int, first_seed: int) -> list[Any]:
    """``count`` workers in all, for the games in turn."""
    env = settings.env
    return [
        make_worker(
            games[e % len(games)],
            seed=first_seed + e,
            max_episode_steps=env.max_episode_steps,
            look_and_inventory=env.look_and_inventory,
            drop_inert_commands=env.drop_inert_commands,
            timeout_s=env.step_timeout_s,
        )
        for e in range(count)
    ]


class Evaluators:
    """An evaluator for each game that is trained on and for each that is not.

    Attributes:
        seen: of the games of ``run.env_id``.
        unseen: of the games of ``eval.unseen``.
        workers: of all of them.
    """

    def __init__(self, settings: Settings, *, games: Sequence[GameSpec], unseen: Sequence[GameSpec], player: Player) -> None:
        self.modes = settings.eval.modes
        self.workers: list[Any] = []
        first_seed = settings.run.seed + 10_000

        def evaluators(chosen: Sequence[GameSpec]) -> list[Evaluator]:
            made = []
            for game in chosen:
                workers = make_workers(settings, [game], count=settings.env.evaluator_env_num, first_seed=first_seed)
                self.workers += workers
                made.append(
                    Evaluator(game.name, workers, player=player, episodes=settings.eval.episodes, seed=first_seed)
                )
            return made

        self.seen, self.unseen = evaluators(games), evaluators(unseen)


