"""What every exploration strategy of ``make_exploration`` must do."""

from __future__ import annotations

import typing

import numpy as np
import pytest
import torch

from priorzero.play.exploration import Exploration, make_exploration
from priorzero.play.novelty import NoveltyCounts, shaped_reward
from priorzero.settings import EVAL_MODES, SearchSettings
from priorzero.types import ActionPrior
from tests.helpers.collecting import FIRST_ROOM, CountingGame, collect, evaluate, make_collector, outcome_of, state_of
from tests.helpers.exploring import ScriptedEpisode
from tests.helpers.models import make_settings

STRATEGIES = typing.get_args(SearchSettings.model_fields["exploration"].annotation)
LENGTH = 6
NUM_GAMES = 2
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


def make(name: str) -> tuple[Exploration, list[NoveltyCounts]]:
    """A strategy for two games in which every episode deviates if it can."""
    counts = [NoveltyCounts() for _ in range(NUM_GAMES)]
    return make_exploration(make_settings({"search": {"exploration": name, "deviation_prob": 1.0}}), counts), counts


def prior_of(num_actions: int) -> ActionPrior:
    probs = np.arange(1.0, num_actions + 1)
    return ActionPrior(np.log(probs / probs.sum()).astype(np.float32), source="score", version=0)


class Play:
    """Episodes of the counting game in one environment; the actions are sampled from the noise.

    Attributes:
        noises: the noise of each decision, with its temperature scale at the end.
    """

    def __init__(self, name: str, *, env: int) -> None:
        self.strategy, self.counts = make(name)
        self.rng, self.env = np.random.default_rng(env), env
        self.episode = self.begin()
        self.noises: list[list[float]] = []

    def begin(self) -> ScriptedEpisode:
        state = state_of(self.env, FIRST_ROOM, moves=0, length=LENGTH)
        return ScriptedEpisode(self.strategy, state, env=self.env, rng=self.rng)

    def decide(self, times: int) -> None:
        for _ in range(times):
            before, noise = self.episode.state, self.episode.noise
            assert noise is not None
            self.noises.append([*noise.probs, noise.temperature_scale])
            k = int(self.rng.choice(len(noise.probs), p=noise.probs))
            room, reward = outcome_of(int(before.score), k)
            after = state_of(self.env, room, moves=before.moves + 1, length=LENGTH)
            cfg = make_settings().train
            counts = self.counts[self.env % NUM_GAMES]
            shaped_reward(counts, before=before, action=before.valid_actions[k], after=after, cfg=cfg)
            self.episode.take(before.valid_actions[k], after, reward)
            if after.done:
                self.episode = self.begin()


@every_strategy
def test_root_noise_is_a_distribution_over_the_valid_actions(name):
    play = Play(name, env=1)
    for with_prior in (False, True):
        for _ in range(4 * LENGTH):
            num_actions = len(play.episode.state.valid_actions)
            noise = play.episode.ask(prior_of(num_actions) if with_prior else None)
            assert noise.probs.shape == (num_actions,) and (noise.probs >= 0).all()
            assert noise.probs.sum() == pytest.approx(1.0) and 0 < noise.temperature_scale <= 1
            play.decide(1)


@every_strategy
@pytest.mark.parametrize("num_decisions", [2 * LENGTH, 2 * LENGTH + 3])  # between two episodes, within an episode
def test_state_dict_restores_a_strategy(tmp_path, name, num_decisions):
    """The restored strategy gives the same noise in all later decisions, also in the running episode."""
    original, restored = Play(name, env=3), Play(name, env=3)
    original.decide(num_decisions)
    state = {
        "exploration": original.strategy.state_dict(),
        "counts": [counts.state_dict() for counts in original.counts],
    }
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    restored.strategy.load_state_dict(state["exploration"])
    for counts, own in zip(restored.counts, state["counts"], strict=True):
        counts.load_state_dict(own)
    assert restored.strategy.state_dict() == original.strategy.state_dict()
    assert restored.strategy.scalars() == original.strategy.scalars()
    restored.episode.state, restored.episode.history = original.episode.state, list(original.episode.history)
    restored.noises = list(original.noises)
    for play in (original, restored):
        play.rng.bit_generator.state = np.random.default_rng(7).bit_generator.state
        play.episode.ask()
        play.decide(3 * LENGTH)
    assert restored.noises == original.noises
    assert restored.strategy.state_dict() == original.strategy.state_dict()


@every_strategy
def test_evaluation_never_calls_a_strategy(monkeypatch, name):
    """Also not with the player of a collector that explores."""

    def refuse(*args, **kwargs):
        raise AssertionError("evaluation called an exploration strategy")

    collector, _, player = make_collector(search={"exploration": name})
    collect(collector, 9)
    for method in ("begin_episode", "root_noise", "observe", "end_episode"):
        monkeypatch.setattr(type(make(name)[0]), method, refuse)
    with pytest.raises(AssertionError, match="exploration strategy"):
        collect(collector, 9)
    for mode in EVAL_MODES:
        assert len(evaluate(player, mode, games=[CountingGame(0, length=3)], episodes=1).returns) == 1


def test_make_exploration_knows_every_name():
    assert len({type(make(name)[0]) for name in STRATEGIES}) == len(STRATEGIES)
