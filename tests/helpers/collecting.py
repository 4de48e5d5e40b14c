"""Collectors and players with a small world model, over games whose rewards identify the decision that earned them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch

from priorzero.llm.engines import RetryingPrior
from priorzero.llm.prompts import prompt_style
from priorzero.play.action_vocabulary import ActionVocabulary
from priorzero.play.collector import Collected, Collector
from priorzero.play.evaluator import Evaluation, Evaluator
from priorzero.play.player import Player
from priorzero.policy import PriorZeroPolicy
from priorzero.runtime.concurrency import OwnerThread
from priorzero.runtime.timeline import Timeline
from priorzero.settings import EvalMode, PriorSettings
from priorzero.types import ActionPrior, GameState, GameWorkerError, PriorEngine, StepRecord
from priorzero.world_model.best_episodes import BestEpisodes
from priorzero.world_model.records import RecordTable
from tests.helpers.models import make_settings

FEATURE_SIZE = 4
FIRST_ROOM = 1
SETTINGS = {
    "env": {"action_space_size": 512},
    "world_model": {"embed_dim": 16, "num_heads": 2, "num_unroll_steps": 4, "context_length": 4},
    "search": {"num_simulations": 6},
    "replay": {"segment_length": 3},
    "train": {"td_steps": 2, "batch_size": 8},
    "llm": {"list_commands": True},
}


def state_of(game: int, room: int, *, moves: int, length: int) -> GameState:
    """A state of :class:`CountingGame`. Feedback, actions and score all contain the room's number."""
    actions = tuple(f"act {room} {k}" for k in range(2 + room % 3))
    done = moves >= length
    return GameState(f"game {game} room {room}", () if done else actions, float(room), 1000.0, moves, done)


def outcome_of(room: int, k: int) -> tuple[int, float]:
    """Action ``k`` of room ``r`` leads to room ``3r + k + 1`` (mod 97) and earns ``10r + k``."""
    return (3 * room + k + 1) % 97, 10.0 * room + k


class CountingGame:
    """A game without an end of its own; see :func:`outcome_of`. The score is the room's number.

    Args:
        number: a part of the feedback.
        length: number of actions in an episode.
        fail_at: the steps, counted over all episodes, that raise a GameWorkerError.
    """

    def __init__(self, number: int, *, length: int = 7, fail_at: Iterable[int] = ()) -> None:
        self.number, self.length, self.fail_at = number, length, set(fail_at)
        self.steps = self.resets = self.restarts = 0

    async def reset(self) -> GameState:
        self.resets += 1
        self.room, self.moves = FIRST_ROOM, 0
        return state_of(self.number, self.room, moves=0, length=self.length)

    async def step(self, action: str) -> tuple[GameState, float]:
        self.steps += 1
        await asyncio.sleep(0)
        if self.steps in self.fail_at:
            raise GameWorkerError("made to fail")
        _, room, k = action.split()
        assert int(room) == self.room, "an action of another room"
        self.room, reward = outcome_of(self.room, int(k))
        self.moves += 1
        return state_of(self.number, self.room, moves=self.moves, length=self.length), reward

    async def restart(self) -> None:
        self.restarts += 1

    async def close(self) -> None: ...


class RoomEncoder:
    """Score, moves, number of valid actions and a one."""

    def features(self, states: Sequence[GameState]) -> np.ndarray:
        return np.array([[s.score, s.moves, len(s.valid_actions), 1] for s in states], dtype=np.float32)


class WhitespaceTokenizer:
    all_special_tokens = ()
    added_tokens_decoder: ClassVar[dict] = {}
    chat_template = ""

    def apply_chat_template(self, messages, **_):
        return messages[-1]["content"]

    def __call__(self, text, **_):
        return {"input_ids": text.split()}


class LastActionEngine(PriorEngine):
    """A prior of 0.9 for the last valid action. The completion is the end of the prompt."""

    version = 3
    exclusive = False
    calls = 0

    async def priors(self, requests):
        self.calls += 1
        priors = []
        for request in requests:
            probs = np.full(len(request.valid_actions), 0.1 / max(1, len(request.valid_actions) - 1))
            probs[-1] = 0.9
            priors.append(ActionPrior(np.log(probs).astype(np.float32), "score", self.version, request.prompt[-40:]))
        return priors

    def take_statistics(self):
        return {}


def make_player(**changes) -> Player:
    """A player with a small untrained world model and :class:`LastActionEngine`.

    Args:
        changes: groups of settings on top of :data:`SETTINGS`.
    """
    settings = make_settings(SETTINGS, changes)
    torch.manual_seed(0)
    timeline = Timeline()
    return Player(
        settings,
        policy=PriorZeroPolicy(settings, feature_size=FEATURE_SIZE, device="cpu", llm=None),
        encoder=RoomEncoder(),
        indexer=ActionVocabulary(settings.env.action_space_size),
        prior=RetryingPrior(LastActionEngine(), PriorSettings(attempts=1, backoff_s=0, timeout_s=5), timeline=timeline),
        style=prompt_style(settings),
        tokenizer=WhitespaceTokenizer(),
        world_model_thread=OwnerThread("world-model", timeline),
        timeline=timeline,
    )


def make_collector(
    *,
    num_games: int = 3,
    different: int = 1,
    groups: int = 1,
    length: int = 7,
    fail_at: Iterable[int] = (),
    best_episodes: BestEpisodes | None = None,
    **changes,
) -> tuple[Collector, list[CountingGame], Player]:
    """A collector, its games and its player.

    Args:
        num_games: number of environments.
        different: number of different games.
        groups: number of groups.
        length: number of actions in an episode.
        fail_at: the steps of game 1 that fail.
        best_episodes: an argument of the collector.
        changes: groups of settings on top of :data:`SETTINGS`.
    """
    player = make_player(**changes)
    games = [CountingGame(g, length=length, fail_at=fail_at if g == 1 else ()) for g in range(num_games)]
    collector = Collector(
        games,
        player=player,
        seed=np.random.SeedSequence(0),
        groups=groups,
        games=[f"counting {n}" for n in range(different)],
        best_episodes=best_episodes,
    )
    return collector, games, player


def collect(collector: Collector, steps: int) -> Collected:
    """What a complete call of ``collect`` returns."""
    collected = asyncio.run(collector.collect(steps))
    assert collected is not None
    return collected


def records_of(collected: Collected) -> list[StepRecord]:
    return [record for segment in collected.segments for record in segment.records]


def num_pending(collector: Collector) -> list[int]:
    """Number of decisions of each environment that are in no segment yet."""
    return [len(numbers) for numbers in collector.state_dict(RecordTable())["pending"]]


def evaluate(
    player: Player, mode: EvalMode, *, games: Sequence[CountingGame], episodes: int, seed: int = 0
) -> Evaluation:
    evaluator = Evaluator("counting", games, player=player, episodes=episodes, seed=seed)
    return asyncio.run(evaluator.evaluate(mode))
