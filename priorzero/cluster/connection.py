"""Before a run on a cluster: checks of the settings, the connection to Ray, and the division of its CPUs and GPUs."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil
import ray
import torch

from priorzero.cluster.calls import NodeEndedError
from priorzero.config import differences
from priorzero.envs import GameSpec
from priorzero.runtime.signals import children_ignore_stop_signals
from priorzero.settings import Settings
from priorzero.types import ProcessError, UserError

MIN_FREE = 100_000_000  # bytes in Ray's folder: its logs take some MB per process
WATCH_S = 1.0  # between two looks at Ray's processes
OTHER_FOLDER = "give another one with a short path, for example RAY_TMPDIR=/tmp"

# Settings of the single process that have no effect on a cluster.
UNUSED_SETTINGS = {
    "run": ("trace_iterations",),
    "train": ("overlap",),
    "vllm": ("sync_every", "max_staleness"),
    "llm": (
        *("updates_per_turn", "enable_sft", "enable_rft", "rft_clip", "rft_baseline"),
        *("llm_loss_weight", "rft_loss_weight", "imitation_share"),
    ),
}


def check_game_packages(games: Sequence[GameSpec]) -> None:
    """Raise a UserError if a game was registered in this process only, since other processes do not know it."""
    for game in games:
        if game.request is not None and game.request.game.source == "register_game":
            raise UserError(
                f"{game.env_id}: the game was registered by register_game in this process. The processes of a cluster "
                "know only games of installed packages: add an entry point in the group priorzero.games to a package, "
                "and install it on all machines"
            )


def check_settings(settings: Settings) -> None:
    """Raises UserError if PPO cannot learn with these settings, or if its engine is not available."""
    if not settings.prior.enabled:
        raise UserError(
            "prior.enabled=false: PPO has no LLM to train; to train UniZero alone, type python -m priorzero.entry "
            "--preset pure_unizero"
        )
    if settings.prior.mode != "score" or settings.llm.objective == "tokens":
        raise UserError(
            "PPO trains the prior over the valid actions; type --set prior.mode=score --set llm.objective=actions"
        )
    if settings.prior.use_cot:
        raise UserError(
            "prior.use_cot=true: PPO trains a prior that depends on the prompt alone; type --set prior.use_cot=false"
        )
    if settings.ppo.sharding == "fsdp" and settings.llm.use_lora:
        raise UserError("ppo.sharding=fsdp does not support llm.use_lora=true; type --set ppo.sharding=ddp")
    if settings.run.max_env_step == 0:
        raise UserError("run.max_env_step=0 only evaluates; type python -m priorzero.entry instead")
    if settings.ppo.engine == "orz":
        _check_orz(settings)
    changed = differences(settings)
    unused = [
        f"{group}.{key}" for group, keys in UNUSED_SETTINGS.items() for key in keys if key in changed.get(group, {})
    ]
    if unused:
        raise UserError(
            f"these settings have no effect on a cluster, where PPO trains the LLM: {', '.join(unused)}; leave them out"
        )


def _check_orz(settings: Settings) -> None:
    if settings.ppo.credit != "none" or settings.llm.use_lora or settings.llm.adapter:
        raise UserError(
            "ppo.engine=orz needs ppo.credit=none, llm.use_lora=false and no llm.adapter: its trainer has neither "
            "sample weights nor adapters"
        )
    longest = settings.env.longest_episode
    if settings.replay.segment_length < longest:
        raise UserError(
            "ppo.engine=orz needs whole episodes for its returns: "
            f"replay.segment_length={settings.replay.segment_length} must be at least "
            f"env.max_episode_steps={settings.env.max_episode_steps}; type --set replay.segment_length={longest}"
        )
    try:
        found = importlib.util.find_spec("orz.ppo.trainer")
    except ModuleNotFoundError:  # orz is not installed, or it is another package of this name
        found = None
    if found is None:
        raise UserError(
            "ppo.engine=orz: orz.ppo.trainer cannot be imported; get "
            "https://github.com/Open-Reasoner-Zero/Open-Reasoner-Zero, type pip install -e . in it (it needs Python "
            "3.10, vllm 0.6.5, ray 2.40, deepspeed and CUDA), or type --ppo_engine torch"
        )
    if not torch.cuda.is_available():
        raise UserError(
            "ppo.engine=orz: torch finds no GPU, and Open-Reasoner-Zero needs CUDA; type --ppo_engine torch"
        )


def connect(settings: Settings, *, namespace: str) -> list[psutil.Process]:
    """Connect to the cluster at ``cluster.address``, or start one on this machine.

    The run's processes find each other by name in Ray's ``namespace``. The processes of a cluster that is started here
    do not react to stop signals.

    Returns:
        The processes of a cluster that is started here without which a run cannot continue.

    Raises:
        UserError: the cluster cannot be reached, Ray cannot be started, or this process uses Ray already.
    """
    if ray.is_initialized():
        raise UserError("this process is already connected to a Ray cluster; call ray.shutdown() before the run")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage report
    address = settings.cluster.address
    host_and_port = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if host_and_port:  # Ray itself would try for minutes
        try:
            socket.create_connection((host_and_port[1], int(host_and_port[2])), timeout=10.0).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cluster.address={address}: cannot connect ({error}); to check the cluster, type ray status"
            ) from error
    if not address:
        _check_ray_folder()
    before = psutil.Process().children()
    try:
        with children_ignore_stop_signals(), _handlers_are_kept():
            if address:
                ray.init(address=address, namespace=namespace, logging_level=logging.ERROR)
            else:
                ray.init(address="local", namespace=namespace, include_dashboard=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises bare exceptions, too
        where = f"cluster.address={address}" if address else "Ray could not be started on this machine"
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}{_advice(error)}") from error
    started = [process for process in psutil.Process().children() if process not in before]
    return [process for process in started if process.name() in ("gcs_server", "raylet")]


async def fail_if_ended(processes: Sequence[psutil.Process]) -> NoReturn:
    """Wait until one of Ray's processes has ended.

    If the GCS has ended, Ray ends this process after 60 s. Until then, the run can be saved.

    Raises:
        ProcessError: always; NodeEndedError if it is the raylet.
    """
    names = {process: process.name() for process in processes}
    while True:
        for process, name in names.items():
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                kind = NodeEndedError if name == "raylet" else ProcessError
                raise kind(f"Ray's {name} has ended, without which a run cannot continue")
        await asyncio.sleep(WATCH_S)


def ray_folder() -> Path:
    """The folder of Ray's logs, sockets and spilled objects on this machine."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def _check_ray_folder() -> None:
    """Raise UserError if :func:`ray_folder` cannot be written or is full: Ray's processes would die one by one."""
    folder = ray_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"Ray's folder {folder} cannot be written ({error}); {OTHER_FOLDER}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"Ray's folder {folder} cannot be written; {OTHER_FOLDER}")
    if free < MIN_FREE:
        raise UserError(
            f"Ray's folder {folder}: {free / 1e6:.0f} MB are free, but Ray needs at least {MIN_FREE / 1e6:.0f} MB; "
            f"free some space, or {OTHER_FOLDER}"
        )


def _advice(error: Exception) -> str:
    """What to do about an error of ``ray.init``."""
    text = str(error)
    if "AF_UNIX path length" in text:
        return f". Ray's folder is {ray_folder()}; {OTHER_FOLDER}"
    if "Version mismatch" in text:
        return ". Use the same versions of Ray and Python in the whole cluster"
    if "timed out during startup" in text:
        return (
            f". Ray's logs are in {ray_folder() / 'session_latest' / 'logs'}. Limits of memory, processes or open "
            "files may be too low; to list them, type ulimit -a"
        )
    return ""


@contextlib.contextmanager
def _handlers_are_kept() -> Iterator[None]:
    """Ray installs a handler of SIGTERM, which would replace that of the command line."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)


@dataclass(frozen=True)
class Share:
    """CPUs and GPUs that Ray reserves for one process. Several processes can have fractions of one GPU."""

    num_cpus: float
    num_gpus: float


def plan_resources(settings: Settings, *, cpus: float, gpus: float) -> dict[str, Share]:
    """The share of each process, by role: ``collector``, ``server``, ``world_model``, ``learner``.

    Each process gets a CPU if there are enough. Otherwise no CPU is reserved, and the processes share all CPUs.

    If there are fewer GPUs than servers and learners, these share 0.9 of each GPU, and the world model and the
    collectors share the rest. If there are more, each server and each learner has a GPU of its own, and the world model
    and the collectors share the others. Without a GPU, everything runs on CPUs.
    """
    cluster = settings.cluster
    counts = {
        "collector": cluster.num_collectors,
        "server": cluster.num_servers,
        "world_model": 1,
        "learner": cluster.num_learners,
    }
    num_cpus = 1.0 if cpus >= sum(counts.values()) else 0.0
    if gpus < 1 and settings.run.device == "cuda":
        raise UserError("run.device=cuda: the cluster has no GPU; type --set run.device=cpu")
    if gpus < 1 or settings.run.device == "cpu":
        return {role: Share(num_cpus, 0.0) for role in counts}
    gpus = int(gpus)
    large, small = cluster.num_servers + cluster.num_learners, cluster.num_collectors + 1
    if gpus >= large + small:
        shares = dict.fromkeys(counts, 1.0)
    elif gpus > large:
        small_share = _part(1.0, small, gpus - large)
        shares = {"collector": small_share, "server": 1.0, "world_model": small_share, "learner": 1.0}
    else:
        small_share = _part(0.1, small, gpus)
        large_share = _part(0.9, large, gpus)
        shares = {"collector": small_share, "server": large_share, "world_model": small_share, "learner": large_share}
        if cluster.num_learners > 1 and large_share < 0.9:
            raise UserError(
                f"cluster.num_learners={cluster.num_learners}: the PPO learners would have to share GPUs, which nccl "
                f"does not support; with {gpus} GPUs and cluster.num_servers={cluster.num_servers}, type "
                f"--set cluster.num_learners={max(1, gpus - cluster.num_servers)}"
            )
    return {role: Share(num_cpus, shares[role]) for role in counts}


def _part(room: float, processes: int, gpus: int) -> float:
    """The share of each of ``processes``, which use at most ``room`` of each GPU. A share is a part of one GPU."""
    return int(1000 * room / -(-processes // gpus)) / 1000
