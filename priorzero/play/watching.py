"""Plays single episodes to be watched, with the search trees of all decisions."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np

from priorzero.envs import GameWorker
from priorzero.play.evaluator import MODE_ARGUMENTS
from priorzero.play.memory import GameMemory
from priorzero.play.player import Player
from priorzero.play.transcript import Transcript, TranscriptStep, transcript, transcript_step
from priorzero.settings import EvalMode


class Viewer:
    """Follows an episode. This one shows nothing and takes the agent's actions.

    Attributes:
        is_human: a person chooses the actions.
    """

    is_human = False

    async def choose(self, step: TranscriptStep) -> int | None:
        """The position of the action to take, or None to end the episode. ``step`` has no reward yet."""
        return step["chosen"]

    def show(self, step: TranscriptStep) -> None:
        """The action was taken, and its reward is known."""

    def end(self, episode: Transcript) -> None:
        """The episode has ended."""


async def play_episode(
    worker: GameWorker,
    player: Player,
    *,
    game: str,
    mode: EvalMode,
    rng: np.random.Generator,
    viewer: Viewer,
    memory: GameMemory | None = None,
) -> Transcript | None:
    """Play one episode without exploration, as an evaluation does. The player's action vocabulary is not changed.

    Args:
        worker: a process that plays the game.
        player: makes the decisions.
        game: name of the game.
        mode: the agent that plays.
        rng: generator for the modes that sample their actions.
        viewer: follows the episode.
        memory: what training taught about the game, for the prompts.

    Returns:
        The transcript; None if the viewer ended the episode.

    Raises:
        GameWorkerError: the game failed.
    """
    player = copy.copy(player)
    player.indexer = copy.deepcopy(player.indexer)
    episode = player.new_episode(0, await worker.reset(), game=game, rng=rng, memory=memory)
    steps = episode.recording = []
    while not episode.state.done:
        [decision] = await player.decide([episode], **MODE_ARGUMENTS[mode])
        chosen = await viewer.choose(transcript_step(decision, reward=math.nan))
        if chosen is None:
            return None
        if chosen != decision.chosen:
            decision = dataclasses.replace(decision, chosen=chosen, behaviour_prob=1.0)
        state, reward = await worker.step(decision.action_text)
        steps.append(transcript_step(decision, reward=reward))
        [features] = player.features([state])
        episode.advance(decision, reward=reward, state=state, features=features)
        viewer.show(steps[-1])
    played = transcript(steps, final=episode.state, total_reward=episode.total_reward, settings=player.settings)
    viewer.end(played)
    return played
