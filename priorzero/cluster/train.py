"""Training on a Ray cluster: UniZero as in :mod:`priorzero.train`, the LLM by PPO. :func:`training_loop` is the loop.

Collectors play all the time, each with the parameters that were the latest when it was started. An iteration is the
result of one collector. The world model learns every ``train.update_every`` iterations, the LLM every
``llm.update_every``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from loguru import logger
from ray.exceptions import RayError, RayTaskError

from priorzero.cluster.connection import check_game_packages, check_settings, connect, fail_if_ended, plan_resources
from priorzero.cluster.run import ClusterRun
from priorzero.envs import resolve_games
from priorzero.envs.limits import check_step_names, resolve_limits
from priorzero.preflight import check_game_names, check_games
from priorzero.runs.errors import reported_to_user
from priorzero.runs.folder import create_files, new_run_folder
from priorzero.runs.logger import log_start
from priorzero.runs.loggers import check_loggers
from priorzero.runs.progress import terminal_output
from priorzero.runs.summary import RunSummary
from priorzero.runtime.activity import announced
from priorzero.runtime.concurrency import (
    called_at_exit,
    check_no_running_loop,
    only_run_of_process,
    run_unless,
)
from priorzero.settings import Settings
from priorzero.types import EngineError, GameWorkerError, ProcessError, UserError


def run_on_cluster(settings: Settings) -> RunSummary:
    """Train on the Ray cluster at ``cluster.address``, or on one that is started here and ends with the run.

    Ctrl-C, SIGTERM and the signals of batch systems stop the run: it finishes its step, saves a checkpoint and returns.
    Outside the main thread it does not handle signals. A UserError is raised before anything was written if possible.
    """
    check_no_running_loop("run_on_cluster_async(settings)")
    with _connected(settings) as prepared:
        return asyncio.run(_train(prepared))


async def run_on_cluster_async(settings: Settings) -> RunSummary:
    """:func:`run_on_cluster` in the event loop of the caller, for example in a notebook.

    If the task is cancelled, the run saves a checkpoint and raises CancelledError.
    """
    with _connected(settings) as prepared:
        return await _train(prepared)


@dataclass(frozen=True)
class _Prepared:
    """A run whose settings were checked.

    Attributes:
        settings: a copy of all settings.
        games: the names of the games.
        folder: the run's, which exists and is locked.
        ray_processes: those of Ray without which the run cannot continue, if they were started here.
    """

    settings: Settings
    games: str
    folder: Path
    ray_processes: Sequence[psutil.Process]


@contextlib.contextmanager
def _connected(settings: Settings) -> Iterator[_Prepared]:
    """Check the settings, and connect to Ray within the block. Errors that the user can correct become UserError."""
    with only_run_of_process(), terminal_output():
        settings = settings.model_copy(deep=True)
        check_game_names(settings)
        check_loggers(settings.run)
        with announced("preparing the games"):
            games, unseen = resolve_games(settings.run.env_id), resolve_games(settings.eval.unseen)
        check_game_packages((*games, *unseen))
        check_games(settings, games=games, unseen=unseen)
        check_step_names(settings.env, (*games, *unseen))
        resolve_limits(settings.env, games, unseen=unseen)
        check_settings(settings)
        with new_run_folder(settings, games) as new_folder:
            folder = new_folder.absolute()  # other processes may have another working directory
            settings.run.output_dir = str(folder.parent)
            with announced("connecting to the Ray cluster" if settings.cluster.address else "starting Ray"):
                ray_processes = connect(settings, namespace=f"priorzero-{folder.name}-{os.getpid()}")
            try:
                with reported_to_user(folder, settings, resumable=False):
                    yield _Prepared(settings, ", ".join(game.name for game in games), folder, ray_processes)
            except (ProcessError, RayError) as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                raise UserError(f"{' '.join(str(cause).split())[-500:]}; the run's files are in {folder}") from error
            finally:
                ray.shutdown()


async def training_loop(run: ClusterRun) -> None:
    """Train until the run is finished or a stop is requested."""
    if run.settings.eval.at_start:
        await run.evaluate(0)
    run.collectors.start_all()
    while not run.is_finished:
        # ---- collect: wait for the first collector that finishes ----
        result = await run.collect()
        if result is None:
            break
        await run.store(result)

        # ---- learn: both models at the same time, each if it is due ----
        await run.learn()
        await run.log(result.report)

        # ---- evaluate and save, if due; then the collector continues with the latest parameters ----
        if run.is_finished or run.counters.is_due(run.settings.eval.every):
            await run.evaluate(result.collector)
        if run.counters.is_due(run.settings.run.checkpoint_every):
            await run.save()
        if not run.is_finished:
            run.collectors.start(result.collector, wait_until_ready=True)
    await run.save()


async def _train(prepared: _Prepared) -> RunSummary:
    """Start all processes, run the loop, and end all processes. After an error, what was learned is saved."""
    settings, games, folder = prepared.settings, prepared.games, prepared.folder
    resources = ray.cluster_resources()
    plan = plan_resources(settings, cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0))
    create_files(settings, folder)
    log_start(settings, games=games, where="a Ray cluster", folder=folder)
    logger.info("; ".join(f"{role}: {share.num_cpus:g} CPU, {share.num_gpus:g} GPU" for role, share in plan.items()))
    run = ClusterRun(settings, games=games, plan=plan, folder=folder)
    try:
        # A stop signal ends the process at once while it starts. Nothing in the folder is worth keeping then.
        with called_at_exit(functools.partial(shutil.rmtree, folder, ignore_errors=True)):
            await run.start()
        with run.stop.handle_signals():
            await run_unless(fail_if_ended(prepared.ray_processes), training_loop(run))
    except (asyncio.CancelledError, GameWorkerError, EngineError, ProcessError, RayError, UserError) as error:
        with run.stop.handle_signals():
            await run.save_after(error)
        raise
    finally:
        await run.close()
    return run.summary()
