"""The interface between the training loop and whatever runs PPO for the LLM."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from priorzero.cluster.ppo.trajectories import Trajectory

# Sends the LLM's parameters to all prior servers: called with a version and Ray's reference to the parameters.
SendParameters = Callable[[int, Any], Awaitable[None]]


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do.

    Attributes:
        advantages_over_turns: advantages are estimated along the decisions of an episode; otherwise each decision is an
            episode of its own, whose reward is its discounted return.
        valid_actions_only: the policy is the prior over a state's valid actions; otherwise it is over all texts.
        drops_stale_samples: decisions older than ``ppo.max_staleness`` are skipped and counted.
        resumable: :meth:`PPOEngine.load` restores everything, so that steps can be replayed after a crash.
        needs_gpu: it does not run on CPUs.
    """

    advantages_over_turns: bool
    valid_actions_only: bool
    drops_stale_samples: bool
    resumable: bool
    needs_gpu: bool


@dataclass(frozen=True)
class PPOResult:
    """The result of a PPO step.

    Attributes:
        metrics: metrics under ``ppo/`` and ``train/``.
        nonfinite: what was not finite, if the step was skipped for this reason; otherwise "".
    """

    metrics: dict[str, float]
    nonfinite: str = ""


class PPOEngine(Protocol):
    """Learns from trajectories and publishes its parameters.

    A call that fails because a process died or did not reply in time raises :class:`~priorzero.types.ProcessError`.
    After :meth:`kill` and :meth:`start` the engine can be used again.
    """

    capabilities: Capabilities

    async def start(self) -> None:
        """Start the processes and load the LLM."""
        ...

    async def ppo_step(self, trajectories: Sequence[Trajectory], step_id: int) -> PPOResult:
        """One PPO step. A call with the ``step_id`` of the last step changes nothing and returns the same result."""
        ...

    async def publish(self) -> int:
        """Send the current actor to all prior servers; returns its version when all of them serve it."""
        ...

    async def save(self, folder: Path) -> None:
        """Write everything that the next step depends on. The folder is complete or not there.

        Raises:
            OSError: it cannot be written.
        """
        ...

    async def load(self, folder: Path) -> None:
        """The inverse of :meth:`save`."""
        ...

    async def export(self, folder: Path) -> None:
        """Write the actor in ``save_pretrained`` form, for ``llm.path``."""
        ...

    async def kill(self) -> None:
        """Kill all processes of the engine."""
        ...
