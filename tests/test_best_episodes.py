"""The best episode of each game, which the LLM imitates."""

from __future__ import annotations

import dataclasses
import io
import itertools

import numpy as np
import pytest
import torch

from priorzero.types import GameState
from priorzero.world_model.best_episodes import BestEpisodes, scoring_path
from priorzero.world_model.records import RecordTable, read_records
from tests.helpers.collecting import collect, make_collector, records_of
from tests.helpers.exploring import at
from tests.helpers.records import record


def episode(text, *, number=0):
    """The decisions of an episode and its last state, from ``place score`` pairs: ``a0 b0 c5``.

    The decision in the t-th place is decision t, and its reward is the difference of the scores.
    """
    states = [at(pair[0], float(pair[1:])) for pair in text.split()]
    records = [
        dataclasses.replace(record(t), state=state, reward=after.score - state.score, episode=number)
        for t, (state, after) in enumerate(itertools.pairwise(states))
    ]
    return records, states[-1]


def play(best, text, *, env=0, game=0, number=0):
    records, final = episode(text, number=number)
    for each in records:
        best.add(env, each)
    best.end_episode(env, final, game=game)


def stored(best):
    """(episode, step) of the stored decisions."""
    return [(each.episode, each.step) for each in best.records]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("a0 b0 c5", [0, 1]),
        ("a0 b0 c5 d5 e5", [0, 1]),  # nothing after the last point
        ("a0 b0 a0 b0 c5", [2, 3]),  # without the loop from a back to a
        ("a0 b5 a5 b5 a9", [0, 3]),  # a point begins a new path: a, b, then without the loop from b to b
        ("a0 b10 c50 d40", [0, 1]),  # points were lost, but the path to the others led past them
        ("a0 b40 c50 d40", [0]),  # the score of c was lost again
        ("a0 b40 c30 d50 e40", [0]),  # what followed gained nothing
        ("a0 b10 c5 d20", [0, 1, 2]),  # a loss on the path to the last point
        ("a0 b10 c0", []),
        ("a3 b3 c3", []),  # the score at the beginning
    ],
)
def test_scoring_path_ends_with_the_last_point_and_has_no_loops(text, steps):
    records, final = episode(text)
    assert [each.step for each in scoring_path(records, final=final)] == steps


def test_best_episodes_keep_the_highest_score_and_then_the_shortest_path():
    best = BestEpisodes(rng=np.random.default_rng(0))
    play(best, "a0 b0", number=0)
    assert stored(best) == [] and best.scalars() == {"buffer/imitation_decisions": 0.0}
    play(best, "a0 b0 c5", number=1)
    assert stored(best) == [(1, 0), (1, 1)]
    play(best, "a0 d0 c5 e5", number=2)  # equally good
    play(best, "a0 b9 c4", number=3)  # a higher score that was lost
    assert stored(best) == [(1, 0), (1, 1)]
    play(best, "a0 c5", number=4)
    assert stored(best) == [(4, 0)]
    play(best, "a0 b0 c0 d6", number=5)
    assert stored(best) == [(5, 0), (5, 1), (5, 2)] and best.scalars() == {"buffer/imitation_decisions": 3.0}


def test_best_episodes_are_separate_for_each_game_and_environment():
    best = BestEpisodes(rng=np.random.default_rng(0))
    (first, first_final), (second, second_final) = episode("a0 b0 c5", number=0), episode("d0 e1", number=1)
    best.add(3, second[0])
    best.add(2, first[0])
    best.end_episode(3, second_final, game=1)
    best.add(2, first[1])
    best.end_episode(2, first_final, game=0)
    assert stored(best) == [(0, 0), (0, 1), (1, 0)]


def test_best_episodes_drop_an_episode_whose_game_failed():
    best = BestEpisodes(rng=np.random.default_rng(0))
    for each in episode("a0 b0 c0 d0")[0]:
        best.add(0, each)
    play(best, "a0 b7", number=1)
    assert stored(best) == [(1, 0)]


def test_sample_draws_different_decisions_with_equal_probabilities():
    best = BestEpisodes(rng=np.random.default_rng(0))
    assert best.sample(3) == []
    play(best, "a0 b0 c0 d0 e5")
    assert [each.step for each in best.sample(9)] == [0, 1, 2, 3]
    counts = np.zeros(4)
    for _ in range(400):
        steps = [each.step for each in best.sample(2)]
        assert steps == sorted(set(steps)) and len(steps) == 2
        counts[steps] += 1
    assert counts == pytest.approx(np.full(4, 200), abs=40)


def test_state_dict_restores_everything():
    """Also the decisions of an episode that has not ended."""
    best, table = BestEpisodes(rng=np.random.default_rng(0)), RecordTable()
    play(best, "a0 b0 c0 d5", game=1)
    running, final = episode("a0 b0 c8", number=7)
    best.add(4, running[0])
    file = io.BytesIO()
    torch.save({"best": best.state_dict(table), "records": table.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = BestEpisodes(rng=np.random.default_rng(99))
    other.load_state_dict(state["best"], read_records(state["records"]))
    assert stored(other) == stored(best) == [(0, 0), (0, 1), (0, 2)]
    for each in (best, other):
        each.add(4, running[1])
        each.end_episode(4, final, game=0)
    draws = [[(each.episode, each.step) for each in b.sample(2)] for b in (best, other) for _ in range(5)]
    assert draws[:5] == draws[5:] and stored(other) == stored(best) == [(7, 0), (7, 1), (0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("exploration", ["go_explore", "dirichlet"])
def test_collector_feeds_the_best_episodes_of_each_game(exploration):
    """Environments 0 and 2 play game 0, environment 1 plays game 1. The score is the room's number."""
    best = BestEpisodes(rng=np.random.default_rng(0))
    collector, _, _ = make_collector(
        num_games=3, different=2, length=4, search={"exploration": exploration}, best_episodes=best
    )
    collected = collect(collector, 96)
    episodes: dict[int, list] = {}
    for each in records_of(collected):
        episodes.setdefault(each.episode, []).append(each)
    expected = []
    for environments in ({0, 2}, {1}):
        paths = []
        for number, own in episodes.items():
            if number % 3 in environments and own[-1].done:
                room = int(own[-1].state.score)
                score = (3 * room + own[-1].chosen + 1) % 97
                final = GameState(f"game {number % 3} room {score}", (), float(score), 0.0, 4, done=True)
                path = scoring_path(own, final=final)
                paths.append((-score, len(path), number, path))
        expected += min(paths, key=lambda path: path[:3])[3]
    assert len(expected) >= 2 and best.records == expected
