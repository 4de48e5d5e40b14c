"""Environment steps for each second of collection, compared with a straightforward implementation. Takes four minutes.

    python scripts/bench_loop.py [--steps N]

Both implementations collect the same steps of the same games from the same seeds, with small models and
search and four games at the same time. The package's is the collector as in training, with an empty cache of valid
actions. The reference

- processes the whole prompt again for every action,
- runs one search for each game,
- encodes all observations of a game's context again for each decision,
- searches the valid actions of every state (with two threads, as the package does), and plays in this process.

The results are equal if prompts, commands, rewards and visit counts are the same and the priors differ by less than
1e-4. Zork I is included, with the default prompt settings, if PRIORZERO_GAMES contains it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_prompts import logprobs_one_prompt_per_action
from bench_tools import SMALL_SETTINGS, Row, at_least, print_table, report, seconds
from loguru import logger

from priorzero.agent import Agent, make_agent
from priorzero.config import resolve_settings
from priorzero.envs import GameSpec, make_game, make_workers, resolve_game
from priorzero.envs.limits import episode_steps
from priorzero.llm.engines import PriorBuilder
from priorzero.play.collector import Collector
from priorzero.play.episode import Episode
from priorzero.play.player import Player
from priorzero.search.base import Root, SearchResult
from priorzero.settings import EnvSettings, LLMSettings, Settings
from priorzero.types import ActionPrior, GameState, PriorRequest, StepRecord, UserError

NUM_GAMES = 4
TOLERANCE = 1e-4  # of the priors' log-probabilities
PROMPT_SETTINGS = ("history_length", "history_chars", "observation_chars", "list_commands", "prompt_max_len")


# ---- the reference ----


class ReferenceEngine:
    """Processes the whole prompt again for every action, and caches nothing."""

    exclusive = True
    version = 0

    def __init__(self, builder: PriorBuilder) -> None:
        self._builder = builder

    async def ready(self) -> None: ...

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        return [self._prior(request) for request in requests]

    def _prior(self, request: PriorRequest) -> ActionPrior:
        logprobs = logprobs_one_prompt_per_action(self._builder.llm, self._builder.row(request))
        return self._builder.from_logprobs(logprobs, version=0)


class ReferencePolicy:
    """Runs one search for each root."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self.lightzero_config = policy.lightzero_config

    def search(self, roots: Sequence[Root], *, num_actions: int) -> list[SearchResult]:
        return [self._policy.search([root], num_actions=num_actions)[0] for root in roots]


class ReferencePlayer(Player):
    """Encodes all observations of a game's context again for each decision."""

    def features(self, states: Sequence[GameState]) -> np.ndarray:
        self.encoder._cache.clear()
        return super().features(states)

    async def decide(self, episodes: Sequence[Episode], **options: Any) -> Any:
        for episode in episodes:
            for _ in episode.features:
                self.features([episode.state])
        return await super().decide(episodes, **options)


class ReferenceWorker:
    """A game in this process that does not keep valid actions."""

    def __init__(self, spec: GameSpec, *, seed: int, env: EnvSettings) -> None:
        self._game: Any = make_game(
            spec,
            seed=seed,
            max_episode_steps=episode_steps(env, spec),
            look_and_inventory=env.look_and_inventory,
            drop_inert_commands=env.drop_inert_commands,
            valid_actions="exact",
        )

    def _clear_cache(self) -> None:
        if hasattr(self._game, "_known_actions"):
            self._game._known_actions.clear()

    async def start(self) -> None: ...

    async def reset(self) -> GameState:
        self._clear_cache()
        return self._game.reset()

    async def step(self, action: str) -> tuple[GameState, float]:
        self._clear_cache()
        return self._game.step(action)

    async def close(self) -> None:
        self._game.close()


def use_reference(agent: Agent, settings: Settings, spec: GameSpec) -> list[Any]:
    """Replace the parts of an agent by those of the reference; returns the games."""
    player: Any = agent.player
    player.prior.engine = ReferenceEngine(player.prior.engine.builder)
    player.policy = ReferencePolicy(player.policy)
    player.__class__ = ReferencePlayer
    return [ReferenceWorker(spec, seed=e, env=settings.env) for e in range(NUM_GAMES)]


# ---- measurement ----


def collect(settings: Settings, *, steps: int, reference: bool) -> tuple[float, list[StepRecord]]:
    """Collect some steps. Returns the seconds, without loading and starting, and the decisions in order."""
    spec = resolve_game(settings.run.env_id)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        os.environ["PRIORZERO_ACTION_CACHE"] = "off" if reference else f"{folder}/valid_actions.sqlite3"
        agent = make_agent(
            settings,
            device=torch.device("cpu"),
            buffer_seed=np.random.SeedSequence(0),
            vllm_log=Path(folder) / "vllm.log",
        )
        if reference:
            workers = use_reference(agent, settings, spec)
        else:
            workers = make_workers(settings, [spec], count=NUM_GAMES, first_seed=0)
        collector = Collector(workers, player=agent.player, seed=np.random.SeedSequence(1))
        records: list[StepRecord] = []
        add_statistics = collector.collected.add_statistics

        def record_decision(decision: Any, record: StepRecord) -> None:
            records.append(record)
            add_statistics(decision, record)

        collector.collected.add_statistics = record_decision
        for worker in workers:
            runner.run(worker.start())
        spent, _ = seconds(lambda: runner.run(collector.collect(steps)), repeats=1)
        for worker in workers:
            runner.run(worker.close())
        agent.world_model_thread.close()
        agent.llm_thread.close()
    return spent, records


def same_decisions(ours: Sequence[StepRecord], reference: Sequence[StepRecord]) -> bool:
    """Whether prompts, commands, rewards, visit counts and priors agree."""
    return len(ours) == len(reference) and all(
        (a.prompt, a.action_text, a.reward) == (b.prompt, b.action_text, b.reward)
        and np.abs(a.prior.logprobs - b.prior.logprobs).max() < TOLERANCE
        and np.array_equal(a.visit_counts, b.visit_counts)
        for a, b in zip(ours, reference, strict=True)
    )


def games(steps: int | None) -> list[tuple[str, dict[str, Any], int]]:
    """Name, settings and number of steps of each game."""
    game = "textworld:simple?seed=7"
    found = [(f"{game}, short prompts", {"run": {"env_id": game}}, steps or 24)]
    default_prompt = {key: getattr(LLMSettings(), key) for key in PROMPT_SETTINGS}
    try:
        resolve_game("zork1.z5")
        found.append(("zork1.z5, default prompt", {"run": {"env_id": "zork1.z5"}, "llm": default_prompt}, steps or 16))
    except UserError as error:
        print(f"zork1.z5 is skipped: {str(error).splitlines()[0]}")
    return found


def main() -> int:
    """Returns the exit code: 0 if all results are equal, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=at_least(1), help="steps of each game (default: 24, Zork I 16)")
    options = parser.parse_args()
    logger.remove()
    rows, rates = [], {}
    for name, layer, steps in games(options.steps):
        common = {"env": {"collector_env_num": NUM_GAMES}, "prior": {"timeout_s": 600.0, "engine": "transformers"}}
        settings = resolve_settings(SMALL_SETTINGS, layer, common)
        ours_s, ours = collect(settings, steps=steps, reference=False)
        reference_s, reference = collect(settings, steps=steps, reference=True)
        rows.append(Row(f"{len(ours)} steps of {name}", ours_s, reference_s, 10, same_decisions(ours, reference)))
        rates[name] = {"steps/s": len(ours) / ours_s, "reference": len(reference) / reference_s}
    print_table("environment steps a second", rates)
    return report("loop", rows, rates=rates)


if __name__ == "__main__":
    sys.exit(main())
