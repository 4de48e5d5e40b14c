"""Counters of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from priorzero.settings import RunSettings


@dataclass
class Counters:
    """How far a run is."""

    iteration: int = 0  # collect, then learn
    env_step: int = 0
    train_iter: int = 0  # world-model updates
    llm_version: int = 0  # LLM updates

    def is_finished(self, run: RunSettings) -> bool:
        """Whether ``run.max_iter`` or ``run.max_env_step`` is reached."""
        return self.iteration >= run.max_iter or self.env_step >= run.max_env_step

    def is_due(self, every: int) -> bool:
        """Whether something that happens every ``every`` iterations is due in this one; never if ``every`` is 0."""
        return every > 0 and self.iteration % every == 0

    def as_dict(self) -> dict[str, int]:
        """Name to count."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """All counts in one line."""
        return ", ".join(f"{name} {count}" for name, count in self.as_dict().items())
