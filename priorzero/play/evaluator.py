"""Plays games without learning from them: with both models, with either alone, and at random for comparison."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from loguru import logger

from priorzero.play.player import Lane, Player
from priorzero.types import GameWorkerError

# mode -> how Player.decide is called
PLAYS: dict[str, dict[str, bool]] = {
    "world_model": {"explore": False, "use_prior": False},
    "world_model_with_prior": {"explore": False},
    "prior": {"explore": False, "use_search": False},
    "prior_sampled": {"explore": True, "use_search": False},
    "random": {"explore": True, "use_search": False, "use_prior": False},
}


@dataclass(frozen=True)
class Evaluation:
    """Episodes of one mode. The same parameters and seed give the same episodes.

    Attributes:
        returns: sum of rewards of each episode.
        scores: the game's own score at the end of each; some games give points before the first command.
        wins: episodes that ended with a win.
        max_score: the most points the game can give; the mean over games where several were played.
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


def together(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The episodes of one mode on several games as one evaluation; there must be as many of each game."""
    return Evaluation(
        mode=evaluations[0].mode,
        returns=[value for e in evaluations for value in e.returns],
        scores=[value for e in evaluations for value in e.scores],
        wins=sum(e.wins for e in evaluations),
        max_score=float(np.mean([e.max_score for e in evaluations])),
    )


class Evaluator:
    """Plays ``episodes`` episodes a mode of one game.

    Args:
        game: its name.
        workers: processes that play it, each with a seed of its own.
        player: makes the decisions.
        episodes: episodes a mode.
        seed: of the modes that draw their commands.
    """

    def __init__(self, game: str, workers: Sequence[Any], *, player: Player, episodes: int, seed: int) -> None:
        self.game = game
        self._workers = workers
        self._player = player
        self._episodes = episodes
        self._seed = seed

    async def evaluate(self, mode: str) -> Evaluation:
        """Play one mode. What it sees leaves no trace in training: new actions are numbered in a copy.

        Raises:
            GameWorkerError: no episode could be finished.
        """
        player = copy.copy(self._player)
        player.indexer = copy.deepcopy(self._player.indexer)
        finished: list[Lane] = []
        failure: GameWorkerError | None = None
        seed = np.random.SeedSequence(self._seed)
        while len(finished) < self._episodes:
            workers = self._workers[: self._episodes - len(finished)]
            lanes, error = await self._play(workers, player, seed, **PLAYS[mode])
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
        self, workers: Sequence[Any], player: Player, seed: np.random.SeedSequence, **how: bool
    ) -> tuple[list[Lane], GameWorkerError | None]:
        """One episode a worker; those whose game failed are left out, and the last failure is returned."""
        failure: GameWorkerError | None = None
        states = await asyncio.gather(*(worker.reset() for worker in workers), return_exceptions=True)
        playing = []
        for worker, state, child in zip(workers, states, seed.spawn(len(workers)), strict=True):
            if isinstance(state, GameWorkerError):
                logger.warning(f"an evaluation game could not begin ({state})")
                failure = state
            elif isinstance(state, BaseException):
                raise state
            else:
                playing.append((worker, player.new_lane(state, np.random.default_rng(child))))
        finished = []
        while playing:
            decisions = await player.decide([lane for _, lane in playing], **how)
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


async def evaluate_all(evaluators: Evaluators) -> dict[tuple[str, bool], dict[str, Evaluation]]:
    """``(mode, unseen)`` to the evaluation of each game. A game that cannot be played is left out, and this is said."""
    played: dict[tuple[str, bool], dict[str, Evaluation]] = {}
    for unseen, chosen in ((False, evaluators.seen), (True, evaluators.unseen)):
        for mode in evaluators.modes:
            for evaluator in chosen:
                try:
                    played.setdefault((mode, unseen), {})[evaluator.game] = await evaluator.evaluate(mode)
                except GameWorkerError as error:
                    logger.error(f"evaluation, {mode}: {evaluator.game} is left out ({error})")
    return {key: of_games for key, of_games in played.items() if of_games}


