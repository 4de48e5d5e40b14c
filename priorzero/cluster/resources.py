"""What each part of a run asks Ray for, from what the cluster has."""

from __future__ import annotations

from dataclasses import dataclass

from priorzero.settings import Settings
from priorzero.types import UserError


@dataclass(frozen=True)
class Share:
    """CPUs and GPUs that Ray sets aside for one process; fractions of a GPU share it."""

    num_cpus: float
    num_gpus: float


def plan_resources(settings: Settings, *, cpus: float, gpus: float) -> dict[str, Share]:
    """The share of each process of a role: ``collector``, ``server``, ``world_model``, ``learner``.

    A CPU each, if there are enough; otherwise none is set aside, and the processes share what there is. With fewer GPUs
    than servers and learners, these share nine tenths of each, the world model and the collectors the rest. With more,
    each server and each learner has its own, and world model and collectors share the others.

    Args:
        settings: all settings.
        cpus: of the cluster.
        gpus: of the cluster; 0: all on CPUs.

    Raises:
        UserError: a GPU was asked for (``run.device=cuda``), and there is none; or two learners would share one.
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
    elif gpus > large:  # a GPU for each server and learner; the world model and the collectors share the others
        of_small = _part(1.0, small, gpus - large)
        shares = {"collector": of_small, "server": 1.0, "world_model": of_small, "learner": 1.0}
    else:
        of_small = _part(0.1, small, gpus)
        of_large = _part(0.9, large, gpus)
        shares = {"collector": of_small, "server": of_large, "world_model": of_small, "learner": of_large}
        if cluster.num_learners > 1 and of_large < 0.9:
            raise UserError(
                f"cluster.num_learners={cluster.num_learners} would have to share GPUs, and their exchange of "
                f"gradients (nccl) does not allow it: with {gpus} GPUs and cluster.num_servers={cluster.num_servers} "
                f"type --set cluster.num_learners={max(1, gpus - cluster.num_servers)}"
            )
    return {role: Share(num_cpus, shares[role]) for role in counts}


def _part(room: float, processes: int, gpus: int) -> float:
    """The share of one of ``processes``, which fill at most ``room`` of each GPU; a share lies on one GPU."""
    return int(1000 * room / -(-processes // gpus)) / 1000
