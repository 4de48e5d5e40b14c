"""Plays games without exploration, with the world model alone, with both, and with the prior alone."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from loguru import logger

from priorzero.player import Lane, Player
from priorzero.types import GameWorkerError

# mode -> (use_search, use_prior)
PLAYS = {"world_model": (True, False), "world_model_with_prior": (True, True), "prior": (False, True)}


@dataclass(frozen=True)
class Evaluation:
    """Episodes of one mode. The same parameters and seed give the same episodes.

    Attributes:
        returns: sum of rewards of each episode.
        scores: the game's own score at the end of each; some games give points before the first command.
    """

    mode: str
    returns: list[float]
    scores: list[float]
    wins: int
    max_score: float

    @property
    def mean_return(self) -> float:
        return float(np.mean(self.returns))

    @property
    def mean_score(self) -> float:
        return float(np.mean(self.scores))


class Evaluator:
    """Plays ``episodes`` episodes a mode on its own games.

    Args:
        workers: the games, each with a seed of its own.
        player: makes the decisions.
        episodes: episodes a mode.
    """

    def __init__(self, workers: Sequence[Any], *, player: Player, episodes: int) -> None:
        self._workers = workers
        self._player = player
        self._episodes = episodes

    async def evaluate(self, mode: str) -> Evaluation:
        """Play one mode. What it sees leaves no trace in training: new actions are numbered in a copy.

        Raises:
            GameWorkerError: no episode could be finished.
        """
        use_search, use_prior = PLAYS[mode]
        player = copy.copy(self._player)
        player.indexer = copy.deepcopy(self._player.indexer)
        finished: list[Lane] = []
        failure: GameWorkerError | None = None
        while len(finished) < self._episodes:
            workers = self._workers[: self._episodes - len(finished)]
            lanes, error = await self._play(workers, player, use_search=use_search, use_prior=use_prior)
            failure = error or failure
            if not lanes:
                assert failure is not None
                raise failure
            finished += lanes
        return Evaluation(
            mode=mode,
            returns=[lane.total_reward for lane in finished],
            scores=[lane.state.score for lane in finished],
            wins=sum(lane.state.won for lane in finished),
            max_score=finished[0].state.max_score,
        )

    async def _play(
        self, workers: Sequence[Any], player: Player, *, use_search: bool, use_prior: bool
    ) -> tuple[list[Lane], GameWorkerError | None]:
        """One episode a worker; those whose game failed are left out, and the last failure is returned."""
        failure: GameWorkerError | None = None
        states = await asyncio.gather(*(worker.reset() for worker in workers))
        playing = [
            (worker, player.new_lane(state, np.random.default_rng(0)))
            for worker, state in zip(workers, states, strict=True)
        ]
        finished = []
        while playing:
            decisions = await player.decide(
                [lane for _, lane in playing], explore=False, use_search=use_search, use_prior=use_prior
            )
            outcomes = await asyncio.gather(
                *(worker.step(d.action_text) for (worker, _), d in zip(playing, decisions, strict=True)),
                return_exceptions=True,
            )
            still = []
            for (worker, lane), decision, outcome in zip(playing, decisions, outcomes, strict=True):
                if isinstance(outcome, GameWorkerError):
                    logger.warning(f"an evaluation game failed ({outcome}); its episode does not count")
                    failure = outcome
                    continue
                if isinstance(outcome, BaseException):
                    raise outcome
                state, reward = outcome
                lane.advance(
                    action_text=decision.action_text,
                    action_index=int(decision.action_indices[decision.chosen]),
                    reward=reward,
                    state=state,
                    features=player.features(state),
                )
                if state.done:
                    finished.append(lane)
                else:
                    still.append((worker, lane))
            playing = still
        return finished, failure
