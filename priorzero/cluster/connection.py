"""Before a run on a cluster: checks of the settings, and the connection to Ray."""

from __future__ import annotations

import logging
import os
import re
import socket

import ray

from priorzero.cluster.ppo.orz_engine import check_orz
from priorzero.config import differences
from priorzero.settings import Settings
from priorzero.types import UserError

# Settings of the single process that have no effect on a cluster.
UNUSED_SETTINGS = {
    "run": ("trace_iterations",),
    "train": ("overlap",),
    "vllm": ("sync_every", "max_staleness"),
    "llm": (
        *("updates_per_turn", "enable_sft", "enable_rft", "rft_clip", "rft_baseline"),
        *("llm_loss_weight", "rft_loss_weight"),
    ),
}


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
    if settings.ppo.sharding == "fsdp" and settings.llm.use_lora:
        raise UserError("ppo.sharding=fsdp does not support llm.use_lora=true; type --set ppo.sharding=ddp")
    if settings.run.max_env_step == 0:
        raise UserError("run.max_env_step=0 only evaluates; type python -m priorzero.entry instead")
    if settings.ppo.engine == "orz":
        check_orz(settings)
    changed = differences(settings)
    unused = [
        f"{group}.{key}" for group, keys in UNUSED_SETTINGS.items() for key in keys if key in changed.get(group, {})
    ]
    if unused:
        raise UserError(
            f"these settings have no effect on a cluster, where PPO trains the LLM: {', '.join(unused)}; leave them out"
        )


def connect(settings: Settings, *, namespace: str) -> None:
    """Connect to the cluster at ``cluster.address``, or start one on this machine.

    Args:
        settings: all settings.
        namespace: Ray's namespace of the run, in which its processes find each other by name.

    Raises:
        UserError: there is no cluster at this address.
    """
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
    try:
        if address:
            ray.init(address=address, namespace=namespace, logging_level=logging.ERROR)
        else:
            ray.init(address="local", namespace=namespace, include_dashboard=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"cluster.address={address}" if address else "Ray could not be started on this machine"
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error
