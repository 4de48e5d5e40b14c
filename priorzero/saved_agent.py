"""Loads a trained agent from a checkpoint or an export, to play any games. It does not learn, and no file is changed.

If the seeds are equal, it makes the decisions of the evaluation that its run made before it wrote the checkpoint:

    prepared = prepare_agent("data_priorzero/NAME", games="zork1.z5")
    async with loaded_agent(prepared) as saved:
        decisions = await saved.player.decide(...)
    evaluations = await evaluate_agent(prepared)
    transcripts = await watch_agent(prepared, mode="world_model", games=prepared.games, episodes=1)
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from loguru import logger

from priorzero.agent import (
    Agent,
    evaluation_seed,
    make_agent,
    make_evaluation_workers,
    make_evaluators,
    set_num_threads,
)
from priorzero.envs import GameSpec
from priorzero.llm.engine_choice import choose_engine
from priorzero.llm.models import choose_device, warn_of_long_prompts
from priorzero.play.evaluator import Evaluations
from priorzero.play.memory import GameMemory
from priorzero.play.player import Player
from priorzero.play.transcript import HUMAN, EvaluationTranscript
from priorzero.play.watching import Viewer, play_episode
from priorzero.preflight import AgentPreparation
from priorzero.run_state import load_world_model_state
from priorzero.runs.checkpoint import Checkpoint
from priorzero.runs.errors import disk_advice, more_time, out_of_memory
from priorzero.runs.exported import read_play_state
from priorzero.runs.saved import was_removed
from priorzero.runtime.activity import announced
from priorzero.runtime.random_state import seed_globals
from priorzero.settings import EvalMode, Settings
from priorzero.types import EngineError, GameWorkerError, UserError


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
    with _vllm_log() as vllm_log:
        with _removal_reported(checkpoint):
            agent = make_agent(settings, device=device, buffer_seed=buffer_seed, vllm_log=vllm_log)
        async with _started(agent, prepared, settings=settings) as saved:
            yield saved


@contextmanager
def _removal_reported(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise UserError in place of the errors of a checkpoint that its run has removed (``run.keep_checkpoints``)."""
    try:
        yield
    except (UserError, EngineError, OSError) as error:
        if not was_removed(checkpoint):
            raise
        raise UserError(
            f"{checkpoint.folder}: this checkpoint was removed while it was loaded. A run in progress keeps its last "
            "run.keep_checkpoints only; type the command again with the run's folder"
        ) from error


@contextmanager
def _vllm_log() -> Iterator[Path]:
    """A file for vLLM's log. It is kept after an error of the engine if it is not empty, and the error names it."""
    descriptor, name = tempfile.mkstemp(prefix="priorzero-vllm-", suffix=".log")
    os.close(descriptor)
    path, is_kept = Path(name), False
    try:
        yield path
    except EngineError as error:
        is_kept = path.stat().st_size > 0
        if is_kept and name not in str(error):
            raise EngineError(f"{error}; the log of vLLM is {name}") from error
        raise
    finally:
        if not is_kept:
            path.unlink()


@asynccontextmanager
async def _started(agent: Agent, prepared: AgentPreparation, *, settings: Settings) -> AsyncIterator[SavedAgent]:
    """Within the block, the agent has the state of its checkpoint, and its engine runs."""
    checkpoint = prepared.checkpoint
    try:
        with announced("loading the checkpoint"), _removal_reported(checkpoint):
            memories = _load_state(checkpoint, agent=agent, trained=prepared.trained)
        if agent.llm is not None and agent.engine is not None:
            warn_of_long_prompts(agent.llm, settings.llm)
            starting = f"starting {'vLLM' if settings.prior.engine == 'vllm' else 'the LLM'}"
            with announced(starting), _removal_reported(checkpoint):
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


async def watch_agent(
    prepared: AgentPreparation,
    *,
    mode: EvalMode,
    games: Sequence[GameSpec],
    episodes: int,
    make_viewer: Callable[[str], Viewer] = lambda title: Viewer(),
) -> list[EvaluationTranscript]:
    """Load a trained agent and let it play single episodes, with the seeds of an evaluation.

    Args:
        prepared: the agent.
        mode: the agent that plays.
        games: those of ``prepared`` that are played.
        episodes: number of episodes of each game.
        make_viewer: from the title of an episode to what follows it. Its ``is_human`` says whether a person plays.

    Returns:
        The transcripts. An episode that the viewer ends is the last one and is left out.

    Raises:
        GameWorkerError: a game failed.
        UserError, EngineError: as :func:`loaded_agent`.
    """
    async with loaded_agent(prepared) as saved:
        transcripts: list[EvaluationTranscript] = []
        for game in games:
            if not await _watch_game(saved, game, transcripts, mode=mode, episodes=episodes, make_viewer=make_viewer):
                break
        return transcripts


async def _watch_game(
    saved: SavedAgent,
    game: GameSpec,
    transcripts: list[EvaluationTranscript],
    *,
    mode: EvalMode,
    episodes: int,
    make_viewer: Callable[[str], Viewer],
) -> bool:
    """Play the episodes of one game and append their transcripts; returns False if the viewer ended one."""
    settings = saved.settings
    workers = make_evaluation_workers(settings, game, count=episodes)
    seeds = np.random.SeedSequence(evaluation_seed(settings)).spawn(episodes)
    for number, (worker, seed) in enumerate(zip(workers, seeds, strict=True), 1):
        viewer = make_viewer(f"{game.name}: episode {number} of {episodes}")
        rng = np.random.default_rng(seed)
        try:
            with announced(f"{game.name}: playing episode {number} of {episodes}"):
                played = await play_episode(
                    worker, saved.player, game=game.name, mode=mode, rng=rng, viewer=viewer, memory=saved.memory(game)
                )
        finally:
            await worker.close()
        if played is None:
            return False
        transcripts.append({
            "mode": HUMAN if viewer.is_human else mode, "game": game.name, "unseen": game in saved.unseen,
            "episode": number, "env_step": saved.checkpoint.manifest.get("counters", {}).get("env_step", 0),
            "seed": settings.run.seed, **played,
        })  # fmt: skip
    return True


@contextmanager
def agent_errors(prepared: AgentPreparation) -> Iterator[None]:
    """Raise UserError in place of the errors of a trained agent: of games, engines, files and the GPU's memory."""
    settings, folder = prepared.settings, prepared.checkpoint.folder
    try:
        yield
    except GameWorkerError as error:
        raise UserError(f"the game failed: {error}{more_time(error, settings)}") from error
    except EngineError as error:
        may_be_vllm = settings.prior.engine != "transformers"
        advice = "; to play without vLLM, type --set prior.engine=transformers" if may_be_vllm else ""
        raise UserError(f"the LLM engine failed: {error}{advice}") from error
    except RuntimeError as error:
        problem = out_of_memory(error, settings)
        if problem is None:
            raise
        raise UserError(f"{problem}, or type --set run.device=cpu") from error
    except OSError as error:
        repair = disk_advice(error, folder=folder)
        if repair is None:
            raise
        raise UserError(f"{folder}: a file cannot be used ({error}); {repair}, then type the command again") from error
