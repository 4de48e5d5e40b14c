"""Loads a trained agent from a checkpoint or an export, to play any games. It does not learn, and no file is changed.

If the seeds are equal, it makes the decisions of the evaluation that its run made before it wrote the checkpoint:

    prepared = prepare_agent("data_priorzero/NAME", games="zork1.z5")
    async with loaded_agent(prepared) as saved:
        decisions = await saved.player.decide(...)
    evaluations = await evaluate_agent(prepared)
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from loguru import logger

from priorzero.agent import Agent, make_agent, make_evaluators, set_num_threads
from priorzero.envs import GameSpec
from priorzero.llm.engine_choice import choose_engine
from priorzero.llm.models import choose_device, warn_of_long_prompts
from priorzero.play.evaluator import Evaluations
from priorzero.play.memory import GameMemory
from priorzero.play.player import Player
from priorzero.preflight import AgentPreparation
from priorzero.run_state import load_world_model_state
from priorzero.runs.checkpoint import Checkpoint
from priorzero.runs.exported import read_play_state
from priorzero.runtime.activity import announced
from priorzero.runtime.random_state import seed_globals
from priorzero.settings import Settings


@dataclass(frozen=True)
class SavedAgent:
    """A trained agent that was loaded from a checkpoint, and the games that it is to play.

    Attributes:
        checkpoint: where it was loaded from.
        settings: the settings that it plays with.
        agent: both models, the started prior engine and the player. Its replay buffer is empty.
        trained: the games that it was trained on.
        unseen: the other games.
        memories: what the training taught about each game of ``trained``, in this order; empty if the prompts do not
            contain it (``llm.memory_lines``).
    """

    checkpoint: Checkpoint
    settings: Settings
    agent: Agent
    trained: Sequence[GameSpec]
    unseen: Sequence[GameSpec]
    memories: Sequence[GameMemory]

    @property
    def player(self) -> Player:
        """Makes the decisions."""
        return self.agent.player

    def memory(self, game: GameSpec) -> GameMemory | None:
        """The memory for the prompts of one game; None if the agent was not trained on it, or uses none."""
        return dict(zip((g.name for g in self.trained), self.memories, strict=False)).get(game.name)


@asynccontextmanager
async def loaded_agent(prepared: AgentPreparation) -> AsyncIterator[SavedAgent]:
    """Load a trained agent and start its prior engine, which runs until the end of the block.

    The global random generators are seeded with ``run.seed``.

    Raises:
        UserError: a model cannot be loaded, or the settings do not fit the checkpoint.
        EngineError: the prior engine cannot be started.
    """
    checkpoint, settings = prepared.checkpoint, prepared.settings.model_copy(deep=True)
    for note in checkpoint.notes:
        logger.warning(note)
    device = choose_device(settings.run.device)
    if settings.prior.enabled:
        settings.prior.engine = choose_engine(settings, device=device.type)
    set_num_threads(settings, device=device)
    *global_seeds, buffer_seed, _ = np.random.SeedSequence(settings.run.seed).spawn(5)  # as in training
    seed_globals(global_seeds)
    vllm_log = Path(tempfile.gettempdir()) / f"priorzero-vllm-{os.getpid()}.log"
    agent = make_agent(settings, device=device, buffer_seed=buffer_seed, vllm_log=vllm_log)
    try:
        with announced("loading the checkpoint"):
            memories = _load_state(checkpoint, agent=agent, trained=prepared.trained)
        if agent.llm is not None and agent.engine is not None:
            warn_of_long_prompts(agent.llm, settings.llm)
            with announced(f"starting {'vLLM' if settings.prior.engine == 'vllm' else 'the LLM'}"):
                await agent.engine.ready()
        yield SavedAgent(checkpoint, settings, agent, prepared.trained, prepared.unseen, memories)
    finally:
        if agent.engine is not None:
            await agent.engine.close()
        agent.world_model_thread.close()
        agent.llm_thread.close()


def _load_state(checkpoint: Checkpoint, *, agent: Agent, trained: Sequence[GameSpec]) -> list[GameMemory]:
    """Load everything but the LLM, which :func:`make_agent` has loaded; returns the memories of the games ``trained``.

    A checkpoint of a run on a Ray cluster has neither learned weights of the prior nor memories, since they are in its
    collectors.
    """
    load_world_model_state(checkpoint.folder, policy=agent.policy, indexer=agent.indexer)
    uses_memory = agent.prior is not None and agent.player.settings.llm.memory_lines > 0
    state = read_play_state(checkpoint.folder, checkpoint.manifest)
    if agent.player.prior_weights.learns:  # otherwise prior.alpha was changed to a number
        if state.prior_weights_state is not None:
            agent.player.prior_weights.load_state_dict(state.prior_weights_state)
        elif agent.prior is not None:
            logger.warning(
                "the checkpoint is from a run on a Ray cluster and does not contain the learned weights of the prior "
                "(prior.alpha=auto). The initial weight is used; --set prior.alpha=NUMBER sets another one"
            )
    if not uses_memory:
        return []
    # There are no memories if the run did not use them.
    return [GameMemory(dict(state.memories.get(game.name, {}))) for game in trained]


async def evaluate_agent(prepared: AgentPreparation, *, step_limit: int | None = None) -> Evaluations:
    """Load a trained agent and evaluate it on its games, in the modes ``eval.modes``.

    A game that cannot be played is left out, and this is logged. With the settings of its run, the result equals the
    evaluation of the run at the step of the checkpoint.

    Args:
        prepared: the agent and its games.
        step_limit: as of :class:`~priorzero.play.evaluator.Evaluator`.

    Raises:
        UserError, EngineError: as :func:`loaded_agent`.
    """
    async with loaded_agent(prepared) as saved:
        evaluators = make_evaluators(
            saved.settings, games=saved.trained, unseen=saved.unseen, player=saved.player, step_limit=step_limit
        )
        try:
            return await evaluators.evaluate(saved.memories)
        finally:
            await asyncio.gather(*(worker.close() for worker in evaluators.workers))
