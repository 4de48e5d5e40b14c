"""Evaluation: plays games without exploration and without learning."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
from loguru import logger

from priorzero.envs import GameWorker
from priorzero.envs.worker import gather_replies
from priorzero.play.episode import Episode
from priorzero.play.memory import GameMemory
from priorzero.play.player import Player
from priorzero.play.transcript import Transcript, TranscriptStep, transcript, transcript_step
from priorzero.runtime.activity import announced
from priorzero.settings import MODE_NAMES, EvalMode
from priorzero.types import GameTimeoutError, GameWorkerError


class DecideArguments(TypedDict, total=False):
    """Arguments of :meth:`Player.decide`."""

    sample: bool
    use_prior: bool
    use_search: bool


MODE_ARGUMENTS: dict[EvalMode, DecideArguments] = {
    "world_model": {"use_prior": False},
    "world_model_sampled": {"use_prior": False, "sample": True},
    "world_model_with_prior": {},
    "world_model_with_prior_sampled": {"sample": True},
    "prior": {"use_search": False},
    "prior_sampled": {"use_search": False, "sample": True},
    "random": {"use_search": False, "use_prior": False, "sample": True},
}


@dataclass(frozen=True)
class Evaluation:
    """Episodes of one mode. Equal parameters and seeds give equal episodes.

    Attributes:
        mode: the agent that played, see ``eval.modes``.
        returns: undiscounted return of each episode.
        scores: the game's score at the end of each episode. Some games give points before the first action.
        wins: number of episodes that ended with a win.
        max_score: the largest possible score, the mean over the games if there are several; 0 if it is not known.
        best_scores: the largest score that was reached in each episode. It can be larger than the one at the end.
        first_episode: the decisions of the first episode; None if there are several games.
    """

    mode: str
    returns: list[float]
    scores: list[float]
    wins: int
    max_score: float
    best_scores: list[float] = field(default_factory=list)
    first_episode: Transcript | None = field(default=None, compare=False, repr=False)

    @property
    def mean_return(self) -> float:
        return float(np.mean(self.returns))

    @property
    def mean_score(self) -> float:
        return float(np.mean(self.scores))

    def results(self) -> dict[str, Any]:
        """All attributes except ``first_episode``."""
        return {
            "mode": self.mode,
            "returns": self.returns,
            "scores": self.scores,
            "wins": self.wins,
            "max_score": self.max_score,
            "best_scores": self.best_scores,
        }


# (mode, whether the games are unseen in training) -> game -> evaluation
Evaluations = Mapping[tuple[str, bool], Mapping[str, Evaluation]]


def merge(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of one mode on several games as one. All games must have the same number of episodes.

    The maximum score is not known (0) if that of a game is not.
    """
    maxima = [e.max_score for e in evaluations]
    return Evaluation(
        mode=evaluations[0].mode,
        returns=[value for e in evaluations for value in e.returns],
        scores=[value for e in evaluations for value in e.scores],
        wins=sum(e.wins for e in evaluations),
        max_score=float(np.mean(maxima)) if all(maxima) else 0.0,
        best_scores=[value for e in evaluations for value in e.best_scores],
    )


@dataclass
class Trial:
    """The episodes of one environment that count as one in an evaluation: one, or those within a limit of steps.

    Attributes:
        episodes: in the order in which they were played; the last one may be in progress.
        step_limit: number of steps of all episodes together; None for one episode.
    """

    episodes: list[Episode]
    step_limit: int | None

    @property
    def is_over(self) -> bool:
        """Whether the last episode has ended and no further one begins.

        With a limit, a game that has ended begins again until the limit is reached, or until it is won with the
        largest possible score.
        """
        state = self.episodes[-1].state
        if self.step_limit is None:
            return state.done
        is_solved = state.won and self.best_score == state.max_score
        return (state.done and is_solved) or sum(len(e.history) for e in self.episodes) >= self.step_limit

    @property
    def best(self) -> Episode:
        """The episode with the largest score; the first one of several."""
        return max(self.episodes, key=best_score)

    @property
    def best_score(self) -> float:
        return best_score(self.best)

    @property
    def won(self) -> bool:
        return any(episode.state.won for episode in self.episodes)


def best_score(episode: Episode) -> float:
    """The largest score that was reached in an episode."""
    return max([episode.state.score, *(step.score for step in episode.history)])


@dataclass(frozen=True)
class Evaluator:
    """Plays one game without exploration.

    Attributes:
        game: name of the game.
        workers: processes that play it, each with its own seed.
        player: makes the decisions.
        episodes: number of episodes in each mode.
        seed: seed for the modes that sample their actions.
        step_limit: number of steps of an episode. If the game ends earlier, it begins again. Together the episodes
            count as one: its score is the best one, and it is won if one of them was won. None: an episode ends with
            the game.
    """

    game: str
    workers: Sequence[GameWorker]
    player: Player
    episodes: int
    seed: int
    step_limit: int | None = None

    async def evaluate(self, mode: EvalMode, *, memory: GameMemory | None = None) -> Evaluation:
        """Play the episodes of one mode. Episodes of games that fail are replaced.

        Training is not affected: new actions get indices in a copy of the vocabulary, and ``memory``, which the prompts
        contain, is not changed.

        Raises:
            GameWorkerError: no game could finish its episode.
        """
        player = copy.copy(self.player)
        player.indexer = copy.deepcopy(self.player.indexer)
        finished: list[Trial] = []
        first: Transcript | None = None
        failure: GameWorkerError | None = None
        seed = np.random.SeedSequence(self.seed)
        while len(finished) < self.episodes:
            workers = self.workers[: self.episodes - len(finished)]
            trials, transcripts, error = await self._play(workers, player, seed, mode=mode, memory=memory)
            failure = error or failure
            if not trials:
                assert failure is not None
                raise failure
            finished += trials
            first = first or transcripts[0]
        return Evaluation(
            mode=mode,
            returns=[trial.best.total_reward for trial in finished],
            scores=[trial.best.state.score for trial in finished],
            wins=sum(trial.won for trial in finished),
            max_score=finished[0].best.state.max_score,
            best_scores=[trial.best_score for trial in finished],
            first_episode=first,
        )

    async def _play(
        self,
        workers: Sequence[GameWorker],
        player: Player,
        seed: np.random.SeedSequence,
        *,
        mode: EvalMode,
        memory: GameMemory | None,
    ) -> tuple[list[Trial], list[Transcript], GameWorkerError | None]:
        """One trial in each worker; those of failed games are left out.

        Returns:
            The trials, the transcripts of their first episodes, and the last failure.
        """
        failure: GameWorkerError | None = None
        states = await gather_replies(worker.reset() for worker in workers)
        playing = []
        for e, (state, child) in enumerate(zip(states, seed.spawn(len(workers)), strict=True)):
            if isinstance(state, GameWorkerError):
                logger.warning(f"a game of the evaluation could not start ({state})")
                failure = state
            else:
                rng = np.random.default_rng(child)
                playing.append(player.new_episode(e, state, game=self.game, rng=rng, memory=memory))
        trials = {episode.env: Trial([episode], self.step_limit) for episode in playing}
        over: list[Trial] = []
        steps: dict[int, list[TranscriptStep]] = {episode.env: [] for episode in playing}
        while playing:
            decisions = await player.decide(playing, **MODE_ARGUMENTS[mode])
            outcomes = await gather_replies(
                workers[ep.env].step(d.action_text) for ep, d in zip(playing, decisions, strict=True)
            )
            features = iter(player.features([o[0] for o in outcomes if not isinstance(o, GameWorkerError)]))
            advanced = []
            for episode, decision, outcome in zip(playing, decisions, outcomes, strict=True):
                if isinstance(outcome, GameWorkerError):
                    logger.warning(f"a game of the evaluation failed ({outcome}); its episode does not count")
                    failure = outcome
                else:
                    state, reward = outcome
                    if len(trials[episode.env].episodes) == 1:
                        steps[episode.env].append(transcript_step(decision, reward=reward))
                    episode.advance(decision, reward=reward, state=state, features=next(features))
                    advanced.append(episode)
            over += [trials[episode.env] for episode in advanced if trials[episode.env].is_over]
            going_on = [episode for episode in advanced if not trials[episode.env].is_over]
            playing, error = await self._begin_again(going_on, trials, player)
            failure = error or failure
        first_episodes = [trial.episodes[0] for trial in over]
        transcripts = [
            transcript(
                steps[episode.env], final=episode.state, total_reward=episode.total_reward, settings=player.settings
            )
            for episode in first_episodes
        ]
        return over, transcripts, failure

    async def _begin_again(
        self, episodes: Sequence[Episode], trials: Mapping[int, Trial], player: Player
    ) -> tuple[list[Episode], GameWorkerError | None]:
        """The episodes, where one that has ended is replaced by the next one of its trial; and the last failure."""
        playing: list[Episode] = []
        failure: GameWorkerError | None = None
        for episode in episodes:
            if not episode.state.done:
                playing.append(episode)
                continue
            try:
                state = await self.workers[episode.env].reset()
            except GameWorkerError as error:
                logger.warning(f"a game of the evaluation could not start again ({error}); its episode does not count")
                failure = error
                continue
            following = player.new_episode(episode.env, state, game=self.game, rng=episode.rng, memory=episode.memory)
            trials[episode.env].episodes.append(following)
            playing.append(following)
        return playing, failure


@dataclass(frozen=True)
class Evaluators:
    """The evaluators of all games of a run."""

    modes: Sequence[EvalMode]  # eval.modes
    seen: Sequence[Evaluator]  # for the games of run.env_id
    unseen: Sequence[Evaluator]  # for the games of eval.unseen

    @property
    def workers(self) -> list[GameWorker]:
        """The processes of all games."""
        return [worker for evaluator in [*self.seen, *self.unseen] for worker in evaluator.workers]

    async def evaluate(self, memories: Sequence[GameMemory] = ()) -> Evaluations:
        """Evaluate all modes on all games. A game that cannot be played is left out, and this is logged.

        Args:
            memories: the memory of each game that is trained on; empty if prompts contain none.
        """
        results: dict[tuple[str, bool], dict[str, Evaluation]] = {}
        for unseen, evaluators in ((False, self.seen), (True, self.unseen)):
            for mode in self.modes:
                for game, evaluator in enumerate(evaluators):
                    memory = memories[game] if memories and not unseen else None
                    try:
                        with announced(f"evaluating: {MODE_NAMES[mode]}"):
                            evaluation = await evaluator.evaluate(mode, memory=memory)
                    except GameWorkerError as error:
                        logger.error(
                            f"evaluation, {mode}: {evaluator.game} is skipped, since no episode could be finished; the "
                            "warnings before this say why"
                            + ("; env.step_timeout_s sets the time limit" * isinstance(error, GameTimeoutError))
                        )
                    else:
                        results.setdefault((mode, unseen), {})[evaluator.game] = evaluation
        return results
