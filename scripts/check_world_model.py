"""Whether a world model knows what will happen, on episodes that it has not learned from.

    python scripts/check_world_model.py data_priorzero/NAME                  # the newest checkpoint of a run
    python scripts/check_world_model.py data_priorzero/NAME --env_steps 500 --seed 9

Plays with the checkpoint's parameters, with exploration and a seed of its own, learns nothing, and compares for each
decision the reward that the model predicts for the command given with the one that came, and the value that it predicts
for the state, and that its search finds, with the discounted return that followed (complete episodes only). All are in
scaled points (``train.reward_scale``). What came is the game's points alone: where the run also learned from
``train.novelty_bonus`` or ``train.loss_penalty``, which depend on what was seen by then, the predictions hold them as
well, and differ from what came by that much: a command may be expected to earn something for its bonus alone. Prints
a table, and writes OUT/world_model.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from bench_tools import RESULTS, at_least, exit_code, make_folder

from priorzero.agent import Agent, load_agent, make_workers
from priorzero.envs import resolve_games
from priorzero.llm.models import choose_device
from priorzero.play.collector import Collector
from priorzero.runs.checkpoint import load_world_model, read_checkpoint, saved_checkpoints
from priorzero.runtime.random_state import seed_globals
from priorzero.search.base import Root
from priorzero.types import StepRecord, UserError
from priorzero.world_model.returns import returns_to_go


def episodes_of(segments: Sequence[Any]) -> list[list[StepRecord]]:
    """The complete episodes among some segments, each in order; one that was cut is complete as well."""
    by_number: dict[int, list[StepRecord]] = {}
    for segment in segments:
        for record in segment.records:
            by_number.setdefault(record.episode, []).append(record)
    return [records for records in by_number.values() if records[0].step == 0 and records[-1].done]


def predicted_rewards(policy: Any, records: Sequence[StepRecord]) -> np.ndarray:
    """What the world model expects of each command of an episode, given the decisions before it: ``[n]``."""
    import torch

    observations = policy.inference.context_length // 2
    roots = []
    for t in range(len(records)):
        past = records[max(0, t - observations + 1) : t + 1]
        actions = np.array([record.action_index for record in past[:-1]], dtype=np.int64)
        features = np.stack([record.features for record in past])
        roots.append(Root(features=features, actions=actions, legal_actions=records[t].action_indices))
    with torch.no_grad():
        contexts = policy.inference.root_contexts(roots)
        _, rewards = policy.inference.step(contexts, np.array([record.action_index for record in records]))
    return np.asarray(rewards)


def compare(predicted: np.ndarray, happened: np.ndarray) -> dict[str, float]:
    """Mean absolute error, that of always saying the mean, and the correlation (0 where either does not vary)."""
    varies = predicted.std() > 1e-9 and happened.std() > 1e-9
    return {
        "mean_absolute_error": float(np.abs(predicted - happened).mean()),
        "error_of_the_mean": float(np.abs(happened.mean() - happened).mean()),
        "correlation": float(np.corrcoef(predicted, happened)[0, 1]) if varies else 0.0,
    }


async def play(agent: Agent, settings: Any, *, env_steps: int, seed: int) -> list[list[StepRecord]]:
    games = resolve_games(settings.run.env_id)
    workers = make_workers(settings, games, count=settings.env.collector_env_num, first_seed=seed)
    collector = Collector(
        workers,
        player=agent.player,
        config=agent.config,
        seed=np.random.SeedSequence(seed),
        num_games=len(games),
    )
    try:
        collected = await collector.collect(env_steps)
    finally:
        await asyncio.gather(*(worker.close() for worker in workers))
        if agent.engine is not None:
            await agent.engine.close()
    assert collected is not None
    return episodes_of(collected.segments)


def check(folder: Path, *, env_steps: int, seed: int) -> dict[str, Any]:
    """All comparisons.

    Raises:
        UserError: the folder holds no checkpoint, or a damaged one, or no episode was completed.
    """
    found = [folder] if (folder / "world_model.pt").is_file() else saved_checkpoints(folder)
    if not found:
        raise UserError(f"{folder}: holds no checkpoint; name a run's folder, or one under its checkpoints")
    try:
        settings = read_checkpoint(found[-1]).settings
    except ValueError as error:
        raise UserError(f"{found[-1]}: cannot be used ({error}); name another checkpoint or run") from error
    if settings.prior.enabled:
        settings.llm.path = str(found[-1] / "llm")
    seeds = np.random.SeedSequence(seed).spawn(4)
    seed_globals(seeds[:3])
    with tempfile.TemporaryDirectory() as scratch:
        agent = load_agent(
            settings, device=choose_device(settings.run.device), buffer_seed=seeds[3], folder=Path(scratch)
        )
        load_world_model(found[-1], policy=agent.policy, indexer=agent.player.indexer)
        episodes = asyncio.run(play(agent, settings, env_steps=env_steps, seed=seed))
    if not episodes:
        longest = settings.env.max_episode_steps * settings.env.collector_env_num
        raise UserError(f"no episode was completed in {env_steps} steps; {longest} are enough: --env_steps {longest}")
    scale, discount = settings.train.reward_scale, settings.search.discount_factor
    happened = [np.array([r.reward for r in e]) * scale for e in episodes]
    rewards = np.concatenate(happened)
    predicted = np.concatenate([predicted_rewards(agent.policy, e) for e in episodes])
    returns = np.concatenate([returns_to_go(r, discount=discount) for r in happened])
    records = [record for e in episodes for record in e]
    earned = rewards > 0
    smallest = rewards[earned].min(initial=np.inf)
    return {
        "checkpoint": found[-1].name,
        "game": settings.run.env_id,
        "episodes": len(episodes),
        "decisions": len(records),
        "decisions_that_earned": int(earned.sum()),
        "of_these_expected": float((predicted[earned] > rewards[earned] / 2).mean()) if earned.any() else 0.0,
        "expected_of_the_others": float((predicted[~earned] > smallest / 2).sum() / max(1, (~earned).sum())),
        "reward": compare(predicted, rewards),
        "value": compare(np.array([r.predicted_value for r in records]), returns),
        "searched_value": compare(np.array([r.root_value for r in records]), returns),
    }


def run(options: argparse.Namespace) -> None:
    """Compare, print and write.

    Raises:
        UserError: as :func:`check`, or the folder for the figures cannot be made.
    """
    make_folder(options.out)
    found = check(options.run, env_steps=options.env_steps, seed=options.seed)
    print(f"{found['game']}, {found['checkpoint']}: {found['decisions']} decisions of {found['episodes']} episodes")
    print(
        f"{found['decisions_that_earned']} decisions earned points, of which {found['of_these_expected']:.0%} were "
        f"expected to; so were {found['expected_of_the_others']:.0%} of the others"
    )
    print("\n| | mean absolute error | of the mean | correlation |\n|---|---|---|---|")
    for name in ("reward", "value", "searched_value"):
        row = found[name]
        errors = f"{row['mean_absolute_error']:.3f} | {row['error_of_the_mean']:.3f}"
        print(f"| {name} | {errors} | {row['correlation']:.2f} |")
    (options.out / "world_model.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 something to put right."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path, help="a run's folder, or that of a checkpoint")
    parser.add_argument("--env_steps", type=at_least(1), default=400, help="to play (default: 400)")
    parser.add_argument("--seed", type=at_least(0), default=10_007, help="of the games and of exploration")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return exit_code(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
