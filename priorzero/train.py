"""Training in one process. :func:`training_loop` is the loop: collect, learn, evaluate, save."""

from __future__ import annotations

import asyncio
import functools

import numpy as np
import torch

from priorzero.agent import make_agent, make_evaluators, set_num_threads, start_workers
from priorzero.llm.engine_choice import choose_engine
from priorzero.llm.models import choose_device
from priorzero.play.collector import Collector
from priorzero.preflight import Preparation, prepare
from priorzero.runs.checkpoint import Checkpoint
from priorzero.runs.errors import reported_to_user
from priorzero.runs.progress import terminal_output
from priorzero.runs.summary import RunSummary
from priorzero.runtime.concurrency import check_no_running_loop, only_run_of_process
from priorzero.runtime.memory import release_memory
from priorzero.runtime.random_state import seed_globals
from priorzero.settings import Settings
from priorzero.training_run import TrainingRun
from priorzero.types import EngineError, GameWorkerError, UserError

# After these, what was learned is saved.
ERRORS = (asyncio.CancelledError, GameWorkerError, EngineError, UserError, OSError, torch.OutOfMemoryError)


def run_training(settings: Settings, *, checkpoint: Checkpoint | None = None) -> RunSummary:
    """Train with these settings.

    Ctrl-C, SIGTERM and the signals of batch systems stop the run: it finishes its step, saves a checkpoint and returns.
    Outside the main thread it does not handle signals.

    Args:
        settings: all settings, from :func:`priorzero.config.resolve_settings`.
        checkpoint: the run is resumed from it; None starts a new run.

    Raises:
        UserError: an error that the user can correct; before anything was written if possible.
    """
    check_no_running_loop("run_training_async(settings)")
    with terminal_output(), prepare(settings, checkpoint=checkpoint) as prepared:
        return run_prepared(prepared)


async def run_training_async(settings: Settings, *, checkpoint: Checkpoint | None = None) -> RunSummary:
    """:func:`run_training` in the event loop of the caller, for example in a notebook.

    If the task is cancelled, the run finishes its update, saves a checkpoint and raises CancelledError.
    """
    with terminal_output(), prepare(settings, checkpoint=checkpoint) as prepared:
        return await _run_prepared(prepared)


def run_prepared(prepared: Preparation) -> RunSummary:
    """Train, inside the block of :func:`priorzero.preflight.prepare`; see :func:`run_training`."""
    return asyncio.run(_run_prepared(prepared))


async def _run_prepared(prepared: Preparation) -> RunSummary:
    settings = prepared.settings
    device = choose_device(settings.run.device)
    if settings.prior.enabled:
        settings.prior.engine = choose_engine(settings, device=device.type)
    with only_run_of_process(), reported_to_user(prepared.folder, settings):
        return await _train(prepared, device=device)


async def training_loop(run: TrainingRun, *, overlap: bool) -> None:
    """Train until the run is finished or a stop is requested.

    With ``overlap`` both models learn during the next collection, otherwise before it.
    """
    while True:
        # ---- evaluate and save, if due. This comes first because a run can be resumed here ----
        if run.evaluation_due:
            await run.evaluate()
        if run.save_due:
            await run.save()
        if run.is_finished or run.stop.requested:
            break

        # ---- collect: the LLM computes priors, UniZero searches, the games reply ----
        collected = await run.collect()
        await run.learner.wait()  # for the updates of the previous iteration
        if collected is None:
            break
        run.store(collected)

        # ---- learn: both models from one sample; then the prior engine gets the new parameters ----
        run.learner.start()
        run.set_due()
        if run.evaluation_due or run.save_due or run.stop.requested or not overlap:
            await run.learner.wait()
        run.log(collected)
    if run.stop.requested:
        await run.save()


async def _train(prepared: Preparation, *, device: torch.device) -> RunSummary:
    """Build everything, run the loop, and close everything. After an error, what was learned is saved."""
    settings, games, folder = prepared.settings, prepared.games, prepared.folder
    workers = prepared.workers
    set_num_threads(settings, device=device)
    # All random numbers come from one seed, in independent streams.
    *global_seeds, buffer_seed, collector_seed = np.random.SeedSequence(settings.run.seed).spawn(5)
    seed_globals(global_seeds)
    load = functools.partial(
        make_agent, settings, device=device, buffer_seed=buffer_seed, vllm_log=folder / "log" / "vllm.log"
    )
    agent = await start_workers(workers, meanwhile=load)
    overlap = _overlaps(settings)
    collector = Collector(
        workers,
        player=agent.player,
        seed=collector_seed,
        groups=2 if overlap else 1,
        games=[game.name for game in games],
        best_episodes=agent.best_episodes,
    )
    evaluators = make_evaluators(settings, games=games, unseen=prepared.unseen, player=agent.player)
    run = TrainingRun(
        settings,
        games=games,
        agent=agent,
        collector=collector,
        evaluators=evaluators,
        folder=folder,
        checkpoint=prepared.checkpoint,
    )
    try:
        await run.begin()
        with run.stop.handle_signals():
            await training_loop(run, overlap=overlap)
    except ERRORS as error:
        release_memory(error)
        with run.stop.handle_signals():
            await run.save_after(error)
        raise
    finally:
        await run.learner.stop()
        await asyncio.gather(*(worker.close() for worker in [*workers, *evaluators.workers]))
        await run.close()
    return run.summary()


def _overlaps(settings: Settings) -> bool:
    """Whether collection continues while both models learn."""
    uses_vllm = settings.prior.enabled and settings.prior.engine == "vllm"
    automatic = uses_vllm and not settings.vllm.sleep
    return settings.train.overlap == "always" or (settings.train.overlap == "auto" and automatic)
