"""How the CPUs and GPUs of the cluster are divided among the processes of a run."""

from __future__ import annotations

from dataclasses import dataclass

from priorzero.settings import Settings
from priorzero.types import UserError


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
    and the collectors share the others.

    Args:
        settings: all settings.
        cpus: number of CPUs of the cluster.
        gpus: number of GPUs of the cluster. Without a GPU, everything runs on CPUs.

    Raises:
        UserError: ``run.device=cuda`` without a GPU, or two learners would have to share one.
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
