"""The contract between a training loop and whatever runs PPO for the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from priorzero.cluster.ppo.trajectories import Trajectory


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do.

    Attributes:
        advantages_over_turns: advantages are estimated along the decisions of an episode; otherwise each decision is an
            episode of its own, whose reward is its discounted return.
        valid_actions_only: the policy is the prior over a state's valid commands; otherwise over all texts.
        drops_stale_samples: it counts and leaves out what is older than ``ppo.max_staleness``.
        resumable: :meth:`PPOEngine.load` brings back everything, so that steps can be made again after a crash.
        needs_gpu: it does not run on CPUs.
    """

    advantages_over_turns: bool
    valid_actions_only: bool
    drops_stale_samples: bool
    resumable: bool
    needs_gpu: bool


class PPOEngine(Protocol):
    """Learns from trajectories and hands its parameters on.

    Calls that fail because a process is gone, or does not answer in time, raise
    :class:`~priorzero.types.ProcessError`; :meth:`kill` and :meth:`start` begin again.
    """

    capabilities: Capabilities

    async def start(self) -> None:
        """Bring it to life, with the LLM as it was loaded."""
        ...

    async def ppo_step(self, trajectories: Sequence[Trajectory], step_id: int) -> dict[str, Any]:
        """One PPO step. The same ``step_id`` again changes nothing and tells the same.

        Returns:
            Scalars under ``ppo/`` and ``train/``, and ``left_out``: why the step was not applied, or "".
        """
        ...

    async def publish(self) -> int:
        """Hand the current actor to everybody who makes priors; returns its version once they all have it."""
        ...

    async def save(self, folder: Path) -> None:
        """Write everything that the next step depends on; the folder is whole or not there.

        Raises:
            OSError: it cannot be written.
        """
        ...

    async def load(self, folder: Path) -> None:
        """Go on from what :meth:`save` wrote."""
        ...

    async def export(self, folder: Path) -> None:
        """Write the actor in ``save_pretrained`` form, for ``llm.path``."""
        ...

    async def kill(self) -> None:
        """End all of its processes at once."""
        ...
