"""Compare a world model's predictions with what happens, in episodes that it was not trained on.

    python scripts/check_world_model.py data_priorzero/NAME                  # the newest checkpoint of a run
    python scripts/check_world_model.py data_priorzero/NAME --env_steps 500 --seed 9

The script plays with the checkpoint's parameters, with exploration and its own seed, and learns nothing. For each
decision it compares the predicted reward of the chosen action with the reward. For each state it compares the predicted
value and the value of the search with the discounted return (complete episodes only). All figures are in scaled points
(``train.reward_scale``).

The rewards and returns are the game's points only. If the run also learned from ``train.novelty_bonus`` or
``train.loss_penalty``, its predictions include them and differ by that amount. An action may then have a predicted
reward for its bonus alone.

The script prints a table and writes OUT/world_model.json.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_tools import RESULTS, at_least, exit_code, make_folder, write_json

from priorzero.agent import Agent, make_agent
from priorzero.envs import make_workers, resolve_games
from priorzero.llm.models import choose_device
from priorzero.play.collector import Collector
from priorzero.policy import PriorZeroPolicy
from priorzero.run_state import load_world_model_state
from priorzero.runs.checkpoint import Checkpoint, read_checkpoint, saved_checkpoints
from priorzero.runtime.random_state import seed_globals
from priorzero.search.base import Root
from priorzero.settings import Settings
from priorzero.types import StepRecord, UserError
from priorzero.world_model.returns import returns_to_go
from priorzero.world_model.segment import PriorZeroGameSegment

Episode = Sequence[StepRecord]


def complete_episodes(segments: Sequence[PriorZeroGameSegment]) -> list[Episode]:
    """The complete episodes of some segments, truncated ones included."""
    by_number: dict[int, list[StepRecord]] = {}
    for segment in segments:
        for record in segment.records:
            by_number.setdefault(record.episode, []).append(record)
    return [records for records in by_number.values() if records[0].step == 0 and records[-1].done]


def predict_rewards(policy: PriorZeroPolicy, episode: Episode) -> np.ndarray:
    """The predicted reward of each chosen action of an episode, ``[n]``."""
    num_observations = policy.inference.context_length // 2
    roots = []
    for t in range(len(episode)):
        past = episode[max(0, t - num_observations + 1) : t + 1]
        actions = np.array([record.action_index for record in past[:-1]], dtype=np.int64)
        features = np.stack([record.features for record in past])
        roots.append(Root(features=features, actions=actions, legal_actions=episode[t].action_indices))
    with torch.no_grad():
        contexts = policy.inference.root_contexts(roots)
        _, rewards = policy.inference.step(contexts, np.array([record.action_index for record in episode]))
    return np.asarray(rewards)


def compare(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Mean absolute error, that of always predicting the mean, and the correlation (0 if either is constant)."""
    varies = predicted.std() > 1e-9 and actual.std() > 1e-9
    return {
        "mean_absolute_error": float(np.abs(predicted - actual).mean()),
        "error_of_the_mean": float(np.abs(actual.mean() - actual).mean()),
        "correlation": float(np.corrcoef(predicted, actual)[0, 1]) if varies else 0.0,
    }


def figures(policy: PriorZeroPolicy, settings: Settings, episodes: Sequence[Episode]) -> dict[str, Any]:
    """All comparisons."""
    scale, discount = settings.train.reward_scale, settings.search.discount_factor
    scaled = [np.array([record.reward for record in episode]) * scale for episode in episodes]
    rewards = np.concatenate(scaled)
    predicted = np.concatenate([predict_rewards(policy, episode) for episode in episodes])
    returns = np.concatenate([returns_to_go(own, discount=discount) for own in scaled])
    records = [record for episode in episodes for record in episode]
    gained = rewards > 0
    smallest = rewards[gained].min(initial=np.inf)
    return {
        "game": settings.run.env_id,
        "episodes": len(episodes),
        "decisions": len(records),
        "decisions_that_gained_points": int(gained.sum()),
        "of_these_predicted": float((predicted[gained] > rewards[gained] / 2).mean()) if gained.any() else 0.0,
        "predicted_of_the_others": float((predicted[~gained] > smallest / 2).sum() / max(1, (~gained).sum())),
        "reward": compare(predicted, rewards),
        "value": compare(np.array([record.predicted_value for record in records]), returns),
        "searched_value": compare(np.array([record.root_value for record in records]), returns),
    }


async def play(agent: Agent, settings: Settings, *, env_steps: int, seed: int) -> list[Episode]:
    """Collect at least ``env_steps`` steps; return the complete episodes."""
    games = resolve_games(settings.run.env_id)
    workers = make_workers(settings, games, count=settings.env.collector_env_num, first_seed=seed)
    collector = Collector(
        workers,
        player=agent.player,
        seed=np.random.SeedSequence(seed),
        games=[game.name for game in games],
    )
    try:
        collected = await collector.collect(env_steps)
    finally:
        await asyncio.gather(*(worker.close() for worker in workers))
        if agent.engine is not None:
            await agent.engine.close()
    assert collected is not None
    return complete_episodes(collected.segments)


def find_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, or the newest one of a run's folder.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    found = [folder] if (folder / "world_model.pt").is_file() else saved_checkpoints(folder)
    if not found:
        raise UserError(f"{folder}: contains no checkpoint; name the folder of a run or of a checkpoint")
    try:
        return read_checkpoint(found[-1])
    except ValueError as error:
        raise UserError(f"{found[-1]}: cannot be used ({error}); name another checkpoint or run") from error


def check(folder: Path, *, env_steps: int, seed: int) -> dict[str, Any]:
    """Play with a checkpoint and compare.

    Raises:
        UserError: there is no checkpoint, it is damaged, or no episode was completed.
    """
    checkpoint = find_checkpoint(folder)
    settings = checkpoint.settings
    if settings.prior.enabled:
        settings.llm.path, settings.llm.adapter = str(checkpoint.folder / "llm"), ""
    seeds = np.random.SeedSequence(seed).spawn(4)
    seed_globals(seeds[:3])
    with tempfile.TemporaryDirectory() as scratch:
        agent = make_agent(
            settings,
            device=choose_device(settings.run.device),
            buffer_seed=seeds[3],
            vllm_log=Path(scratch) / "vllm.log",
        )
        load_world_model_state(checkpoint.folder, policy=agent.policy, indexer=agent.indexer)
        episodes = asyncio.run(play(agent, settings, env_steps=env_steps, seed=seed))
    if not episodes:
        enough = settings.env.longest_episode * settings.env.collector_env_num
        raise UserError(f"no episode was completed in {env_steps} steps; type --env_steps {enough}, which is enough")
    return {"checkpoint": checkpoint.folder.name, **figures(agent.policy, settings, episodes)}


def run(options: argparse.Namespace) -> None:
    """Compare, print and write.

    Raises:
        UserError: as :func:`check`, or the folder of the file cannot be made.
    """
    make_folder(options.out)
    found = check(options.run, env_steps=options.env_steps, seed=options.seed)
    print(f"{found['game']}, {found['checkpoint']}: {found['decisions']} decisions in {found['episodes']} episodes")
    print(
        f"{found['decisions_that_gained_points']} decisions gained points. This was predicted for "
        f"{found['of_these_predicted']:.0%} of them, and for {found['predicted_of_the_others']:.0%} of the others."
    )
    print("\n| | mean absolute error | error of the mean | correlation |\n|---|---|---|---|")
    for name in ("reward", "value", "searched_value"):
        row = found[name]
        errors = f"{row['mean_absolute_error']:.3f} | {row['error_of_the_mean']:.3f}"
        print(f"| {name} | {errors} | {row['correlation']:.2f} |")
    write_json(options.out / "world_model.json", found)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error that the user can correct."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a run or of a checkpoint")
    parser.add_argument("--env_steps", type=at_least(1), default=400, help="steps to play (default: 400)")
    parser.add_argument("--seed", type=at_least(0), default=10_007, help="seed of games and exploration")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return exit_code(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
