"""Evaluation: repeatable episodes without exploration, in every mode and on every game."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from priorzero.play.evaluator import Evaluation, Evaluator, Evaluators, best_score, merge
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


def test_best_score_of_an_episode_without_decisions():
    state = asyncio.run(CountingGame(0).reset())
    assert best_score(make_player().new_episode(0, state, game="a", rng=np.random.default_rng(0))) == state.score


# ---- a limit of steps, as in the protocol of TALES ----


def play_with_limit(step_limit, *, games, episodes=1):
    evaluator = Evaluator("counting", games, player=make_player(), episodes=episodes, seed=0, step_limit=step_limit)
    return asyncio.run(evaluator.evaluate("prior"))


def test_evaluator_begins_a_game_again_until_the_limit_of_steps():
    games = [CountingGame(g, length=7) for g in range(2)]
    evaluation = play_with_limit(20, games=games, episodes=2)
    assert [(game.steps, game.resets) for game in games] == [(20, 3), (20, 3)]  # 7 + 7 + 6 steps
    one = play_with_limit(7, games=[CountingGame(0, length=7)])
    assert evaluation.best_scores == one.best_scores * 2 and evaluation.returns == one.returns * 2
    assert [len(play_with_limit(n, games=[CountingGame(0)]).first_episode["steps"]) for n in (3, 20)] == [3, 7]


def test_evaluator_counts_the_best_score_of_all_episodes_within_the_limit():
    """The score of the counting game is the room's number, which rises and falls."""
    rooms = [FIRST_ROOM]
    for _ in range(6):
        rooms.append(outcome_of(rooms[-1], 1 + rooms[-1] % 3)[0])
    assert max(rooms[:3]) < max(rooms) > rooms[-1]  # otherwise the expectations below would say little
    for limit, best in ((2, max(rooms[:3])), (6, max(rooms)), (7, max(rooms))):
        evaluation = play_with_limit(limit, games=[CountingGame(0, length=6)])
        assert evaluation.best_scores == [best], limit
    standard = evaluate(make_player(), "prior", games=[CountingGame(0, length=6)], episodes=1)
    assert (standard.best_scores, standard.scores) == ([max(rooms)], [rooms[-1]])


def test_evaluator_stops_a_game_that_was_won_with_the_maximum_score():
    class Won(CountingGame):
        async def step(self, action):
            state, reward = await super().step(action)
            won = state.done
            return dataclasses.replace(state, won=won, score=state.max_score if won else state.score), reward

    game = Won(0, length=4)
    evaluation = play_with_limit(20, games=[game])
    assert (game.steps, game.resets, evaluation.wins) == (4, 1, 1) and evaluation.best_scores == [1000.0]


def test_evaluator_leaves_out_a_game_that_cannot_begin_again():
    class StartsOnce(CountingGame):
        async def reset(self):
            if self.resets:
                raise GameWorkerError("made to fail")
            return await super().reset()

    with pytest.raises(GameWorkerError, match="made to fail"):
        play_with_limit(20, games=[StartsOnce(0, length=4)])
