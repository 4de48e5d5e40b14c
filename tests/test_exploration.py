"""What every exploration strategy of ``make_exploration`` must do, and Dirichlet noise."""

from __future__ import annotations

import dataclasses
import io
import typing

import numpy as np
import pytest
import torch

from priorzero.play.exploration import Dirichlet, Exploration, make_exploration
from priorzero.play.novelty import NoveltyCounts
from priorzero.settings import EVAL_MODES, SearchSettings
from priorzero.types import GameState
from tests.helpers.collecting import CountingGame, collect, evaluate, make_collector
from tests.helpers.exploring import ScriptedEpisode, at
from tests.helpers.models import make_settings

STRATEGIES = typing.get_args(SearchSettings.model_fields["exploration"].annotation)
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


def make(name: str) -> tuple[Exploration, list[NoveltyCounts]]:
    """A strategy for two games in which every episode deviates if it can."""
    counts = [NoveltyCounts(), NoveltyCounts()]
    return make_exploration(make_settings({"search": {"exploration": name, "deviation_prob": 1.0}}), counts), counts


def prior_of(num_actions: int) -> np.ndarray:
    probs = np.arange(1.0, num_actions + 1)
    return probs / probs.sum()


class Corridor:
    """Episodes in a corridor with five rooms; the last one has a point. The actions are sampled from the noise.

    Attributes:
        noises: the noise of each decision, and the actions that may be taken.
    """

    def __init__(self, name: str, *, env: int) -> None:
        self.strategy, self.counts = make(name)
        self.rng, self.env = np.random.default_rng(env), env
        self.noises: list[list[float]] = []
        self.begin()

    def state(self, room: int, *, moves: int) -> GameState:
        actions = ("right", "wait", "left", "jump")[: 2 + room % 3]
        state = at(f"room {room}", float(room == 4), actions)
        return dataclasses.replace(state, moves=moves, done=room == 4 or moves == 12)

    def begin(self) -> None:
        self.room = 0
        self.episode = ScriptedEpisode(self.strategy, self.state(0, moves=0), env=self.env, rng=self.rng)

    def play(self, num_decisions: int) -> None:
        for _ in range(num_decisions):
            before, noise = self.episode.state, self.episode.noise
            self.noises.append([*noise.probs, *(() if noise.only is None else noise.only)])
            action = before.valid_actions[self.rng.choice(len(noise.probs), p=noise.probs)]
            self.room = max(0, self.room + {"right": 1, "left": -1}.get(action, 0))
            after = self.state(self.room, moves=before.moves + 1)
            counts = self.counts[self.env % 2]
            counts.add(before=before, action=action, after=after, with_feedback=False)
            self.episode.take(action, after, after.score - before.score)
            if after.done:
                self.begin()

    def resume(self, other: Corridor) -> None:
        """Load the other's state as a resumed run does, as plain data from a file."""
        file = io.BytesIO()
        torch.save(other.strategy.state_dict(), file)
        file.seek(0)
        self.strategy.load_state_dict(torch.load(file, weights_only=True))
        for counts, own in zip(self.counts, other.counts, strict=True):
            counts.load_state_dict(own.state_dict())
        self.room, self.episode.state = other.room, other.episode.state
        self.episode.history = list(other.episode.history)


@every_strategy
def test_root_noise_is_a_distribution_over_the_valid_actions(name):
    corridor = Corridor(name, env=1)
    for with_prior in (False, True):
        for _ in range(60):
            num_actions = len(corridor.episode.state.valid_actions)
            noise = corridor.episode.ask(prior_of(num_actions) if with_prior else None)
            assert noise.probs.shape == (num_actions,) and (noise.probs >= 0).all()
            assert noise.probs.sum() == pytest.approx(1.0)
            assert noise.only is None or noise.probs[noise.only].sum() == pytest.approx(1.0)
            corridor.play(1)


@every_strategy
def test_state_dict_restores_a_strategy(name):
    """A strategy restored between any two decisions gives the same noise as the original from then on."""
    for num_decisions in range(40, 64):
        original, restored = Corridor(name, env=3), Corridor(name, env=3)
        original.play(num_decisions)
        restored.resume(original)
        assert restored.strategy.state_dict() == original.strategy.state_dict()
        assert restored.strategy.scalars() == original.strategy.scalars()
        for corridor in (original, restored):
            corridor.noises.clear()
            corridor.rng.bit_generator.state = np.random.default_rng(7).bit_generator.state
            corridor.episode.ask()
            corridor.play(40)
        assert restored.noises == original.noises
        assert restored.strategy.state_dict() == original.strategy.state_dict()


@every_strategy
def test_evaluation_never_calls_a_strategy(monkeypatch, name):
    """It does not call the strategy of a collector with the same player either."""

    def refuse(*args, **kwargs):
        raise AssertionError("an exploration strategy was called")

    collector, _, player = make_collector(search={"exploration": name})
    collect(collector, 9)
    for method in ("begin_episode", "root_noise", "observe", "end_episode"):
        monkeypatch.setattr(type(make(name)[0]), method, refuse)
    with pytest.raises(AssertionError, match="strategy was called"):
        collect(collector, 9)
    for mode in EVAL_MODES:
        assert len(evaluate(player, mode, games=[CountingGame(0, length=3)], episodes=1).returns) == 1


def test_make_exploration_knows_every_name():
    assert len({type(make(name)[0]) for name in STRATEGIES}) == len(STRATEGIES)
    settings = make_settings()
    settings.search.exploration = "unknown"
    with pytest.raises(ValueError, match="'unknown' is unknown"):
        make_exploration(settings, [])


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_dirichlet_noise_has_the_distributions_mean_and_variance(alpha):
    """Each of K components has the mean 1/K and the variance (1/K) (1 - 1/K) / (alpha K + 1)."""
    dirichlet, rng, state = Dirichlet(alpha), np.random.default_rng(0), at("a", 0.0, ("go", "up", "wait", "sit"))
    noises = [dirichlet.root_noise(0, state, None, rng=rng) for _ in range(4000)]
    assert {noise.only for noise in noises} == {None}
    probs = np.array([noise.probs for noise in noises])
    assert probs.sum(axis=1) == pytest.approx(1.0)
    assert probs.mean(axis=0) == pytest.approx(0.25, abs=0.02)
    assert probs.var(axis=0) == pytest.approx(0.25 * 0.75 / (4 * alpha + 1), rel=0.1)
