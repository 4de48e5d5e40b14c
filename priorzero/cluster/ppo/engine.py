"""The interface between the training loop and whatever runs PPO for the LLM."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from priorzero.cluster.ppo.trajectories import Trajectory
from priorzero.cluster.restart import Restartable

# Sends the LLM's parameters to all prior servers: called with a version and Ray's reference to the parameters.
SendParameters = Callable[[int, Any], Awaitable[None]]


@dataclass(frozen=True)
class PPOResult:
    """The metrics of a PPO step, under ``ppo/`` and ``train/``."""

    metrics: dict[str, float]
    nonfinite: str = ""  # what was not finite, if the step was skipped for this reason


class PPOEngine(Restartable, Protocol):
    """Learns from trajectories and publishes its parameters.

    A call that fails because a process died or did not reply in time raises :class:`~priorzero.types.ProcessError`.
    ``resumable`` means that :meth:`load` restores everything, so that steps can be replayed after a crash.
    """

    resumable: bool

    async def ppo_step(self, trajectories: Sequence[Trajectory], step_id: int) -> PPOResult:
        """One PPO step. A call with the ``step_id`` of the last step changes nothing and returns the same result."""
        ...

    async def publish(self) -> int:
        """Send the current actor to all prior servers; returns its version when all of them serve it."""
        ...

    async def export(self, folder: Path) -> None:
        """Write the actor in ``save_pretrained`` form, for ``llm.path``."""
        ...
