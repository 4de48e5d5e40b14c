"""The whole of PriorZero's training, to be read from top to bottom."""

from __future__ import annotations

import asyncio
import copy
import errno
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger

from priorzero.config import differences
from priorzero.envs import GameSpec, resolve_games
from priorzero.llm.engines import cores_for_training
from priorzero.llm.models import choose_device, warn_of_long_prompts
from priorzero.play.collector import Collected, Collector
from priorzero.play.evaluator import Evaluation
from priorzero.policy import PriorZeroPolicy
from priorzero.runs.checkpoint import (
    Checkpoint,
    check_same,
    remove_leftovers,
    saved_checkpoints,
    set_damaged_aside,
)
from priorzero.runs.folder import claim, cut_files
from priorzero.runs.logger import Teller
from priorzero.runs.metrics import MetricsWriter, count_moved, fingerprint, peak_memory_mb, table
from priorzero.runs.nonfinite import DroppedUpdates, plain_batch
from priorzero.runs.saver import Saver
from priorzero.runtime.concurrency import StopRequest
from priorzero.settings import Settings
from priorzero.types import EngineError, GameWorkerError, NonFiniteError, Plain, UserError
from priorzero.world_model.replay import PriorZeroGameBuffer, SampledSegments


@dataclass(frozen=True)
class RunSummary:
    """What a run did.

    Attributes:
        folder: where its files are.
        rows: name to value, as printed at the end.
        metrics: the last value of every metric.
        evaluations: the last evaluation of each mode.
        stopped: it was asked to end before its time; ``--resume`` goes on with it.
    """

    folder: Path
    rows: dict[str, Any]
    metrics: dict[str, float]
    evaluations: dict[str, Evaluation]
    stopped: bool


def run_training(settings: Settings, *, checkpoint: Checkpoint | None = None) -> RunSummary:
    """Train as ``settings`` (from :func:`priorzero.config.resolve_settings`) say.

    Ctrl-C or SIGTERM ends a run early: it finishes its step, is saved and returns.

    Args:
        settings: all settings.
        checkpoint: go on with the run that it is of, in the run's folder.

    Raises:
        UserError: something a person can put right; before anything was written where possible.
    """
    settings = copy.deepcopy(settings)  # the caller's stay as they are
    games, unseen = resolve_games(settings.run.env_id), resolve_games(settings.eval.unseen)
    check_games(settings, games=games, unseen=unseen)
    device = choose_device(settings.run.device)
    if settings.prior.enabled:
        settings.prior.engine = choose_engine(settings.prior.engine, device=device)
    lock = None
    if checkpoint is None:
        folder = new_run_folder(settings, games)
    else:
        check_same(checkpoint, settings, games=games)
        folder = checkpoint.run_folder
        lock = claim(folder)
        try:
            newest = [checkpoint.folder, *checkpoint.damaged]
            if saved_checkpoints(folder)[-len(newest) :] != newest:
                raise UserError(
                    f"{folder}: another process has gone on with this run meanwhile; type the command again"
                )
            set_damaged_aside(checkpoint)
        except UserError:
            lock.close()
            raise
        remove_leftovers(folder)
        settings.run.output_dir, settings.run.exp_name = str(folder.parent), folder.name
    try:
        return asyncio.run(
            _train(settings, games=games, unseen=unseen, device=device, folder=folder, checkpoint=checkpoint)
        )
    except GameWorkerError as error:
        raise UserError(
            f"the game cannot go on: {error}. If it needs more time, --set env.step_timeout_s="
            f"{10 * settings.env.step_timeout_s:g}; what was learned until the last checkpoint is in {folder}"
        ) from error
    except EngineError as error:
        raise UserError(f"the LLM engine cannot go on: {error}. The run's files are in {folder}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        raise UserError(
            f"{folder}: cannot be written to any more ({error}); put that right, then type --resume {folder}"
        ) from error
    finally:
        if lock is not None:
            lock.close()


async def _train(
    settings: Settings,
    *,
    games: Sequence[GameSpec],
    unseen: Sequence[GameSpec],
    device: torch.device,
    folder: Path,
    checkpoint: Checkpoint | None,
) -> RunSummary:
    run = settings.run
    with_vllm = settings.prior.enabled and settings.prior.engine == "vllm"
    overlap = settings.train.overlap == "always" or (
        settings.train.overlap == "auto" and with_vllm and not settings.vllm.sleep
    )
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    elif with_vllm and device.type == "cpu":
        torch.set_num_threads(cores_for_training())
    # Every random number comes from the one seed, in streams that cannot disturb one another.
    *global_seeds, buffer_seed, collector_seed = np.random.SeedSequence(run.seed).spawn(5)
    seed_globals(global_seeds)
    agent, workers = await _load(settings, games=games, device=device, buffer_seed=buffer_seed, folder=folder)
    policy, buffer, timeline = agent.policy, agent.buffer, agent.timeline
    names = ", ".join(game.name for game in games)
    collector = Collector(
        workers,
        player=agent.player,
        config=agent.config,
        seed=collector_seed,
        groups=2 if overlap else 1,
        num_games=len(games),
    )
    evaluators = Evaluators(settings, games=games, unseen=unseen, player=agent.player)
    saver = Saver(folder, settings, games, policy, buffer, collector, agent.player.indexer, agent.engine)
    counters = {"iteration": 0, "env_step": 0, "train_iter": 0, "llm_version": 0}
    phase, told, before = "collect", None, _fingerprints(policy)
    try:
        lock = begin_files(settings, folder, again=checkpoint is not None)  # from here on there are files
        logger.info(f"{names}, seed {run.seed}, on {device}; everything about this run is in {folder}")
        changed = [
            f"{group}.{key}={value}" for group, own in differences(settings).items() for key, value in own.items()
        ]
        logger.info(f"settings that differ from the defaults: {', '.join(changed) or 'none'}")
        if agent.llm is not None:
            warn_of_long_prompts(agent.llm, settings.llm)
        if checkpoint is not None:
            counters, phase, told, before = await _go_on(saver, agent.dropped, checkpoint)
            if counters["iteration"] >= run.max_iter or counters["env_step"] >= run.max_env_step:
                at = f"iteration {counters['iteration']} of run.max_iter={run.max_iter}"
                step = f"env step {counters['env_step']} of run.max_env_step={run.max_env_step}"
                logger.warning(f"the run was already at its end: {at}, {step}; raise them to go on")
        teller = _Teller(folder, settings, agent, told=told)
    except BaseException:
        await asyncio.gather(*(worker.close() for worker in workers))
        raise
    collected, evaluations = Collected(), dict[str, Evaluation]()
    learning: asyncio.Task[None] | None = None
    stop = StopRequest()

    def finished() -> bool:
        return counters["iteration"] >= run.max_iter or counters["env_step"] >= run.max_env_step

    def store() -> None:
        buffer.push(collected.segments)
        counters["iteration"] += 1
        counters["env_step"] = collector.env_steps

    try:
        if agent.engine is not None and policy.llm_version:
            await agent.engine.sync_weights(policy.llm_version)
        elif agent.engine is not None:
            await agent.engine.ready()
        with stop.handle_signals():
            timeline.discard_interval()
            while not stop.requested and (phase == "evaluate" or not finished()):
                if phase == "collect":
                    # ---- collect: the LLM proposes, UniZero searches, the games answer ----
                    complete = await collector.collect(settings.train.collect_env_steps, stop=lambda: stop.requested)
                    if complete is not None:
                        collected, phase = complete, "store"
                    if learning is not None:
                        await learning
                        learning = None
                    if complete is None:
                        break
                    store()

                    # ---- learn: both models from one sample, then the prior from the new parameters ----
                    phase = "learn"
                    if buffer.get_num_of_transitions() >= settings.train.batch_size:
                        learning = asyncio.create_task(_learn(agent, settings, counters, teller.writer))
                evaluates = finished() or counters["iteration"] % settings.eval.every == 0
                saves = finished() or (run.checkpoint_every > 0 and counters["iteration"] % run.checkpoint_every == 0)
                if phase == "learn":
                    if learning is not None and (evaluates or saves or stop.requested or not overlap):
                        await learning  # otherwise it goes on while the next decisions are made
                    teller.tell(counters, collected, collector)

                # ---- evaluate, save ----
                phase = "evaluate" if evaluates else "collect"
                if evaluates:
                    played = await stop.run_or_cancel(evaluate_all(evaluators))
                    if played is None:  # a search may not have come to its end
                        await agent.world_model_thread.run("search", lambda: None)
                        break
                    evaluations = teller.tell_evaluations(played, env_step=counters["env_step"])
                    phase = "collect"
                    timeline.discard_interval()
                if saves:
                    await saver.save(counters, phase=phase, told=teller.told(before))
            if stop.requested and counters["env_step"] + collector.collected.env_steps:
                await saver.save(counters, phase=phase, told=teller.told(before))
            if run.max_env_step == 0 and not stop.requested:
                played = await stop.run_or_cancel(evaluate_all(evaluators))
                evaluations = teller.tell_evaluations(played, env_step=0) if played is not None else {}
        teller.progress.end()
    except (asyncio.CancelledError, GameWorkerError, EngineError, UserError, OSError) as error:
        await _stop_learning(agent, learning)  # it ends its step first
        if isinstance(error, OSError) and phase in ("store", "learn"):  # cannot be told; the last checkpoint is left
            raise
        if phase == "store":
            store()
        if phase in ("store", "learn"):  # the updates that are missing stay so
            teller.tell(counters, collected, collector)
            phase = "collect"
        if counters["env_step"] + collector.collected.env_steps:
            await saver.save(counters, phase=phase, told=teller.told(before))
            if not saver.failure:
                logger.warning(f"interrupted; what was learned so far is in {saver.last}")
        raise
    finally:
        await _stop_learning(agent, learning)
        await asyncio.gather(*(worker.close() for worker in [*workers, *evaluators.workers]))
        if agent.engine is not None:
            await agent.engine.close()
        teller.writer.close()
        if lock is not None:
            lock.close()
        if run.trace_iterations and timeline.has_trace:
            timeline.write_trace(folder / "trace.json")
    if saver.failure:
        raise UserError(f"the run has ended, but {saver.failure}; the last checkpoint is {saver.last or 'none'}")

    moved = {name: (before[name], prints) for name, prints in _fingerprints(policy).items()}
    rows = {
        "game": names,
        **_count_rows(settings, counters, collector, with_llm=agent.llm is not None),
        **{f"{name} tensors moved": f"{count_moved(a, b)} of {len(a)}" for name, (a, b) in moved.items()},
        **{f"evaluation, {mode}": _describe(evaluation) for mode, evaluation in evaluations.items()},
        "time of the iterations": timeline.total.describe(),
        "peak memory": f"{peak_memory_mb():.0f} MB in this process",
        "wall time": f"{teller.seconds:.0f} s",
        "checkpoint": saver.last or "none (nothing was trained)",
        "charts": f"tensorboard --logdir {run.output_dir}",
    }
    cut = run.max_env_step == 0 and not evaluations
    stopped = stop.requested and (phase == "evaluate" or not finished() or cut)
    logger.info(f"{'stopped' if stopped else 'done'}:\n" + table(rows))
    if stopped and saver.last is not None:
        logger.info(f"to go on: python -m priorzero.entry --resume {folder}")
    return RunSummary(folder, rows, dict(teller.writer.last), evaluations, stopped)


async def _go_on(
    saver: Saver, dropped: DroppedUpdates, checkpoint: Checkpoint
) -> tuple[dict[str, int], str, Plain, Any]:
    """Restore a run: its counters, what comes next, what was told, and what its models were to begin with."""
    for note in checkpoint.notes:
        logger.warning(note)
    state = await saver.restore(checkpoint)
    told = state["told"]
    dropped.load_state_dict(told["dropped"])
    cut_files(saver.run_folder, told["sizes"])
    counted = ", ".join(f"{name} {count}" for name, count in state["counters"].items())
    logger.info(f"goes on from {checkpoint.folder.name}: {counted}")
    return state["counters"], state["phase"], told, told["before"]


async def _learn(agent: Agent, settings: Settings, counters: dict[str, int], writer: MetricsWriter) -> None:
    """An iteration's updates: the world model's, then, when it is its turn, the LLM's.

    The LLM's first update learns from the sample of the world model's last, each further one from a draw of its own.

    Between two updates searches may take their turn. The engine takes over the LLM's new parameters as soon as nobody
    waits for an answer.
    """
    llm_learns = agent.prior is not None and (settings.llm.enable_sft or settings.llm.enable_rft)
    llm_has_its_turn = llm_learns and counters["iteration"] % settings.llm.update_every == 0
    learned: dict[str, float] = {}
    batch: list[Any] = []
    world_model_has_its_turn = counters["iteration"] % settings.train.update_every == 0
    for _ in range(settings.train.update_per_collect if world_model_has_its_turn else 0):
        batch, metrics = await agent.world_model_thread.run(
            "world-model update",
            update_world_model,
            agent.policy,
            agent.buffer,
            agent.dropped,
            batch_size=settings.train.batch_size,
            counters=counters,
        )
        learned.update(metrics)

    if llm_has_its_turn:
        assert agent.prior is not None

        async def update_llm() -> int:
            for n in range(settings.llm.updates_per_turn):
                if n == 0 and batch:
                    drawn = batch[2]
                else:
                    drawn = await agent.world_model_thread.run(
                        "replay", lambda: agent.buffer.sample(settings.train.batch_size, agent.policy)[2]
                    )
                learned.update(await agent.llm_thread.run("LLM update", _update_llm, agent, drawn))
            counters["llm_version"] = agent.policy.llm_version
            return agent.policy.llm_version

        await agent.prior.learn(update_llm)
    losses = [learned[name] for name in ("train/wm_total_loss", "train/llm_loss") if name in learned]
    if losses:
        learned["train/total_loss"] = sum(losses)
    learned["train/updates_left_out"] = float(agent.dropped.total)
    writer.write(learned, step=counters["train_iter"])


def update_world_model(
    policy: PriorZeroPolicy,
    buffer: PriorZeroGameBuffer,
    dropped: DroppedUpdates,
    *,
    batch_size: int,
    counters: dict[str, int],
) -> tuple[list[Any], dict[str, float]]:
    """One update from one draw; returns the draw and the metrics, none if the update was left out.

    Raises:
        UserError: too many updates in a row were left out.
    """
    if not policy.features_are_fitted:
        policy.fit_features(buffer.features())
    batch = buffer.sample(batch_size, policy)
    try:
        metrics = policy.learn_world_model(batch, train_iter=counters["train_iter"])
    except NonFiniteError as error:
        dropped.dropped("world model", error, records=batch[2].records(), arrays=plain_batch(batch))
        return batch, {}
    counters["train_iter"] += 1
    dropped.applied("world model")
    buffer.update_priority(batch, metrics.pop("priorities"))
    return batch, metrics


def _update_llm(agent: Agent, drawn: SampledSegments) -> dict[str, float]:
    try:
        metrics = agent.policy.learn_llm(drawn)
    except NonFiniteError as error:
        agent.dropped.dropped("LLM", error, records=drawn.records(), arrays={})
        return {}
    agent.dropped.applied("LLM")
    return metrics


async def _stop_learning(agent: Agent, learning: asyncio.Task[None] | None) -> None:
    """Let the step that runs come to its end, so that the parameters are whole, and begin no other."""
    if learning is not None:
        learning.cancel()
        await asyncio.wait([learning])
        if not learning.cancelled():
            learning.exception()  # taken note of: the run ends for another reason, or for this one, raised elsewhere
    agent.world_model_thread.close()
    agent.llm_thread.close()


def _fingerprints(policy: PriorZeroPolicy) -> dict[str, dict[str, int]]:
    """Of everything that learns; buffers such as running means do not count."""
    prints = {"world model": fingerprint(dict(policy.trained_world_model_parameters()))}
    if policy.llm_learner is not None:
        llm = policy.llm_learner.llm.model
        prints["LLM"] = fingerprint({name: p for name, p in llm.named_parameters() if p.requires_grad})
    return prints


def buffer_scalars(buffer: PriorZeroGameBuffer) -> dict[str, float]:
    """Metrics of what is stored."""
    return {
        "buffer/decisions": float(buffer.get_num_of_transitions()),
        "buffer/segments": float(buffer.get_num_of_game_segments()),
        "buffer/evicted": float(buffer.num_evicted),
    }


class _Teller(Teller):
    """Tells what the loop of this module does."""

    def __init__(self, folder: Path, settings: Settings, agent: Agent, *, told: Plain | None) -> None:
        """``told``: what a run that goes on had told before."""
        super().__init__(folder, settings, told=told)
        self.agent = agent

    def told(self, before: Any) -> Plain:
        """What was told so far; ``before``: the models' fingerprints when the run began."""
        return {**self.state_dict(), "before": before, "dropped": self.agent.dropped.state_dict()}

    def tell(self, counters: dict[str, int], collected: Collected, collector: Collector) -> None:
        """What an iteration brought."""
        iteration, writer, agent = counters["iteration"], self.writer, self.agent
        writer.write(collector.scalars(collected), step=iteration)
        writer.write(buffer_scalars(agent.buffer), step=iteration)
        if agent.prior is not None:
            self.tell_prior(agent.prior.take_statistics(), iteration=iteration)
        shares = agent.timeline.finish_interval()
        writer.write({**shares.scalars(), "memory/peak_mb": peak_memory_mb()}, step=iteration)
        logger.debug(f"iteration {iteration}, {shares.wall:.1f} s: {shares.describe()}")
        _log_segments(collected, iteration)
        self.tell_episodes(collected.episodes)
        self.show(counters)

    def tell_evaluations(
        self, played: dict[tuple[str, bool], dict[str, Evaluation]], *, env_step: int
    ) -> dict[str, Evaluation]:
        evaluations = super().tell_evaluations(played, env_step=env_step)
        if self.agent.prior is not None:
            fallbacks = self.agent.prior.take_statistics()["prior/fallbacks"]
            self.writer.write({"evaluator_step/prior_fallbacks": fallbacks}, step=env_step)
        return evaluations


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


def _count_rows(settings: Settings, counters: dict[str, int], collector: Collector, *, with_llm: bool) -> dict[str, Any]:
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
