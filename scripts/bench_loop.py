"""Environment steps a second of the whole collection, against all of the straightforward ways together. Four minutes.

    python scripts/bench_loop.py

Both collect the same steps of the same games with the quick test's models and search, four games side by side, from
the same seeds. Ours is the collector as it trains, with an empty cache of valid actions. The plain one sends the whole
prompt again for every action, searches for one game at a time, encodes as many observations again at every decision as
a game's context holds, and looks for the valid actions of every state (with two threads, as ours does); it plays in
this process. Equal means: the same
prompts, commands, rewards and visit counts, and priors within 1e-4. Zork I is played where PRIORZERO_GAMES holds it,
with the prompt that the defaults make.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np
import torch
from bench_prior import one_prompt_an_action
from bench_tools import Row, print_table, report, seconds
from loguru import logger

from priorzero import train
from priorzero.config import OPTIONS, PRESETS, resolve_settings
from priorzero.envs import GameSpec, resolve_game
from priorzero.envs.games import make_game
from priorzero.llm.engines import PriorBuilder
from priorzero.play.collector import Collector
from priorzero.play.player import Player
from priorzero.search.base import Root, SearchResult
from priorzero.types import ActionPrior, GameState, PriorRequest, UserError

# Prompt, command, reward, log-probabilities of the prior, visit counts.
Noted = tuple[str, str, float, np.ndarray, np.ndarray]

GAMES = 4


class PlainEngine:
    """One full prompt for each action, nothing remembered."""

    exclusive = True
    version = 0

    def __init__(self, builder: PriorBuilder) -> None:
        self.builder = builder

    async def ready(self) -> None: ...

    async def priors(self, requests: Sequence[PriorRequest]) -> list[ActionPrior]:
        return [self._prior(request) for request in requests]

    def _prior(self, request: PriorRequest) -> ActionPrior:
        row = self.builder.row(request)
        ends = np.cumsum([len(c) for c in row.completions])
        logprobs = np.split(one_prompt_an_action(self.builder.llm, row), ends[:-1])
        return self.builder.from_logprobs(logprobs, version=0)


class PlainPolicy:
    """A search for each root."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def search(self, roots: Sequence[Root], *, num_actions: int) -> list[SearchResult]:
        return [self._policy.search([root], num_actions=num_actions)[0] for root in roots]


class PlainPlayer(Player):
    """Encodes at every decision as many observations as the context holds."""

    def features(self, state: GameState) -> np.ndarray:
        self.encoder._cache.clear()
        return super().features(state)

    def _root(self, lane: Any, *arguments: Any, **keywords: Any) -> Root:
        for _ in lane.features:
            self.features(lane.state)
        return super()._root(lane, *arguments, **keywords)


class PlainWorker:
    """A game in this process that forgets the valid actions it has found."""

    def __init__(self, spec: GameSpec, *, seed: int, env: Any) -> None:
        self._game = make_game(
            spec,
            seed=seed,
            max_episode_steps=env.max_episode_steps,
            look_and_inventory=env.look_and_inventory,
            drop_inert_commands=env.drop_inert_commands,
        )

    def _forget(self) -> None:
        if hasattr(self._game, "_known_actions"):
            self._game._known_actions.clear()

    async def reset(self) -> GameState:
        self._forget()
        return self._game.reset()

    async def step(self, action: str) -> tuple[GameState, float]:
        self._forget()
        return self._game.step(action)

    async def close(self) -> None:
        self._game.close()


def collect(settings: Any, *, steps: int, plain: bool) -> tuple[float, list[Noted]]:
    """Seconds of the collection alone, with everything loaded and started, and what was collected."""
    spec = resolve_game(settings.run.env_id)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PRIORZERO_ACTION_CACHE"] = "off" if plain else f"{folder}/valid_actions.sqlite3"
        agent = train.load_agent(
            settings, device=torch.device("cpu"), buffer_seed=np.random.SeedSequence(0), folder=Path(folder)
        )
        player = agent.player
        if plain:
            assert player.prior is not None
            player.prior.engine = PlainEngine(agent.engine.builder)
            player.policy = PlainPolicy(player.policy)
            player.__class__ = PlainPlayer
            workers: list[Any] = [PlainWorker(spec, seed=e, env=settings.env) for e in range(GAMES)]
        else:
            workers = train.make_workers(settings, [spec], count=GAMES, first_seed=0)
        collector = Collector(workers, player=player, config=agent.config, seed=np.random.SeedSequence(1))
        records: list[Noted] = []
        record = collector._record

        def noted(e: int, decision: Any, state: GameState, reward: float, collected: Any) -> None:
            prior, result = decision.prior, decision.result
            records.append((decision.prompt.text, decision.action_text, reward, prior.logprobs, result.visit_counts))
            record(e, decision, state, reward, collected)

        collector._record = noted
        with asyncio.Runner() as runner:
            if not plain:
                for worker in workers:
                    runner.run(worker.start())
            spent, _ = seconds(lambda: runner.run(collector.collect(steps)), repeats=1)
            for worker in workers:
                runner.run(worker.close())
            agent.world_model_thread.close()
            agent.llm_thread.close()
    return spent, records


def equal(ours: Sequence[Noted], plain: Sequence[Noted]) -> bool:
    return len(ours) == len(plain) and all(
        a[:3] == b[:3] and np.abs(a[3] - b[3]).max() < 1e-4 and a[4].tolist() == b[4].tolist()
        for a, b in zip(ours, plain, strict=True)
    )


def main() -> int:
    logger.remove()
    default_prompt = {
        key: OPTIONS["llm"][key].default
        for key in ("history_length", "history_chars", "observation_chars", "list_commands", "prompt_max_len")
    }
    games = [("textworld:simple?seed=7, quick test's prompt", {"run": {"env_id": "textworld:simple?seed=7"}}, 24)]
    try:
        resolve_game("zork1.z5")
        games.append(("zork1.z5, default prompt", {"run": {"env_id": "zork1.z5"}, "llm": default_prompt}, 16))
    except UserError as error:
        print(f"without Zork I: {str(error).splitlines()[0]}")
    rows, rates = [], {}
    for name, layer, steps in games:
        layer = {**layer, "env": {"collector_env_num": GAMES}, "prior": {"timeout_s": 600.0, "engine": "transformers"}}
        settings = resolve_settings(PRESETS["quick_test"], layer)
        ours_s, ours = collect(settings, steps=steps, plain=False)
        plain_s, plain = collect(settings, steps=steps, plain=True)
        rows.append(Row(f"{len(ours)} steps of {name}", ours_s, plain_s, 10, equal(ours, plain)))
        rates[name] = {"steps/s": len(ours) / ours_s, "plain steps/s": len(plain) / plain_s}
    print_table("environment steps a second", rates)
    return report("loop", rows, rates=rates)


if __name__ == "__main__":
    sys.exit(main())
