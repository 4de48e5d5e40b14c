"""Evaluation: repeatable episodes without exploration, in every mode and on every game."""

from __future__ import annotations

import asyncio

import pytest

from priorzero.play.evaluator import Evaluation, Evaluator, Evaluators, merge
from priorzero.types import GameWorkerError
from tests.helpers.collecting import (
    FIRST_ROOM,
    CountingGame,
    collect,
    evaluate,
    make_collector,
    make_player,
    outcome_of,
)


@pytest.mark.parametrize("mode", ["world_model", "world_model_with_prior", "prior"])
def test_evaluator_repeats_its_episodes(mode):
    collector, _, player = make_collector()

    def returns():
        return evaluate(player, mode, games=[CountingGame(g, length=5 + g) for g in range(2)], episodes=2).returns

    engine = player.prior.engine
    vocabulary = player.indexer.state_dict()
    first = returns()
    assert player.indexer.state_dict() == vocabulary  # an evaluation adds no actions
    assert (engine.calls == 0) == (mode == "world_model")
    collect(collector, 9)  # collection in between has no effect
    assert returns() == first and len(first) == 2
    if mode == "prior":  # always the last valid action
        room, total = FIRST_ROOM, 0.0
        for _ in range(5):
            room, reward = outcome_of(room, 1 + room % 3)
            total += reward
        assert first[0] == total


def test_evaluator_raises_if_no_episode_can_be_finished():
    with pytest.raises(GameWorkerError):
        evaluate(make_player(), "prior", games=[CountingGame(1, fail_at=range(100))], episodes=2)


def test_evaluator_replaces_episodes_of_failed_games():
    games = [CountingGame(1, fail_at=(3,)), CountingGame(2)]
    assert len(evaluate(make_player(), "prior", games=games, episodes=3).returns) == 3


def first_actions(mode, *, seed, episodes=40):
    """Position of the first action of each episode. In the first room the prior is 0.05, 0.05, 0.9."""
    game = CountingGame(0, length=3)
    first = []

    async def step(action, own=game.step):
        if game.moves == 0:
            first.append(int(action.split()[2]))
        return await own(action)

    game.step = step
    evaluate(make_player(), mode, games=[game], episodes=episodes, seed=seed)
    return first


def test_evaluator_modes_sample_from_the_prior_or_at_random():
    prior, random_play = first_actions("prior_sampled", seed=0), first_actions("random", seed=0)
    assert prior.count(2) >= 30 and len(set(prior)) > 1
    assert random_play.count(2) <= 22 and set(random_play) == {0, 1, 2}
    assert first_actions("prior_sampled", seed=0) == prior  # equal seeds play equal episodes
    assert first_actions("prior_sampled", seed=1) != prior
    assert set(first_actions("prior", seed=0)) == {2}


def test_evaluation_means_and_merge():
    first = Evaluation("prior", returns=[1.0, 3.0], scores=[2.0, 4.0], wins=1, max_score=10.0)
    second = Evaluation("prior", returns=[0.0, 0.0], scores=[5.0, 5.0], wins=2, max_score=20.0)
    assert (first.mean_return, first.mean_score) == (2.0, 3.0)
    expected = Evaluation("prior", returns=[1.0, 3.0, 0.0, 0.0], scores=[2.0, 4.0, 5.0, 5.0], wins=3, max_score=15.0)
    assert merge([first, second]) == expected


def test_evaluators_leave_out_a_game_that_cannot_be_played():
    player = make_player()

    def evaluator(name, **arguments):
        return Evaluator(name, [CountingGame(0, length=3, **arguments)], player=player, episodes=1, seed=0)

    evaluators = Evaluators(
        modes=["prior", "random"], seen=[evaluator("a"), evaluator("b", fail_at=range(100))], unseen=[evaluator("c")]
    )
    assert evaluators.workers == [e.workers[0] for e in (*evaluators.seen, *evaluators.unseen)]
    results = asyncio.run(evaluators.evaluate())
    assert {key: list(games) for key, games in results.items()} == {
        ("prior", False): ["a"],
        ("random", False): ["a"],
        ("prior", True): ["c"],
        ("random", True): ["c"],
    }
    assert results["random", True]["c"].mode == "random"
    nothing = Evaluators(modes=["prior"], seen=[evaluator("b", fail_at=range(100))], unseen=[])
    assert asyncio.run(nothing.evaluate()) == {}
