"""What each part of a run asks Ray for, from what the cluster has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from priorzero.types import UserError


@dataclass(frozen=True)
class Share:
    """CPUs and GPUs that Ray sets aside for one process; fractions of a GPU share it."""

    num_cpus: float
    num_gpus: float


def plan_resources(settings: Any, *, cpus: float, gpus: float) -> dict[str, Share]:
    """The share of each process of a role: ``collector``, ``server``, ``world_model``, ``learner``.

    A CPU each, if there are enough; otherwise none is set aside, and the processes share what there is. With fewer GPUs
    than processes that want one, they share: servers and learners get nine tenths in equal parts, the world model and
    the collectors the rest. With enough GPUs each server and each learner has its own, as does the world model; the
    collectors search on what is left over.

    Args:
        settings: all settings.
        cpus: of the cluster.
        gpus: of the cluster; 0: all on CPUs.

    Raises:
        UserError: a GPU was asked for (``run.device=cuda``), and there is none.
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
    large = cluster.num_servers + cluster.num_learners
    if gpus >= large + 1:
        spare = gpus - large - 1
        of_collectors = min(1.0, spare / cluster.num_collectors) if spare else 0.0
        shares = {"collector": _cut(of_collectors), "server": 1.0, "world_model": 1.0, "learner": 1.0}
    else:
        # Whole processes must fit onto each GPU: so many of the large ones share one.
        side_by_side = -(-large // int(gpus))
        small = cluster.num_collectors + 1
        shares = {
            "server": _cut(0.9 / side_by_side),
            "learner": _cut(0.9 / side_by_side),
            "world_model": _cut(0.1 * int(gpus) / small),
            "collector": _cut(0.1 * int(gpus) / small),
        }
    return {role: Share(num_cpus, shares[role]) for role in counts}


def _cut(share: float) -> float:
    """Down to a thousandth, so that the sum stays below one."""
    return int(share * 1000) / 1000
