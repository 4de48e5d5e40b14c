"""Counts of actions and feedback in a game, and the reward shaping that uses them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from priorzero.settings import TrainSettings
from priorzero.types import GameState, Plain


@dataclass
class NoveltyCounts:
    """How often each action was taken in each room with each score, and how often the game gave each feedback.

    There is one object for each game of a run, since rooms of different games may have the same name.
    """

    actions: Counter[tuple[str, float, str]] = field(default_factory=Counter)
    feedback: Counter[str] = field(default_factory=Counter)

    def add_action(self, before: GameState, action: str) -> None:
        """Count an action, which may have no outcome, because the game failed."""
        self.actions[before.room, before.score, action] += 1

    def add(self, *, before: GameState, action: str, after: GameState, with_feedback: bool) -> None:
        """Count a step. The last feedback of a game is not counted: it contains the number of turns, so it is new."""
        self.add_action(before, action)
        if with_feedback and not after.terminated:
            self.feedback[after.feedback] += 1

    def state_dict(self) -> Plain:
        return {
            "actions": [(*key, count) for key, count in self.actions.items()],
            "feedback": list(self.feedback.items()),
        }

    def load_state_dict(self, state: Plain) -> None:
        self.actions = Counter({(room, score, action): count for room, score, action, count in state["actions"]})
        self.feedback = Counter(dict(state["feedback"]))


def shaped_reward(
    counts: NoveltyCounts, *, before: GameState, action: str, after: GameState, cfg: TrainSettings
) -> float:
    """The addition to the world model's reward for a step that has been counted, in points.

    The addition is ``novelty_bonus / sqrt(N)``, minus ``loss_penalty`` if the step loses the game. With
    ``novelty_of=action``, N is the count of the action in its room with its score (MBIE-EB, Strehl & Littman 2008,
    section 3.2). With ``novelty_of=feedback``, N is the count of the game's feedback (Yuan et al. 2018, "Counting to
    explore and generalize in text-based games"), and the last feedback of a game gets no bonus.
    """
    if cfg.novelty_of == "action":
        bonus = cfg.novelty_bonus / math.sqrt(counts.actions[before.room, before.score, action])
    elif after.terminated:
        bonus = 0.0
    else:
        bonus = cfg.novelty_bonus / math.sqrt(counts.feedback[after.feedback])
    return bonus - (cfg.loss_penalty if after.terminated and not after.won else 0.0)
