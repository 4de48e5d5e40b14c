"""What earlier episodes of a game taught about its rooms, for the LLM's prompt (``llm.memory_lines``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from priorzero.types import Attempt, GameState, HistoryStep

MAX_OUTCOMES = 1000  # of a game; the ones that were observed the longest time ago are removed


@dataclass(frozen=True)
class GameMemory:
    """The actions that earned points or lost the game in the episodes of one game that have ended.

    It is the idea of MC-DML's cross-trial memory (Shi et al. 2025), without texts that an LLM writes. Objects are not
    changed: an episode keeps the memory with which it began, so what other episodes teach does not change its prompts.

    Attributes:
        outcomes: (room, action) -> the most points that the action earned there, and whether it lost the game there;
            the latest observation last.
    """

    outcomes: dict[tuple[str, str], tuple[float, bool]] = field(default_factory=dict)

    def after_episode(self, history: Sequence[HistoryStep], state: GameState) -> GameMemory:
        """The memory after one more episode, which ended in ``state`` after the decisions in ``history``."""
        outcomes = dict(self.outcomes)
        is_lost = state.terminated and not state.won
        for t, step in enumerate(history, start=1):
            loses = is_lost and t == len(history)
            if step.reward > 0 or loses:
                points, has_lost = outcomes.pop((step.room, step.action), (0.0, False))
                outcomes[step.room, step.action] = max(points, step.reward), has_lost or loses
        return GameMemory(dict(list(outcomes.items())[-MAX_OUTCOMES:]))

    def attempts(self, state: GameState, *, limit: int) -> list[Attempt]:
        """What is known about the valid actions of a state in its room, at most ``limit`` actions.

        Actions that earned points come first, the most points before, then those that lost the game. Equal ones are in
        the order of the valid actions.
        """
        known = [
            Attempt(action, *self.outcomes[state.room, action])
            for action in state.valid_actions
            if (state.room, action) in self.outcomes
        ]
        return sorted(known, key=lambda attempt: -attempt.points)[:limit]
