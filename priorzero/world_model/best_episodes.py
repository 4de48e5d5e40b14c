"""The best episode of each game, whose decisions the LLM learns to repeat (``llm.imitation_share``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from priorzero.envs.history import loop_free_path
from priorzero.types import GameState, Plain, StepRecord
from priorzero.world_model.records import RecordTable


@dataclass(frozen=True)
class BestEpisode:
    """The best episode of a game: its final score, and the decisions that led to that score, without loops."""

    score: float
    records: list[StepRecord]


class BestEpisodes:
    """The best episode of each game so far, for self-imitation (Oh et al. 2018, "Self-Imitation Learning").

    The best episode has the highest final score; of several, the one with the fewest decisions. An episode's decisions
    end where its score first reached the final score. So points that were lost again, for example by death, do not
    count, nor does what came after the last point. Episodes without points are not stored.

    ``rng`` draws the samples.
    """

    def __init__(self, *, rng: np.random.Generator) -> None:
        self._best: dict[int, BestEpisode] = {}  # number of the game -> its best episode
        self._running: dict[int, list[StepRecord]] = {}  # environment -> decisions of its present episode
        self._rng = rng

    @property
    def records(self) -> list[StepRecord]:
        """All stored decisions, in the order of the games."""
        return [record for game in sorted(self._best) for record in self._best[game].records]

    def add(self, env: int, record: StepRecord) -> None:
        """Add the next decision of environment ``env``. A decision with ``step=0`` begins a new episode."""
        if record.step == 0:
            self._running[env] = []
        self._running[env].append(record)

    def end_episode(self, env: int, state: GameState, *, game: int) -> None:
        """The episode of environment ``env`` has ended in ``state``. It is stored if it is the best of its ``game``."""
        path, best = scoring_path(self._running.pop(env), final=state), self._best.get(game)
        if path and (best is None or (state.score, -len(path)) > (best.score, -len(best.records))):
            self._best[game] = BestEpisode(state.score, path)

    def sample(self, count: int) -> list[StepRecord]:
        """Draw ``count`` different decisions, each with the same probability; all of them if fewer are stored."""
        records = self.records
        drawn = self._rng.choice(len(records), min(count, len(records)), replace=False)
        return [records[n] for n in np.sort(drawn)]  # neighbours share most of their prompts

    def scalars(self) -> dict[str, float]:
        """Metrics under ``buffer/``."""
        return {"buffer/imitation_decisions": float(len(self.records))}

    def state_dict(self, table: RecordTable) -> Plain:
        """Everything that later samples depend on. The step records are added to ``table``."""

        def numbers(records: Sequence[StepRecord]) -> list[int]:
            return [table.number(record) for record in records]

        return {
            "best": {game: (best.score, numbers(best.records)) for game, best in self._best.items()},
            "running": {env: numbers(records) for env, records in self._running.items()},
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Plain, records: Sequence[StepRecord]) -> None:
        """The inverse of :meth:`state_dict`; ``records`` are those of the table, by number."""
        self._best = {
            game: BestEpisode(score, [records[n] for n in own]) for game, (score, own) in state["best"].items()
        }
        self._running = {env: [records[n] for n in own] for env, own in state["running"].items()}
        self._rng.bit_generator.state = state["rng"]


def scoring_path(episode: Sequence[StepRecord], *, final: GameState) -> list[StepRecord]:
    """The decisions of an episode up to its final score, without loops; none if it began with that score.

    ``episode`` is all its decisions, at least one, and ``final`` the state after them.
    """
    states = [*(record.state for record in episode), final]
    end = next(t for t, state in enumerate(states) if state.score >= final.score)
    path = loop_free_path([state.place for state in states[: end + 1]], [record.reward for record in episode[:end]])
    return [episode[t] for t in path]
