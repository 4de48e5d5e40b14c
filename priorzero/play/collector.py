"""Collection: plays games with exploration and stores the decisions in game segments."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from loguru import logger

from priorzero.envs import GameWorker
from priorzero.envs.worker import gather_replies
from priorzero.llm.priors import agreement, entropy
from priorzero.play.episode import Episode, EpisodeResult
from priorzero.play.exploration import make_exploration
from priorzero.play.memory import GameMemory
from priorzero.play.novelty import NoveltyCounts, shaped_reward
from priorzero.play.player import Decision, Player
from priorzero.play.transcript import TRAINING, EvaluationTranscript, transcript, transcript_step
from priorzero.runtime.activity import announced
from priorzero.runtime.concurrency import gather_or_cancel
from priorzero.types import GameState, GameWorkerError, Plain, StepRecord
from priorzero.world_model.best_episodes import BestEpisodes
from priorzero.world_model.records import RecordTable
from priorzero.world_model.segment import PriorZeroGameSegment, SegmentWriter

MAX_FAILED_STARTS = 3  # a game that fails to start this often in a row is given up; each start is tried twice
RECENT_EPISODES = 20  # number of episodes in the mean return
COUNTERS = ("env_steps", "num_episodes", "num_game_failures", "num_steps_lost")  # of a collector


@dataclass
class Collected:
    """The result of one call of :meth:`Collector.collect`."""

    segments: list[PriorZeroGameSegment] = field(default_factory=list)
    episodes: list[EpisodeResult] = field(default_factory=list)
    env_steps: int = 0
    visit_entropies: list[float] = field(default_factory=list)
    prior_entropies: list[float] = field(default_factory=list)
    prior_weights: list[float] = field(default_factory=list)
    agreements: list[bool] = field(default_factory=list)
    dropped_history: int = 0
    over_length_prompts: int = 0
    recordings: list[EvaluationTranscript] = field(default_factory=list)  # of run.record_every

    def add_statistics(self, decision: Decision, record: StepRecord) -> None:
        """Statistics of one decision."""
        self.visit_entropies.append(entropy(record.visit_probs()))
        if decision.prior is None or decision.prompt is None:
            return
        assert decision.result is not None
        self.prior_weights.append(decision.result.prior_weight)
        self.prior_entropies.append(entropy(np.exp(decision.prior.logprobs)))
        self.agreements.append(agreement(decision.prior, record.visit_counts))
        self.dropped_history += decision.prompt.dropped_history
        self.over_length_prompts += decision.prompt.over_length

    def scalars(self) -> dict[str, float]:
        """Metrics: means over the decisions."""
        scalars = {"collector_iter/visit_entropy_mean": float(np.mean(self.visit_entropies or [0.0]))}
        if self.prior_entropies:
            scalars["prior/weight_mean"] = float(np.mean(self.prior_weights))
            scalars["prior/entropy_mean"] = float(np.mean(self.prior_entropies))
            scalars["prior/agreement"] = float(np.mean(self.agreements))
            scalars["prior/dropped_history"] = float(self.dropped_history)
            scalars["prior/over_length_prompts"] = float(self.over_length_prompts)
        return scalars

    def state_dict(self, table: RecordTable) -> Plain:
        """As plain data; the step records are added to ``table``."""
        return {
            **vars(self),
            "segments": [segment.state_dict(table) for segment in self.segments],
            "episodes": [dataclasses.astuple(episode) for episode in self.episodes],
        }

    @classmethod
    def from_state_dict(cls, state: Plain, records: Sequence[StepRecord], *, config: Any) -> Collected:
        """The inverse of :meth:`state_dict`; ``records`` are the table's."""
        segments = [PriorZeroGameSegment.from_state_dict(own, records, config=config) for own in state["segments"]]
        episodes = [EpisodeResult(*episode) for episode in state["episodes"]]
        return cls(**{**state, "segments": segments, "episodes": episodes})


class Collector:
    """Plays several games at the same time, in one group or in more.

    The games of a group make one decision at a time, all in one batch. Groups run independently: one group is searched
    for while the LLM computes the priors of another. If a game hangs or crashes, the decision is lost and a new episode
    begins. A game that fails to start :data:`MAX_FAILED_STARTS` times in a row is given up.

    Args:
        workers: the games, one environment each.
        player: makes the decisions.
        seed: seed of the environments' generators.
        groups: number of groups. With one group, equal parameters and seeds give equal episodes.
        first_episode: number of the first episode. Collectors that share a replay buffer need different numbers.
        games: names of the games; environment ``e`` plays game ``e % len(games)``.
        best_episodes: gets all decisions, to keep those of the best episodes.

    Attributes:
        memories: what the episodes of each game taught; empty unless prompts contain it (``llm.memory_lines``).
    """

    def __init__(
        self,
        workers: Sequence[GameWorker],
        *,
        player: Player,
        seed: np.random.SeedSequence,
        groups: int = 1,
        first_episode: int = 0,
        games: Sequence[str] = ("game",),
        best_episodes: BestEpisodes | None = None,
    ) -> None:
        self._workers = workers
        self._player = player
        self._config = player.policy.lightzero_config
        self._groups = [range(g, len(workers), groups) for g in range(min(groups, len(workers)))]
        self._rngs = [np.random.default_rng(child) for child in seed.spawn(len(workers))]
        self._writers = [SegmentWriter(self._config) for _ in workers]
        self._episodes: list[Episode | None] = [None] * len(workers)
        self._first_episode = self._next_episode = first_episode
        self._failed_starts = [0] * len(workers)  # in a row
        self._games = list(games)
        self._counts = [NoveltyCounts() for _ in games]
        self._exploration = make_exploration(player.settings, self._counts)
        self._best_episodes = best_episodes
        uses_memory = player.prior is not None and player.settings.llm.memory_lines > 0
        self.memories = [GameMemory()] * len(games) if uses_memory else []
        self.env_steps = 0
        self.num_episodes = 0
        self.num_game_failures = 0
        self.num_steps_lost = 0  # actions whose outcome is unknown, because the game failed
        self.recent_returns: deque[float] = deque(maxlen=RECENT_EPISODES)
        self.collected = Collected()  # since the last complete call of collect()
        self._has_warned_of_overflows = False

    async def collect(self, num_steps: int, *, stop: Callable[[], bool] = lambda: False) -> Collected | None:
        """Take at least ``num_steps`` environment steps, all games together, and return what was collected.

        ``stop`` is checked before each decision. If it returns True, the call is interrupted and returns None. The next
        call continues; the steps that were taken already are included.
        """
        await gather_or_cancel(*(self._play(group, num_steps, stop) for group in self._groups))
        if self.collected.env_steps < num_steps:
            return None
        collected, self.collected = self.collected, Collected()
        self.env_steps += collected.env_steps
        self._warn_of_overflows()
        return collected

    def _warn_of_overflows(self) -> None:
        """Log, once, that the action vocabulary is too small."""
        vocabulary = self._player.indexer
        if vocabulary.num_overflows and not self._has_warned_of_overflows:
            self._has_warned_of_overflows = True
            logger.warning(
                f"the action vocabulary is full (env.action_space_size={vocabulary.capacity}): a new action replaces "
                "the one that has not been valid for the longest time, and what the world model has learned for that "
                "action is applied to the new one. A run with a larger env.action_space_size avoids this. "
                "collector_iter/action_overflows counts the replaced actions; this is not logged again"
            )

    def scalars(self, collected: Collected) -> dict[str, float]:
        """Metrics of one call of :meth:`collect`."""
        scalars = {
            **collected.scalars(),
            **self._exploration.scalars(),
            "collector_iter/env_steps": float(self.env_steps),
            "collector_iter/commands_tried": float(sum(len(counts.actions) for counts in self._counts)),
            "collector_iter/game_failures": float(self.num_game_failures),
            "collector_iter/games_given_up": float(sum(map(self._is_given_up, range(len(self._workers))))),
            "collector_iter/action_overflows": float(self._player.indexer.num_overflows),
            "collector_iter/actions_known": float(self._player.indexer.num_used),
        }
        if self.recent_returns:
            scalars["collector_iter/reward_mean"] = float(np.mean(self.recent_returns))
            scalars["collector_iter/reward_max"] = float(np.max(self.recent_returns))
        return scalars

    # ---- playing ----

    async def _play(self, group: Sequence[int], num_steps: int, stop: Callable[[], bool]) -> None:
        """Play the games of one group until all groups together have taken ``num_steps`` steps, or until ``stop``."""
        collected = self.collected
        while collected.env_steps < num_steps and not stop():
            idle = [e for e in group if self._episodes[e] is None and not self._is_given_up(e)]
            await asyncio.gather(*(self._begin(e) for e in idle))
            if all(map(self._is_given_up, group)):
                return  # the other groups continue
            playing = [episode for e in group if (episode := self._episodes[e]) is not None]
            if not playing:
                continue
            decisions = await self._player.decide(playing, exploration=self._exploration, sample=True)
            if self.env_steps == collected.env_steps == 0:
                logger.debug("the first actions are taken")
            with self._player.timeline.span("games"):
                outcomes = await gather_replies(
                    self._workers[ep.env].step(d.action_text) for ep, d in zip(playing, decisions, strict=True)
                )
            features = iter(self._player.features([o[0] for o in outcomes if not isinstance(o, GameWorkerError)]))
            for episode, decision, outcome in zip(playing, decisions, outcomes, strict=True):
                if isinstance(outcome, GameWorkerError):
                    self._abandon(episode, decision, outcome, collected)
                else:
                    self._record(episode, decision, *outcome, next(features), collected)

    async def _begin(self, e: int) -> None:
        """Begin an episode in environment ``e``. If its game does not start twice, this is counted."""
        number = self._next_episode  # before any await, so that numbers follow the environments
        self._next_episode += 1
        with self._player.timeline.span("games"), announced("looking for valid actions"):
            try:
                state = await self._workers[e].reset()
            except GameWorkerError as error:
                self.num_game_failures += 1
                logger.warning(f"game {e} could not start ({error}); trying once more with a new process")
                try:
                    await self._workers[e].restart()
                    state = await self._workers[e].reset()
                except GameWorkerError as second_error:
                    self._count_failed_start(e, second_error)
                    return
        self._failed_starts[e] = 0
        self._episodes[e] = self._new_episode(e, state, number=number)
        self._player.prior_weights.begin_episode(e)
        self._exploration.begin_episode(e, state, rng=self._rngs[e])

    def _new_episode(self, e: int, state: GameState, *, number: int = 0) -> Episode:
        episode = self._player.new_episode(
            e,
            state,
            game=self._games[e % len(self._games)],
            rng=self._rngs[e],
            number=number,
            memory=self.memories[e % len(self.memories)] if self.memories else None,
        )
        every = self._player.settings.run.record_every
        if every and (number - self._first_episode) % every == 0:
            episode.recording = []
        return episode

    def _is_given_up(self, e: int) -> bool:
        return self._failed_starts[e] >= MAX_FAILED_STARTS

    def _count_failed_start(self, e: int, error: GameWorkerError) -> None:
        """Count a failed start of game ``e``. Raises ``error`` if no game is left."""
        self.num_game_failures += 1
        self._failed_starts[e] += 1
        if not self._is_given_up(e):
            logger.warning(f"game {e} could not start ({error})")
            return
        logger.error(f"game {e} is abandoned: it could not start {MAX_FAILED_STARTS} times in a row ({error})")
        if all(map(self._is_given_up, range(len(self._workers)))):
            raise error

    def _record(
        self,
        episode: Episode,
        decision: Decision,
        state: GameState,
        reward: float,
        features: np.ndarray,
        collected: Collected,
    ) -> None:
        """Store a decision and its outcome: the next state, its features ``[F]`` and the reward."""
        e, cfg, counts = episode.env, self._player.settings.train, self._counts[episode.env % len(self._counts)]
        before, action = decision.state, decision.action_text
        counts.add(before=before, action=action, after=state, with_feedback=cfg.novelty_of == "feedback")
        shaping = shaped_reward(counts, before=before, action=action, after=state, cfg=cfg)
        record = decision.record(episode, reward=reward, shaping=shaping, done=state.done)
        self._player.prior_weights.observe(e, episode.game, decision, reward=reward)
        if self._best_episodes is not None:
            self._best_episodes.add(e, record)
        if episode.recording is not None:
            episode.recording.append(transcript_step(decision, reward=reward))
        episode.advance(decision, reward=reward, state=state, features=features)
        self._exploration.observe(e, position=decision.chosen, after=state, history=episode.history)
        collected.segments += self._writers[e].add(record, next_features=features, truncated=state.truncated)
        collected.env_steps += 1
        collected.add_statistics(decision, record)
        if state.done:
            self._finish(episode, collected)

    def _finish(self, episode: Episode, collected: Collected) -> None:
        """The episode has ended."""
        state = episode.state
        game = episode.env % len(self._counts)
        self._exploration.end_episode(episode.env, state, episode.history)
        if self._best_episodes is not None:
            self._best_episodes.end_episode(episode.env, state, game=game)
        if self.memories:
            self.memories[game] = self.memories[game].after_episode(episode.history, state)
        env_step = self.env_steps + collected.env_steps
        collected.episodes.append(
            EpisodeResult(
                total_reward=episode.total_reward,
                score=state.score,
                steps=len(episode.history),
                won=state.won,
                env_step=env_step,
                game=episode.game,
            )
        )
        if episode.recording is not None:
            collected.recordings.append(self._recorded(episode, env_step=env_step))
        self.recent_returns.append(episode.total_reward)
        self.num_episodes += 1
        self._episodes[episode.env] = None

    def _recorded(self, episode: Episode, *, env_step: int) -> EvaluationTranscript:
        """The recording of an episode that has ended."""
        settings, steps = self._player.settings, episode.recording or []
        played = transcript(steps, final=episode.state, total_reward=episode.total_reward, settings=settings)
        number = episode.number + 1
        return {
            "mode": TRAINING, "game": episode.game, "unseen": False, "episode": number, "env_step": env_step, **played
        }  # fmt: skip

    def _abandon(self, episode: Episode, decision: Decision, error: GameWorkerError, collected: Collected) -> None:
        """The game failed: the decision is lost, the step counts, and the episode is truncated before it."""
        self.num_game_failures += 1
        self.num_steps_lost += 1
        logger.warning(f"game {episode.env} failed at {decision.action_text!r} ({error}); its episode is truncated")
        self._counts[episode.env % len(self._counts)].add_action(decision.state, decision.action_text)
        collected.segments += self._writers[episode.env].flush(final_features=episode.features[-1])
        collected.env_steps += 1
        self._episodes[episode.env] = None

    # ---- state ----

    def state_dict(self, table: RecordTable) -> Plain:
        """Everything that the next decisions depend on, except both models; step records are added to ``table``."""
        return {
            "episodes": [episode and episode.state_dict() for episode in self._episodes],
            "pending": [writer.state_dict(table) for writer in self._writers],
            "rngs": [rng.bit_generator.state for rng in self._rngs],
            "next_episode": self._next_episode,
            **{name: getattr(self, name) for name in COUNTERS},
            "recent_returns": list(self.recent_returns),
            "counts": [counts.state_dict() for counts in self._counts],
            "exploration": self._exploration.state_dict(),
            "prior_weights": self._player.prior_weights.state_dict(),
            "memories": [memory.outcomes for memory in self.memories],
            "collected": self.collected.state_dict(table),
        }

    async def load_state_dict(self, state: Plain, records: Sequence[StepRecord]) -> None:
        """The inverse of :meth:`state_dict`. The games are replayed up to their state.

        If a game does not reach the same state again, or fails, its episode is truncated there and counted as a game
        failure.
        """
        for rng, rng_state in zip(self._rngs, state["rngs"], strict=True):
            rng.bit_generator.state = rng_state
        for writer, pending in zip(self._writers, state["pending"], strict=True):
            writer.load_state_dict(pending, records)
        self._next_episode = state["next_episode"]
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.recent_returns.extend(state["recent_returns"])
        for counts, own in zip(self._counts, state["counts"], strict=True):
            counts.load_state_dict(own)
        self._exploration.load_state_dict(state["exploration"])
        self._player.prior_weights.load_state_dict(state["prior_weights"])
        if self.memories:
            self.memories = [GameMemory(outcomes) for outcomes in state["memories"]]
        self.collected = Collected.from_state_dict(state["collected"], records, config=self._config)
        saved = [(e, episode) for e, episode in enumerate(state["episodes"]) if episode is not None]
        await asyncio.gather(*(self._replay(e, episode) for e, episode in saved))

    async def _replay(self, e: int, episode_state: Plain) -> None:
        """Replay an episode's actions, so that its game is where it was."""
        expected = GameState(*episode_state["state"])
        try:
            state = await self._workers[e].reset()
            episode = self._new_episode(e, state)
            episode.load_state_dict(episode_state)
            for step in episode.history:
                state, _ = await self._workers[e].step(step.action)
            if state != expected:
                raise GameWorkerError("the same actions do not lead to the same state")
            self._episodes[e] = episode
        except GameWorkerError as error:
            self.num_game_failures += 1
            logger.warning(f"game {e} could not be restored ({error}); its episode is truncated")
            final = episode_state["features"][-1].numpy()
            self.collected.segments += self._writers[e].flush(final_features=final)
