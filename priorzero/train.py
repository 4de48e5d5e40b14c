"""The whole of PriorZero's training, to be read from top to bottom."""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger

from priorzero.buffer import PriorZeroGameBuffer
from priorzero.checkpoint import save_checkpoint
from priorzero.collector import Collected, Collector
from priorzero.config import differences, dump_settings
from priorzero.engines import RobustPrior, TransformersEngine
from priorzero.envs import GameSpec, make_worker, resolve_game
from priorzero.evaluator import Evaluation, Evaluator
from priorzero.lightzero import unizero_config
from priorzero.metrics import MetricsWriter, Progress, count_moved, fingerprint, open_logs, table
from priorzero.models import LanguageModel, choose_device, load_language_model
from priorzero.player import Player
from priorzero.policy import PriorZeroPolicy, prompt_style
from priorzero.text_encoder import TextEncoder
from priorzero.types import GameWorkerError, UserError
from priorzero.vocabulary import make_action_indexer


@dataclass(frozen=True)
class RunSummary:
    """What a run did.

    Attributes:
        folder: where its files are.
        rows: name to value, as printed at the end.
        metrics: the last value of every metric.
        evaluations: the last evaluation of each mode.
    """

    folder: Path
    rows: dict[str, Any]
    metrics: dict[str, float]
    evaluations: dict[str, Evaluation]


def run_training(settings: Any) -> RunSummary:
    """Train as ``settings`` (from :func:`priorzero.config.resolve_settings`) say.

    Raises:
        UserError: something a person can put right; before anything was written where possible.
    """
    game = resolve_game(settings.run.env_id)
    device = choose_device(settings.run.device)
    folder = _new_run_folder(settings, game)
    try:
        return asyncio.run(_train(settings, game=game, device=device, folder=folder))
    except GameWorkerError as error:
        raise UserError(
            f"the game cannot go on: {error}. If it needs more time, --set env.step_timeout_s="
            f"{10 * settings.env.step_timeout_s:g}; what was learned until the last checkpoint is in {folder}"
        ) from error


@dataclass(frozen=True)
class _Agent:
    """Both models and what they are fed with."""

    llm: LanguageModel | None
    engine: TransformersEngine | None
    prior: RobustPrior | None
    policy: PriorZeroPolicy
    buffer: PriorZeroGameBuffer
    player: Player
    config: Any


async def _train(settings: Any, *, game: GameSpec, device: torch.device, folder: Path) -> RunSummary:
    started = time.monotonic()
    run = settings.run
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    # Every random number comes from the one seed, in streams that cannot disturb one another.
    *global_seeds, buffer_seed, collector_seed = np.random.SeedSequence(run.seed).spawn(5)
    _seed_globals(global_seeds)
    agent = _make_agent(settings, device=device, buffer_seed=buffer_seed)
    policy, buffer = agent.policy, agent.buffer

    # ---- from here on there are files ----
    try:
        (folder / "log").mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_settings(settings), encoding="utf-8")
    except OSError as error:
        raise UserError(f"run.output_dir={run.output_dir}: cannot be written ({error}); give another folder") from error
    open_logs(folder / "log")
    logger.info(f"{game.name}, seed {run.seed}, on {device}; everything about this run is in {folder}")
    changed = [f"{group}.{key}={value}" for group, keys in differences(settings).items() for key, value in keys.items()]
    logger.info(f"settings that differ from the defaults: {', '.join(changed) or 'none'}")
    writer = MetricsWriter(folder)
    progress = Progress(max_iter=run.max_iter, max_env_step=run.max_env_step, every=run.log_every)
    workers = _make_workers(settings, game, count=settings.env.collector_env_num, first_seed=run.seed)
    eval_workers = _make_workers(settings, game, count=settings.env.evaluator_env_num, first_seed=run.seed + 10_000)
    collector = Collector(workers, player=agent.player, config=agent.config, seed=collector_seed)
    evaluator = Evaluator(eval_workers, player=agent.player, episodes=settings.eval.episodes)
    before = _fingerprints(policy)
    evaluations: dict[str, Evaluation] = {}
    counters = {"iteration": 0, "env_step": 0, "train_iter": 0, "llm_version": 0}

    try:
        while counters["iteration"] < run.max_iter and counters["env_step"] < run.max_env_step:
            # ---- collect: the LLM proposes, UniZero searches, the games answer ----
            collected = await collector.collect(settings.train.collect_env_steps)
            buffer.push(collected.segments)

            # ---- learn: both models from one sample, then the prior from the new parameters ----
            learned: dict[str, float] = {}
            if buffer.get_num_of_transitions() >= settings.train.batch_size:
                learned = _learn(agent, settings, counters)
                if agent.engine is not None and policy.llm_version > agent.engine.version:
                    await agent.engine.sync_weights(policy.llm_version)
            counters["iteration"] += 1
            counters["env_step"] = collector.env_steps
            counters["llm_version"] = policy.llm_version

            # ---- tell, evaluate, save ----
            _tell(counters, learned, collected, agent=agent, collector=collector, writer=writer, progress=progress)
            if counters["iteration"] % settings.eval.every == 0:
                evaluations = await _evaluate(
                    evaluator, settings, writer, prior=agent.prior, env_step=collector.env_steps
                )
            if run.checkpoint_every and counters["iteration"] % run.checkpoint_every == 0:
                _save(folder, agent, settings, counters)

        progress.end()
        if counters["iteration"] % settings.eval.every:
            evaluations = await _evaluate(evaluator, settings, writer, prior=agent.prior, env_step=collector.env_steps)
        saved = _save(folder, agent, settings, counters)
    except (
        asyncio.CancelledError,
        GameWorkerError,
    ):  # Ctrl-C arrives where the loop waits, never within a learning step
        logger.warning(f"interrupted; what was learned so far is in {_save(folder, agent, settings, counters)}")
        raise
    finally:
        await asyncio.gather(*(worker.close() for worker in [*workers, *eval_workers]))
        if agent.engine is not None:
            await agent.engine.close()
        writer.close()

    moved = {name: (before[name], prints) for name, prints in _fingerprints(policy).items()}
    rows = {
        "game": game.name,
        **_count_rows(settings, counters, collector, with_llm=agent.llm is not None),
        **{f"{name} tensors moved": f"{count_moved(a, b)} of {len(a)}" for name, (a, b) in moved.items()},
        **{f"evaluation, {mode}": _describe(evaluation) for mode, evaluation in evaluations.items()},
        "wall time": f"{time.monotonic() - started:.0f} s",
        "checkpoint": saved,
        "charts": f"tensorboard --logdir {run.output_dir}",
    }
    logger.info("done:\n" + table(rows))
    return RunSummary(folder, rows, dict(writer.last), evaluations)


def _seed_globals(seeds: Sequence[np.random.SeedSequence]) -> None:
    """LightZero draws from global generators: padding actions from numpy's, dropout and parameters from torch's."""
    numbers = [int(seed.generate_state(1)[0]) for seed in seeds]
    random.seed(numbers[0])
    np.random.seed(numbers[1])
    torch.manual_seed(numbers[2])


def _make_agent(settings: Any, *, device: torch.device, buffer_seed: np.random.SeedSequence) -> _Agent:
    encoder = TextEncoder(
        settings.encoder.path,
        device=device,
        cache_size=settings.encoder.cache_size,
        with_look=settings.env.look_and_inventory,
        max_moves=settings.env.max_episode_steps,
    )
    llm = load_language_model(settings.llm, device=device) if settings.prior.enabled else None
    policy = PriorZeroPolicy(settings, feature_size=encoder.feature_size, device=device.type, llm=llm)
    config = unizero_config(settings, feature_size=encoder.feature_size, device=device.type)
    style = prompt_style(settings)
    engine, prior = None, None
    if llm is not None:
        engine = TransformersEngine(
            llm,
            style=style,
            normalise=settings.prior.normalise,
            temperature=settings.prior.temperature,
            generate_max_len=settings.llm.generate_max_len,
            rows_per_forward=1 if device.type == "cpu" else 16,
        )
        prior = RobustPrior(
            engine,
            attempts=settings.prior.attempts,
            backoff_s=settings.prior.backoff_s,
            timeout_s=settings.prior.timeout_s,
        )
    player = Player(
        settings,
        policy=policy,
        encoder=encoder,
        indexer=make_action_indexer(settings.env.action_space, settings.env.action_space_size),
        prior=prior,
        style=style,
        tokenizer=llm.tokenizer if llm is not None else None,
    )
    buffer = PriorZeroGameBuffer(config, rng=np.random.default_rng(buffer_seed))
    return _Agent(llm, engine, prior, policy, buffer, player, config)


def _learn(agent: _Agent, settings: Any, counters: dict[str, int]) -> dict[str, float]:
    """The iteration's updates: the world model learns in every one, the LLM in the last. Returns the latest metrics."""
    llm_has_its_turn = agent.llm is not None and counters["iteration"] % settings.llm.update_every == 0
    learned: dict[str, float] = {}
    for update in reversed(range(settings.train.update_per_collect)):
        batch = agent.buffer.sample(settings.train.batch_size, agent.policy)
        update_llm = llm_has_its_turn and update == 0
        result = agent.policy.learn(batch, train_iter=counters["train_iter"], update_llm=update_llm)
        agent.buffer.update_priority(batch, result.pop("priorities"))
        learned.update(result)
        counters["train_iter"] += 1
    return learned


def _new_run_folder(settings: Any, game: GameSpec) -> Path:
    """The run's folder, not made yet. A name that was given must be new; a made-up one is."""
    root, name = Path(settings.run.output_dir), settings.run.exp_name
    if name:
        if not re.fullmatch(r"[\w][\w.+-]{0,99}", name):
            raise UserError(
                f"run.exp_name={name!r}: use at most 100 letters, digits and . _ + -, for example zork1_try2"
            )
        if (root / name).exists():
            raise UserError(
                f"run.exp_name={name}: {root / name} exists and is left as it is; "
                "give another name, or none to get a new one"
            )
    else:
        stem = f"{game.name}_seed{settings.run.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
        names = [stem, *(f"{stem}_{n}" for n in range(2, 100))]
        name = next(n for n in names if not (root / n).exists())
    existing = next(p for p in (root, *root.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run.output_dir={root}: {existing} is not a folder that can be written to; give another one")
    return root / name


def _make_workers(settings: Any, game: GameSpec, *, count: int, first_seed: int) -> list[Any]:
    env = settings.env
    return [
        make_worker(
            game,
            seed=first_seed + e,
            max_episode_steps=env.max_episode_steps,
            look_and_inventory=env.look_and_inventory,
            drop_inert_commands=env.drop_inert_commands,
            timeout_s=env.step_timeout_s,
        )
        for e in range(count)
    ]


async def _evaluate(
    evaluator: Evaluator, settings: Any, writer: MetricsWriter, *, prior: RobustPrior | None, env_step: int
) -> dict[str, Evaluation]:
    """Every mode; the first played of world model with prior, world model, prior is the run's own figure."""
    evaluations = {mode: await evaluator.evaluate(mode) for mode in settings.eval.modes}
    for mode, evaluation in evaluations.items():
        logger.info(
            f"evaluation at {env_step} env steps, {mode}: scores {evaluation.scores} of {evaluation.max_score:g}"
        )
        writer.write(
            {
                f"evaluator_step/{mode}_reward_mean": evaluation.mean_return,
                f"evaluator_step/{mode}_score_mean": evaluation.mean_score,
            },
            step=env_step,
        )
    main = next(m for m in ("world_model_with_prior", "world_model", "prior") if m in evaluations)
    writer.write({"evaluator_step/reward_mean": evaluations[main].mean_return}, step=env_step)
    if prior is not None:
        writer.write({"evaluator_step/prior_fallbacks": prior.take_statistics().fallbacks}, step=env_step)
    return evaluations


def _save(folder: Path, agent: _Agent, settings: Any, counters: dict[str, int]) -> Path:
    target = folder / "checkpoints" / f"iteration_{counters['iteration']}"
    if target.exists():  # the last iteration of the loop saved it a moment ago
        return target
    return save_checkpoint(
        target, policy=agent.policy, indexer=agent.player.indexer, settings=settings, counters=counters
    )


def _fingerprints(policy: PriorZeroPolicy) -> dict[str, dict[str, float]]:
    """Of everything that learns; buffers such as running means do not count."""
    prints = {"world model": fingerprint(dict(policy.trained_world_model_parameters()))}
    if policy.llm_learner is not None:
        llm = policy.llm_learner.llm.model
        prints["LLM"] = fingerprint({name: p for name, p in llm.named_parameters() if p.requires_grad})
    return prints


def _buffer_scalars(buffer: PriorZeroGameBuffer) -> dict[str, float]:
    return {
        "buffer/decisions": float(buffer.get_num_of_transitions()),
        "buffer/segments": float(buffer.get_num_of_game_segments()),
        "buffer/evicted": float(buffer.num_evicted),
    }


def _tell(
    counters: dict[str, int],
    learned: dict[str, float],
    collected: Collected,
    *,
    agent: _Agent,
    collector: Collector,
    writer: MetricsWriter,
    progress: Progress,
) -> None:
    iteration = counters["iteration"]
    writer.write(learned, step=counters["train_iter"])
    writer.write(collector.scalars(collected), step=iteration)
    writer.write(_buffer_scalars(agent.buffer), step=iteration)
    if agent.prior is not None:
        prior_scalars = agent.prior.take_statistics().scalars()
        writer.write(prior_scalars, step=iteration)
        logger.bind(topic="prior").info(f"iteration {iteration}: {_short(prior_scalars)}")
    _log_segments(collected, iteration)
    progress.show(
        iteration=iteration,
        env_step=counters["env_step"],
        episode_return=writer.last.get("collector_iter/reward_mean"),
        loss=writer.last.get("train/total_loss"),
    )


def _log_segments(collected: Collected, iteration: int) -> None:
    log = logger.bind(topic="segments")
    for segment in collected.segments:
        records: Sequence[Any] = segment.records
        log.info(
            f"iteration {iteration}: episode {records[0].episode}, steps {records[0].step}-{records[-1].step}, "
            f"{len(records)} decisions, reward {sum(r.reward for r in records):g}, "
            f"root value {np.mean([r.root_value for r in records]):.3f}, "
            f"predicted {np.mean([r.predicted_value for r in records]):.3f}, "
            f"with prompt {sum(bool(r.prompt) for r in records)}, ends episode {records[-1].done}"
        )


def _short(scalars: dict[str, float]) -> str:
    return ", ".join(f"{name.split('/')[-1]} {value:.4g}" for name, value in scalars.items())


def _count_rows(settings: Any, counters: dict[str, int], collector: Collector, *, with_llm: bool) -> dict[str, Any]:
    nothing_learned = f"0 (fewer than train.batch_size={settings.train.batch_size} decisions were stored)"
    return {
        "iterations": counters["iteration"],
        "environment steps": counters["env_step"],
        "episodes finished": collector.num_episodes,
        "mean return": f"{_mean(collector.recent_returns)} over the last {len(collector.recent_returns)} episodes",
        "world-model updates": counters["train_iter"] or nothing_learned,
        "LLM updates": counters["llm_version"] if with_llm else "no LLM",
    }


def _mean(values: Collection[float]) -> str:
    return f"{np.mean(list(values)):.2f}" if len(values) else "-"


def _describe(evaluation: Evaluation) -> str:
    return (
        f"mean score {evaluation.mean_score:.2f} of {evaluation.max_score:g}, "
        f"mean return {evaluation.mean_return:.2f}, {evaluation.wins} of {len(evaluation.returns)} episodes won"
    )
