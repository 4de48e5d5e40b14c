"""Plays games with exploration and turns what happened into game segments."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from loguru import logger

from priorzero.llm.priors import agreement, entropy
from priorzero.play.exploration import CommandMemory
from priorzero.play.player import Decision, Lane, Player
from priorzero.runtime.concurrency import gather_or_cancel
from priorzero.types import GameState, GameWorkerError, Plain, StepRecord
from priorzero.world_model.records import RecordTable
from priorzero.world_model.segment import PriorZeroGameSegment, SegmentWriter


@dataclass(frozen=True)
class Episode:
    """A finished episode.

    Attributes:
        total_reward: the return, without discount.
        score: the game's own at the end.
        steps: commands given.
        won: whether it ended with a win.
        env_step: environment steps of the run when it ended.
    """

    total_reward: float
    score: float
    steps: int
    won: bool
    env_step: int


@dataclass
class Collected:
    """What one call of :meth:`Collector.collect` brought in."""

    segments: list[PriorZeroGameSegment] = field(default_factory=list)
    episodes: list[Episode] = field(default_factory=list)
    env_steps: int = 0
    visit_entropies: list[float] = field(default_factory=list)
    prior_entropies: list[float] = field(default_factory=list)
    agreements: list[bool] = field(default_factory=list)
    dropped_history: int = 0
    over_length_prompts: int = 0

    def state_dict(self, table: RecordTable) -> Plain:
        """As plain data; the step records go into ``table``."""
        return {
            **vars(self),
            "segments": [segment.recipe(table) for segment in self.segments],
            "episodes": [dataclasses.astuple(episode) for episode in self.episodes],
        }

    @classmethod
    def from_state_dict(cls, state: Plain, records: Sequence[StepRecord], *, config: Any) -> Collected:
        """The inverse of :meth:`state_dict`; ``records`` are those of the table, by number."""
        segments = [PriorZeroGameSegment.from_recipe(recipe, records, config=config) for recipe in state["segments"]]
        return cls(**{**state, "segments": segments, "episodes": [Episode(*episode) for episode in state["episodes"]]})


GIVE_UP_AFTER = 3  # times in a row that a game cannot begin, each time with a second try in a fresh process


class Collector:
    """Plays ``collector_env_num`` games side by side, in one group or several.

    The games of a group take one decision each at a time, searched together. Groups do not wait for one another: one
    group's games are searched for while the LLM is busy with another's. A game that hangs or crashes loses the decision
    it was busy with and begins a new episode; both are counted. One that cannot even begin is given up in the end.

    Args:
        workers: the games.
        player: makes the decisions.
        config: LightZero's policy configuration, for the segments.
        seed: what the lanes' random numbers come from.
        groups: how many groups; with one, the same parameters and seed play the same games.
        first_episode: number of the first episode; where several collect for one replay, their numbers must differ.
        num_games: how many different games the workers play, in turn; each has a memory of its own, since rooms of
            different games have the same names.
    """

    def __init__(
        self,
        workers: Sequence[Any],
        *,
        player: Player,
        config: Any,
        seed: np.random.SeedSequence,
        groups: int = 1,
        first_episode: int = 0,
        num_games: int = 1,
    ) -> None:
        self._workers = workers
        self._player = player
        self._config = config
        self._groups = [range(g, len(workers), groups) for g in range(min(groups, len(workers)))]
        self._rngs = [np.random.default_rng(child) for child in seed.spawn(len(workers))]
        self._writers = [SegmentWriter(config) for _ in workers]
        self._lanes: list[Lane | None] = [None] * len(workers)
        self._episode_numbers = [0] * len(workers)
        self._next_episode = first_episode
        self.env_steps = 0
        self.num_episodes = 0
        self.num_game_failures = 0
        self.num_steps_lost = 0  # taken, but their outcome is not known
        self._vain_begins = [0] * len(workers)
        self.recent_returns: deque[float] = deque(maxlen=20)
        return_first = player.settings.search.return_first
        self.memories = [CommandMemory(return_first=return_first) for _ in range(num_games)]
        self.collected = Collected()  # since the last call of collect() that was not cut short

    async def collect(self, num_steps: int, *, stop: Callable[[], bool] = lambda: False) -> Collected | None:
        """Take at least ``num_steps`` environment steps, all games together.

        Args:
            num_steps: counted from the last call that returned something.
            stop: asked before each decision whether to leave off; what was collected so far is kept for the next call.

        Returns:
            What was collected, or None after leaving off.
        """
        await gather_or_cancel(*(self._play(group, num_steps, stop) for group in self._groups))
        if self.collected.env_steps < num_steps:
            return None
        collected, self.collected = self.collected, Collected()
        self.env_steps += collected.env_steps
        return collected

    def state_dict(self, table: RecordTable) -> Plain:
        """Everything that the next decisions depend on, but for both models; the step records go into ``table``."""
        return {
            "lanes": [lane and lane.state_dict() for lane in self._lanes],
            "pending": [writer.state_dict(table) for writer in self._writers],
            "rngs": [rng.bit_generator.state for rng in self._rngs],
            "episode_numbers": list(self._episode_numbers),
            "next_episode": self._next_episode,
            "env_steps": self.env_steps,
            "num_episodes": self.num_episodes,
            "num_game_failures": self.num_game_failures,
            "num_steps_lost": self.num_steps_lost,
            "recent_returns": list(self.recent_returns),
            "memories": [memory.state_dict() for memory in self.memories],
            "collected": self.collected.state_dict(table),
        }

    async def load_state_dict(self, state: Plain, records: Sequence[StepRecord]) -> None:
        """The inverse of :meth:`state_dict`. The games are played again up to where they were.

        Where a game does not come to the same state again, or fails, its episode is cut there and counted, as when a
        game fails in play.
        """
        for rng, rng_state in zip(self._rngs, state["rngs"], strict=True):
            rng.bit_generator.state = rng_state
        for writer, pending in zip(self._writers, state["pending"], strict=True):
            writer.load_state_dict(pending, records)
        self._episode_numbers = list(state["episode_numbers"])
        self._next_episode = state["next_episode"]
        self.env_steps = state["env_steps"]
        self.num_episodes = state["num_episodes"]
        self.num_game_failures = state["num_game_failures"]
        self.num_steps_lost = state["num_steps_lost"]
        self.recent_returns.extend(state["recent_returns"])
        for memory, memory_state in zip(self.memories, state["memories"], strict=True):
            memory.load_state_dict(memory_state)
        self.collected = Collected.from_state_dict(state["collected"], records, config=self._config)
        lanes = [(e, lane) for e, lane in enumerate(state["lanes"]) if lane is not None]
        await asyncio.gather(*(self._play_again(e, lane) for e, lane in lanes))

    async def _play_again(self, e: int, lane_state: Plain) -> None:
        """Bring a game back to where a lane was."""
        wanted = GameState(*lane_state["state"])
        try:
            state = await self._workers[e].reset()
            lane = self._new_lane(e, state)
            lane.load_state_dict(lane_state)
            for step in lane.history:
                state, _ = await self._workers[e].step(step.action)
            if state != wanted:
                raise GameWorkerError("the same commands do not lead to the same state again")
            self._lanes[e] = lane
        except GameWorkerError as error:
            self.num_game_failures += 1
            logger.warning(f"game {e} could not be brought back to where it was ({error}); its episode is cut there")
            final = lane_state["features"][-1].numpy()
            self.collected.segments += self._writers[e].flush(final_features=final)

    def _new_lane(self, e: int, state: GameState) -> Lane:
        lane = self._player.new_lane(state, self._rngs[e])
        lane.memory = self.memories[e % len(self.memories)]
        return lane

    async def _play(self, group: Sequence[int], num_steps: int, stop: Callable[[], bool]) -> None:
        """Play the games of one group until all groups together have taken ``num_steps`` steps, or until ``stop``."""
        collected = self.collected
        while collected.env_steps < num_steps and not stop():
            await asyncio.gather(*(self._begin(e) for e in group if self._lanes[e] is None and not self._given_up(e)))
            playing = [e for e in group if self._lanes[e] is not None]
            if all(map(self._given_up, group)):
                return  # the others go on
            if not playing:
                continue
            lanes = [lane for e in playing if (lane := self._lanes[e]) is not None]
            decisions = await self._player.decide(lanes, explore=True)
            if self.env_steps == collected.env_steps == 0:
                logger.debug("the first commands are given")
            with self._player.timeline.span("games"):
                outcomes = await asyncio.gather(
                    *(self._workers[e].step(d.action_text) for e, d in zip(playing, decisions, strict=True)),
                    return_exceptions=True,
                )
            for e, decision, outcome in zip(playing, decisions, outcomes, strict=True):
                if isinstance(outcome, GameWorkerError):
                    self._abandon(e, decision, outcome, collected)
                elif isinstance(outcome, BaseException):
                    raise outcome
                else:
                    state, reward = outcome
                    self._record(e, decision, state, reward, collected)

    async def _begin(self, e: int) -> None:
        self._episode_numbers[e] = self._next_episode  # before anything is waited for: by the lanes' order
        self._next_episode += 1
        with self._player.timeline.span("games"):
            try:
                state = await self._workers[e].reset()
            except GameWorkerError as error:
                self.num_game_failures += 1
                logger.warning(f"game {e} could not begin ({error}); trying once more with a fresh process")
                try:
                    await self._workers[e].restart()
                    state = await self._workers[e].reset()
                except GameWorkerError as again:
                    self._fail_to_begin(e, again)
                    return
        self._vain_begins[e] = 0
        lane = self._new_lane(e, state)
        share = self._player.settings.search.explore_share
        lane.detour = lane.memory.draw_detour(self._rngs[e], share=share, max_score=state.max_score)
        self._lanes[e] = lane

    def _given_up(self, e: int) -> bool:
        return self._vain_begins[e] >= GIVE_UP_AFTER

    def _fail_to_begin(self, e: int, error: GameWorkerError) -> None:
        """Raises the error if this was the last game left."""
        self.num_game_failures += 1
        self._vain_begins[e] += 1
        if not self._given_up(e):
            logger.warning(f"game {e} could not begin ({error})")
            return
        logger.error(f"game {e} is given up: it could not begin {GIVE_UP_AFTER} times in a row ({error})")
        if all(map(self._given_up, range(len(self._workers)))):
            raise error

    def _record(self, e: int, decision: Decision, state: GameState, reward: float, collected: Collected) -> None:
        lane = self._lanes[e]
        assert lane is not None and decision.result is not None
        record = StepRecord(
            state=decision.state,
            features=lane.features[-1],
            action_indices=decision.action_indices,
            prompt=decision.prompt.text if decision.prompt is not None else "",
            prior=decision.prior,
            visit_counts=decision.result.visit_counts,
            root_value=decision.result.root_value,
            predicted_value=decision.result.predicted_value,
            chosen=decision.chosen,
            behaviour_prob=decision.behaviour_prob,
            reward=reward,
            shaping=self._shaping(lane.memory, decision.state, decision.action_text, state),
            done=state.done,
            episode=self._episode_numbers[e],
            step=len(lane.history),
        )
        features = self._player.features(state)
        lane.advance(
            action_text=record.action_text,
            action_index=record.action_index,
            reward=reward,
            state=state,
            features=features,
            promised=decision.promised,
        )
        if reward > 0:
            lane.memory.earned(lane.history, now=state)
        collected.segments += self._writers[e].add(record, next_features=features, truncated=state.truncated)
        collected.env_steps += 1
        self._observe(decision, record, collected)
        if state.done:
            lane.memory.ended(lane.history, now=state)
            collected.episodes.append(
                Episode(
                    total_reward=lane.total_reward,
                    score=state.score,
                    steps=len(lane.history),
                    won=state.won,
                    env_step=self.env_steps + collected.env_steps,
                )
            )
            self.recent_returns.append(lane.total_reward)
            self.num_episodes += 1
            self._lanes[e] = None

    def _shaping(self, memory: CommandMemory, before: GameState, action: str, after: GameState) -> float:
        """``train.novelty_bonus / sqrt(N)``, less ``train.loss_penalty`` for an end that is no win.

        It is the N-th time in the run that the command is given in a room with a score (MBIE-EB: Strehl & Littman 2008,
        section 3.2), or that the game gives this answer (as Yuan et al. 2018, "Counting to explore and generalize in
        text-based games", count observations). The last text of a game is no such answer: it tells the number of turns,
        which would make every end a discovery.
        """
        train = self._player.settings.train
        times = memory.add(before.standing, action)  # whatever the bonus is for: the search asks for it
        bonus = train.novelty_bonus / math.sqrt(times)
        over = after.done and not after.truncated
        if train.novelty_of == "answer":
            bonus = 0.0 if over else train.novelty_bonus / math.sqrt(memory.add_answer(after.feedback))
        return bonus - (train.loss_penalty if over and not after.won else 0.0)

    def _observe(self, decision: Decision, record: StepRecord, collected: Collected) -> None:
        collected.visit_entropies.append(entropy(record.visit_probs()))
        if decision.prior is None or decision.prompt is None:
            return
        collected.prior_entropies.append(entropy(np.exp(decision.prior.logprobs)))
        collected.agreements.append(agreement(decision.prior, record.visit_counts))
        collected.dropped_history += decision.prompt.dropped_history
        collected.over_length_prompts += decision.prompt.over_length

    def _abandon(self, e: int, decision: Decision, error: GameWorkerError, collected: Collected) -> None:
        lane = self._lanes[e]
        assert lane is not None
        self.num_game_failures += 1
        self.num_steps_lost += 1
        logger.warning(f"game {e} failed at {decision.action_text!r} ({error}); its episode is cut here")
        collected.segments += self._writers[e].flush(final_features=lane.features[-1])
        collected.env_steps += 1  # spent, though nothing came of it
        self._lanes[e] = None

    def scalars(self, collected: Collected) -> dict[str, float]:
        """Metrics of one call of :meth:`collect`; means over its decisions."""
        scalars = {
            "collector_iter/visit_entropy_mean": float(np.mean(collected.visit_entropies or [0.0])),
            "collector_iter/env_steps": float(self.env_steps),
            "collector_iter/commands_tried": float(sum(map(len, self.memories))),
            "collector_iter/commands_leading_on": float(sum(memory.num_leading for memory in self.memories)),
            "collector_iter/game_failures": float(self.num_game_failures),
            "collector_iter/games_given_up": float(sum(map(self._given_up, range(len(self._workers))))),
            "collector_iter/action_overflows": float(self._player.indexer.num_overflows),
            "collector_iter/actions_known": float(self._player.indexer.num_used),
        }
        if self.recent_returns:
            scalars["collector_iter/reward_mean"] = float(np.mean(self.recent_returns))
            scalars["collector_iter/reward_max"] = float(np.max(self.recent_returns))
        if collected.prior_entropies:
            scalars["prior/entropy_mean"] = float(np.mean(collected.prior_entropies))
            scalars["prior/agreement"] = float(np.mean(collected.agreements))
            scalars["prior/dropped_history"] = float(collected.dropped_history)
            scalars["prior/over_length_prompts"] = float(collected.over_length_prompts)
        return scalars
