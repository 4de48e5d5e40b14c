"""The arguments of a pretraining."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PretrainingPlan:
    """How the language model is trained. The batch size, learning rate and adapters are settings of the group ``llm``.

    Attributes:
        epochs: passes over the training data.
        minutes: stop after this many minutes of training, also if epochs are left; 0: no limit.
        negatives: largest number of other valid actions beside the correct one.
        borrow: a state without the correct action among searched valid actions borrows the others from the states at
            most this many commands away: their commands, and their valid actions if these were searched; 0: never.
        tokens: the decisions whose command is learnt as text. ``unsearched``: those without the correct action among
            searched valid actions; ``all``: all; ``none``.
        warmup: share of the training in which the learning rate rises.
        decay: how it falls afterwards: ``cosine``, ``linear``, or ``none``.
        final_rate: the learning rate at the end, as a share of the largest one.
        evaluations: number of evaluations during the training, besides those before and after it.
        eval_states: largest number of states of a game in an evaluation.
        save_every: minutes between saved training states.
        seed: of the order of the samples and of the negatives.
        num_workers: processes that render prompts; 0: this one.
    """

    epochs: int = 2
    minutes: float = 0.0
    negatives: int = 15
    borrow: int = 0
    tokens: Literal["unsearched", "all", "none"] = "unsearched"
    warmup: float = 0.05
    decay: Literal["cosine", "linear", "none"] = "cosine"
    final_rate: float = 0.05
    evaluations: int = 3
    eval_states: int = 30
    save_every: float = 5.0
    seed: int = 0
    num_workers: int = 0

    def rate(self, progress: float) -> float:
        """The learning rate as a share of the largest one. ``progress`` is the share of the training that is done."""
        if progress < self.warmup:
            return max(0.02, progress / self.warmup)
        if self.decay == "none":
            return 1.0
        rest = min(1.0, (progress - self.warmup) / max(1e-9, 1.0 - self.warmup))
        falling = 0.5 * (1.0 + math.cos(math.pi * rest)) if self.decay == "cosine" else 1.0 - rest
        return self.final_rate + (1.0 - self.final_rate) * falling
