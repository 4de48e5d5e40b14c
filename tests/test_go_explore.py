"""Go-Explore: the archive of trajectories, and the noise that returns along them or explores."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from priorzero.play.exploration import GoExplore
from priorzero.play.exploration.go_explore import Archive
from priorzero.play.novelty import NoveltyCounts
from priorzero.types import GameState
from tests.helpers.exploring import ScriptedEpisode, at, steps

# ---- the archive ----

KITCHEN = steps(
    ("a", 0.0, "open", 1.0),
    ("a1", 1.0, "take", 0.0),
    ("a2", 1.0, "drop", 0.0),  # back to a1: a loop
    ("a1", 1.0, "go", 0.0),
    ("b", 1.0, "put", 1.0),
)


def archive_of(history, *, now) -> Archive:
    """An archive of one trajectory, whose last action gained points."""
    archive = Archive()
    archive.add_reward(history, now=now)
    return archive


def planned(archive, place, score, *actions, off_path_reward=0.0) -> list[str]:
    """The actions among ``actions`` that the archive's plan consists of."""
    plan = archive.plan(at(place, score, actions), off_path_reward=off_path_reward)
    return list(itertools.compress(actions, plan.actions))


def test_archive_plans_the_actions_of_the_loop_free_trajectory():
    archive = archive_of(KITCHEN, now=at("b1", 2.0))
    assert archive.num_actions == 3
    assert planned(archive, "a", 0.0, "open", "go") == ["open"]
    assert planned(archive, "a1", 1.0, "take", "drop", "go", "wait") == ["go"]
    assert planned(archive, "b", 1.0, "put", "go") == ["put"]
    assert planned(archive, "a1", 1.0, "take", "drop") == []  # the trajectory is known, but its action is not valid
    assert planned(archive, "c", 1.0, "go") == planned(archive, "a", 1.5, "go") == []


TAKE_AND_PUT = steps(("a", 0.0, "take", 0.0), ("a1", 0.0, "go", 0.0), ("b", 0.0, "put", 1.0))
UNKNOWN_PLACE = GameState("", ("go", "take", "wait"), 0.0, 9.0, 0, look="a\nA lamp is here.")


def test_archive_plans_by_room_where_the_place_is_unknown():
    archive = archive_of(TAKE_AND_PUT, now=at("b1", 1.0))
    assert UNKNOWN_PLACE.room == "a"
    assert archive.plan(UNKNOWN_PLACE).actions.tolist() == [True, True, False]
    assert planned(archive, "a", 0.0, "go", "take", "wait") == ["take"]
    assert planned(archive, "a1", 0.0, "go", "take", "wait") == ["go"]
    assert planned(archive, "a", 0.0, "go", "wait") == ["go"]  # the place's own action is not valid


def test_archive_keeps_a_trajectory_that_lost_points_on_the_way():
    history = steps(("a", 5.0, "fall", -1.0), ("b", 4.0, "climb", 0.0), ("c", 4.0, "win", 6.0))
    archive = archive_of(history, now=at("d", 10.0))
    assert archive.num_actions == 3 and planned(archive, "a", 5.0, "fall") == ["fall"]


@pytest.mark.parametrize("gain", [3.0, 5.0])
def test_archive_ignores_points_that_were_lost_and_gained_again(gain):
    history = steps(("a", 10.0, "take egg", -5.0), ("b", 5.0, "put egg", gain))
    archive = archive_of(history, now=at("c", 5.0 + gain))
    assert planned(archive, "a", 10.0, "take egg", "wait") == []
    assert planned(archive, "b", 5.0, "put egg", "wait") == ["put egg"] and archive.num_actions == 1


def test_archive_prefers_a_higher_score_then_a_shorter_trajectory():
    archive = archive_of(KITCHEN, now=at("b1", 2.0))  # open, go, put
    longer = steps(("a", 0.0, "open", 1.0), ("a1", 1.0, "take", 0.0), ("a2", 1.0, "go", 0.0), ("b2", 1.0, "put", 1.0))
    archive.add_reward(longer, now=at("b3", 2.0))
    assert archive.num_actions == 3 and planned(archive, "a1", 1.0, "take", "go") == ["go"]
    assert planned(archive, "b2", 1.0, "put") == ["put"]  # no shorter trajectory is known from b2
    higher = [*longer, *steps(("b3", 2.0, "cut", 1.0))]  # which needs what was taken
    archive.add_reward(higher, now=at("b4", 3.0))
    assert archive.num_actions == 5 and planned(archive, "a1", 1.0, "take", "go") == ["take"]
    before = archive.state_dict()
    archive.add_reward(KITCHEN, now=at("b1", 2.0))  # shorter, but the score is lower
    assert archive.state_dict() == before
    archive.add_reward(higher[2:], now=at("b4", 3.0))  # "take" was not needed after all
    assert archive.num_actions == 4
    assert planned(archive, "a1", 1.0, "take", "go") == ["take"]  # no shorter trajectory to this score from a1


def test_archive_best_has_the_highest_score_then_the_fewest_actions():
    archive = Archive()
    assert archive.best() is None
    archive.add_reward(KITCHEN, now=at("b1", 2.0))
    archive.add_reward(steps(("z", 0.0, "go", 0.5), ("z1", 0.5, "on", 1.0)), now=at("z2", 1.5))
    best = archive.best()
    assert (best.score, best.length) == (2.0, 3)
    archive.add_reward(steps(("y", 0.0, "go", 0.0), ("y1", 0.0, "on", 2.0)), now=at("y2", 2.0))
    best = archive.best()
    assert (best.score, best.length) == (2.0, 2)


def dark(*, final_score):
    """Five points down without the lamp; the episode ends soon after with ``final_score``."""
    return steps(("a", 0.0, "down", 5.0), ("c", 5.0, "walk", 0.0)), at("grue", final_score)


def test_archive_counts_a_trajectory_with_the_final_score_of_its_episode():
    archive = Archive()
    history, now = dark(final_score=2.0)
    archive.add_reward(history[:1], now=at("c", 5.0))
    assert planned(archive, "a", 0.0, "down", "lamp") == ["down"]
    archive.add_episode(history, now=now)  # two points are better than none
    assert planned(archive, "a", 0.0, "down", "lamp") == ["down"] and planned(archive, "c", 5.0, "walk") == []
    lamp = steps(("a", 0.0, "lamp", 0.0), ("a1", 0.0, "down", 3.0))
    archive.add_reward(lamp, now=at("c1", 3.0))
    archive.add_episode([*lamp, *steps(("c1", 3.0, "walk", 0.0))], now=at("d", 3.0))
    assert planned(archive, "a", 0.0, "down", "lamp") == ["lamp"]  # three points that are kept
    archive.add_reward(history[:1], now=at("c", 5.0))
    assert planned(archive, "a", 0.0, "down", "lamp") == ["down"]  # five points, while the episode goes on
    archive.add_episode(history, now=now)
    assert planned(archive, "a", 0.0, "down", "lamp") == ["lamp"]
    assert (archive.best().score, archive.best().length) == (3.0, 2)


def test_archive_keeps_other_episodes_trajectories_to_a_score_that_an_episode_lost():
    archive = Archive()
    archive.add_reward(steps(("a", 0.0, "lamp", 5.0)), now=at("c", 5.0))
    longer = steps(("a", 0.0, "down", 0.0), ("b", 0.0, "get", 5.0))
    archive.add_reward(longer, now=at("c", 5.0))
    archive.add_episode([*longer, *steps(("c", 5.0, "walk", -5.0))], now=at("grue", 0.0))
    assert planned(archive, "a", 0.0, "lamp", "down") == ["lamp"] and planned(archive, "b", 0.0, "get") == []


def test_archive_forgets_points_that_were_gained_after_a_loss_and_lost_again():
    archive = Archive()
    history = steps(
        ("a", 0.0, "up", 10.0), ("b", 10.0, "fall", -5.0), ("f", 5.0, "down", 3.0), ("g", 8.0, "walk", -3.0)
    )
    archive.add_reward(history[:1], now=at("b", 10.0))
    archive.add_reward(history[:3], now=at("g", 8.0))
    assert planned(archive, "f", 5.0, "down") == ["down"]
    archive.add_episode(history, now=at("grue", 5.0))
    assert planned(archive, "f", 5.0, "down") == [] and planned(archive, "a", 0.0, "up") == ["up"]


def test_archive_keeps_a_confirmed_trajectory_when_a_later_episode_loses_its_points():
    archive = Archive()
    history, now = dark(final_score=5.0)
    archive.add_reward(history[:1], now=now)
    archive.add_episode(history, now=now)
    archive.add_episode(history, now=dataclasses.replace(now, score=-5.0))
    assert planned(archive, "a", 0.0, "down", "lamp") == ["down"]
    archive.add_episode(steps(("a", 0.0, "wait", 0.0)), now=at("a", -5.0))  # one that never got there
    assert planned(archive, "a", 0.0, "down", "lamp") == ["down"]


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from("abc"), st.integers(0, 2), st.booleans()), min_size=1, max_size=40
    )
)
def test_archive_add_episode_changes_no_plan_if_no_points_are_lost(decisions):
    """Two episodes at a time: environment, place, points of the action, whether the episode ends with it."""
    with_ends, without_ends = Archive(), Archive()
    histories = [[], []]
    for count, (env, place, points, ends) in enumerate(decisions):
        history = histories[env]
        score = history[-1].score + history[-1].reward if history else 0.0
        history += steps((place, score, f"command {count % 3}", float(points)))
        now = at("z", score + points)
        for archive in (with_ends, without_ends) if points else ():
            archive.add_reward(history, now=now)
        if ends:
            with_ends.add_episode(history, now=now)
            histories[env] = []
        actions = [f"command {n}" for n in range(3)]
        for cell in itertools.product("abc", range(6)):
            assert planned(with_ends, *cell, *actions) == planned(without_ends, *cell, *actions)
    assert with_ends.num_actions == without_ends.num_actions


def test_archive_plans_by_a_lower_score_after_off_path_reward():
    archive = archive_of(steps(("a", 0.0, "go", 2.0), ("b", 2.0, "up", 3.0)), now=at("c", 5.0))
    archive.add_reward(
        steps(("a", 0.0, "go", 2.0), ("b", 2.0, "take", 1.0), ("b1", 3.0, "sit", 0.5)), now=at("b2", 3.5)
    )
    actions = "go", "up", "take", "sit"
    assert planned(archive, "b", 2.0, *actions) == ["up"]
    assert planned(archive, "b1", 3.0, *actions) == ["sit"]
    # In room b, 0.5 points are expected with score 3, and 3 points with score 2. The place is unknown, only the room.
    in_b = GameState("", actions, 3.0, 9.0, 0, look="b\nA lamp is here.")
    assert in_b.room == "b"
    plan = archive.plan(in_b)
    assert plan.actions.tolist() == [False, False, False, True] and plan.expected_gain == 0.5
    plan = archive.plan(in_b, off_path_reward=1.0)
    assert plan.actions.tolist() == [False, True, False, False] and plan.expected_gain == 3.0
    in_b = dataclasses.replace(in_b, valid_actions=("go", "sit"))
    assert archive.plan(in_b, off_path_reward=1.0).actions.tolist() == [False, True]  # the better one is not valid
    assert (
        planned(archive, "a", 1.5, *actions, off_path_reward=1.5) == ["go"] and planned(archive, "a", 1.5, "go") == []
    )
    assert planned(archive, "b", 2.0, *actions, off_path_reward=-1.0) == ["up"]  # the larger gain is at the real score


def test_archive_state_dict_restores_provisional_and_confirmed_trajectories(tmp_path):
    archive = Archive()
    history, now = dark(final_score=2.0)
    lamp = steps(("a", 0.0, "lamp", 0.0), ("a1", 0.0, "down", 3.0))
    archive.add_episode(lamp, now=at("c1", 3.0))
    archive.add_reward(history[:1], now=at("c", 5.0))
    torch.save(archive.state_dict(), tmp_path / "archive.pt")
    restored = archive_of(KITCHEN, now=at("b1", 2.0))
    restored.load_state_dict(torch.load(tmp_path / "archive.pt", weights_only=True))
    assert restored.state_dict() == archive.state_dict() and restored.num_actions == archive.num_actions
    for either in archive, restored:
        assert planned(either, "a", 0.0, "down", "lamp") == ["down"]
        either.add_episode(history, now=now)
        assert planned(either, "a", 0.0, "down", "lamp") == ["lamp"]


# ---- the strategy ----

ACTIONS = ("go", "up", "aside", "back")
MAIN_PATH = steps(("a", 0.0, "go", 2.0), ("b", 2.0, "up", 3.0), ("c", 5.0, "up", 4.0))  # to nine points


def room(place, score, **changes) -> GameState:
    return dataclasses.replace(at(place, score, ACTIONS), **changes)


def make_strategy(history=MAIN_PATH, *, now=None, counts=None, deviation_prob=0.0) -> GoExplore:
    """The strategy for one game, whose archive knows one trajectory."""
    strategy = GoExplore(counts or [NoveltyCounts()], deviation_prob=deviation_prob)
    if history:
        strategy.archives[0].add_reward(history, now=now or at("d", 9.0))
    return strategy


def begin(strategy, state=None, *, env=0, deviation=None, rng=None) -> ScriptedEpisode:
    """An episode that deviates in the given interval of its actions, or as the strategy decides."""
    episode = ScriptedEpisode(strategy, state or room("a", 0.0), env=env, rng=rng)
    if deviation is not None:
        saved = strategy.state_dict()
        saved["progress"][env] |= {"deviation": deviation, "target": None}
        strategy.load_state_dict(saved)
        episode.ask()
    return episode


def deviation_of(strategy, env=0) -> tuple[int, int] | None:
    return strategy.state_dict()["progress"][env]["deviation"]


def off_path_reward(strategy, env=0) -> float:
    return strategy.state_dict()["progress"][env]["off_path_reward"]


def returns_by(episode) -> list[str]:
    """The actions by which the episode returns along a known trajectory; none: it explores."""
    noise = episode.noise
    assert (noise.only == (noise.probs > 0)).all()
    if episode.strategy.state_dict()["progress"][episode.env]["target"] is not None:
        assert noise.only.sum() == 1
        return []
    return list(itertools.compress(episode.state.valid_actions, noise.only))


def test_go_explore_returns_along_a_known_trajectory():
    """The noise is uniform over its actions, and only these may be taken."""
    noise = begin(make_strategy(TAKE_AND_PUT, now=at("b1", 1.0)), UNKNOWN_PLACE).noise
    assert noise.probs.tolist() == [0.5, 0.5, 0.0] and noise.only.tolist() == [True, True, False]


def test_go_explore_goes_to_the_nearest_room_from_which_a_trajectory_is_known():
    """From y, b is two commands away, and c, where one is known only with another score, is one."""
    strategy = make_strategy()
    for place, action, after in (("y", "aside", "x"), ("x", "aside", "b"), ("y", "back", "c"), ("b", "up", "c")):
        strategy.maps[0].add_step(steps((place, 2.0, action, 0.0))[0], after=room(after, 2.0))
    assert strategy.archives[0].rooms(2.0) == {"b"} and strategy.archives[0].rooms(5.0) == {"c"}
    episode = begin(strategy, room("y", 2.0))
    for place, expected in (("x", "aside"), ("b", "aside"), ("c", "up")):
        assert returns_by(episode) == [expected]
        episode.take(expected, room(place, 5.0 if place == "c" else 2.0), 3.0 if place == "c" else 0.0)
    assert returns_by(episode) == ["up"]


def test_go_explore_explores_until_it_gains_points_where_no_trajectory_is_known():
    strategy = make_strategy()
    episode = begin(strategy, room("d", 9.0))
    for place, score in (("a", 9.0), ("b", 9.0)):
        assert returns_by(episode) == []
        episode.take("go", room(place, score))
    assert returns_by(episode) == [] and strategy.state_dict()["progress"][0]["explores"]
    episode.take("go", room("a", 0.0), -9.0)  # a loss changes nothing
    assert returns_by(episode) == []
    episode.take("go", room("b", 2.0), 2.0)
    assert returns_by(episode) == ["up"] and not strategy.state_dict()["progress"][0]["explores"]


def test_go_explore_explores_after_two_returns_in_a_place_without_points():
    strategy = make_strategy()
    episode = begin(strategy)
    for returns in (["go"], ["go"], []):
        assert returns_by(episode) == returns
        episode.take("back", room("a", 0.0))
    episode.take("go", room("b", 2.0), 2.0)
    assert returns_by(episode) == ["up"]
    assert strategy.state_dict()["progress"][0]["visits"] == []  # points were gained


def test_go_explore_returns_at_once_after_a_deviation_in_one_place():
    episode = begin(make_strategy(), deviation=(0, 3))
    for _ in range(3):
        assert returns_by(episode) == []
        episode.take("back", room("a", 0.0))
    assert returns_by(episode) == ["go"]


def test_go_explore_does_not_go_back_and_forth_between_rooms_without_a_valid_action():
    """From b and c, trajectories are known whose actions are not valid now; each visit is another place."""
    strategy = make_strategy()
    strategy.archives[0].add_reward(steps(("c", 2.0, "up", 1.0)), now=at("d", 3.0))
    for place, after in (("b", "c"), ("c", "b")):
        strategy.maps[0].add_step(steps((place, 2.0, "back", 0.0))[0], after=room(after, 2.0))
    episode = begin(strategy, room("b", 2.0, valid_actions=("back",)))
    assert returns_by(episode) == ["back"]
    episode.take("back", GameState("", ("back",), 2.0, 9.0, 0, look="c\nanother"))
    assert returns_by(episode) == []
    progress = strategy.state_dict()["progress"][0]
    assert progress["explores"] and progress["dead_ends"] == ["b", "c"]


@pytest.mark.parametrize("with_prior", [False, True])
def test_go_explore_tries_an_action_in_proportion_to_prior_and_count(with_prior):
    counts = NoveltyCounts()
    state = room("a", 1.0)
    counts.actions["a", 1.0, "go"] = 1
    counts.actions["a", 2.0, "up"] = 9  # with another score
    prior = np.array([0.4, 0.2, 0.3, 0.1]) if with_prior else None
    expected = np.full(4, 0.25) if prior is None else prior.copy()
    expected[0] /= (1 + 1) ** 1.5  # it was not taken in this place
    expected **= 2
    strategy = make_strategy(None, counts=[counts])
    noises = []
    for seed in range(4000):
        episode = begin(strategy, deviation=None, state=state, rng=np.random.default_rng(seed))
        strategy.begin_episode(0, state, rng=episode.rng)  # the target was chosen without the prior
        noises.append(episode.ask(prior))
    probs = np.array([noise.probs for noise in noises])
    assert ((probs == 1.0).sum(axis=1) == 1).all() and (probs.sum(axis=1) == 1.0).all()
    assert all((noise.only == (noise.probs == 1.0)).all() for noise in noises)
    assert probs.mean(axis=0) == pytest.approx(expected / expected.sum(), abs=0.03)


def test_go_explore_deviates_within_an_interval_of_actions():
    for deviation, returns in [
        (None, [True] * 3),
        ((0, 1), [False, True, True]),
        ((1, 2), [True, False, True]),
        ((1, 9), [True, False, False]),
        ((3, 9), [True, True, True]),
    ]:
        episode = begin(make_strategy(), deviation=deviation)
        found = [bool(returns_by(episode))]
        for action, after, reward in (("go", room("b", 2.0), 2.0), ("up", room("c", 5.0), 3.0)):
            episode.take(action, after, reward)
            found.append(bool(returns_by(episode)))
        assert found == returns


def test_go_explore_explores_by_counts_while_it_deviates():
    """Actions of the known trajectory are not preferred."""
    counts = NoveltyCounts()
    counts.actions["a", 0.0, "go"] = 1
    strategy = make_strategy(counts=[counts])
    episode = begin(strategy, deviation=(0, 1))
    assert returns_by(episode) == []
    rngs = map(np.random.default_rng, range(2000))
    probs = np.mean([begin(strategy, deviation=(0, 1), rng=rng).noise.probs for rng in rngs], axis=0)
    assert probs == pytest.approx(np.array([1, 8, 8, 8]) / 25, abs=0.04)


def test_go_explore_returns_again_after_off_path_reward():
    strategy = make_strategy()
    archive = strategy.archives[0]
    episode = begin(strategy, deviation=(1, 99))
    assert returns_by(episode) == ["go"]
    episode.take("go", room("b", 2.0), 2.0)
    assert returns_by(episode) == [] and off_path_reward(strategy) == 0.0  # it deviates
    episode.take("aside", room("y", 2.0))
    assert returns_by(episode) == []
    episode.take("aside", room("z", 1.0), -1.0)
    assert returns_by(episode) == [] and off_path_reward(strategy) == -1.0  # after a loss it still deviates
    episode.take("aside", room("z1", 4.0), 3.0)
    assert returns_by(episode) == [] and off_path_reward(strategy) == 2.0  # no trajectory is known from z1
    saved = strategy.state_dict()
    restored = make_strategy()
    restored.load_state_dict(saved)
    assert off_path_reward(restored) == 2.0 and deviation_of(restored) == (1, 99)
    episode.take("back", room("y", 4.0))
    assert returns_by(episode) == []  # its own trajectory to the present score leads nowhere
    episode.take("back", room("b", 4.0))
    assert returns_by(episode) == ["up"]
    episode.take("up", room("c", 7.0), 3.0)
    assert returns_by(episode) == ["up"] and off_path_reward(strategy) == 2.0  # expected points are not off the path
    episode.take("up", room("d", 11.0), 4.0)
    assert returns_by(episode) == []
    assert planned(archive, "b", 2.0, "up", "aside") == ["aside"]  # the best trajectory gains both now


def test_go_explore_counts_off_path_reward_that_another_episode_found_before():
    strategy = make_strategy()
    for _ in range(2):  # the first episode does not come back
        episode = begin(strategy, deviation=(1, 99))
        episode.take("go", room("b", 2.0), 2.0)
        episode.take("aside", room("z", 2.0))
        assert returns_by(episode) == []
        episode.take("aside", room("z1", 3.0), 1.0)
        assert returns_by(episode) == [] and off_path_reward(strategy) == 1.0
    episode.take("back", room("b", 3.0))
    assert returns_by(episode) == ["up"]


@pytest.mark.parametrize(
    ("deviation", "action", "expected"),
    [
        ((0, 1), "go", 0.0),  # a known trajectory has these points
        ((0, 1), "up", 2.0),
        (None, "up", 0.0),  # the episode does not deviate
        ((1, 2), "up", 0.0),  # the deviation has not begun
    ],
)
def test_go_explore_counts_unexpected_points_of_a_deviation_as_off_path(deviation, action, expected):
    strategy = make_strategy()
    begin(strategy, deviation=deviation).take(action, room("b", 2.0), 2.0)
    assert off_path_reward(strategy) == expected


def test_go_explore_expects_points_by_the_archive_of_the_time_of_the_decision():
    """An episode in another environment may change the archive before the game replies."""
    strategy = make_strategy()
    episode = begin(strategy, deviation=(0, 1))
    strategy.archives[0].add_reward(steps(("a", 0.0, "back", 30.0)), now=at("x", 30.0))
    episode.take("go", room("b", 2.0), 2.0)  # "go" was on the best trajectory, and "back" is now
    assert off_path_reward(strategy) == 0.0


def test_go_explore_samples_deviations_over_the_best_trajectory():
    """The archive's best trajectory has three actions."""
    rng = np.random.default_rng(0)

    def sample(strategy, times, *, max_score):
        deviations = []
        for _ in range(times):
            strategy.begin_episode(0, room("a", 0.0, max_score=max_score), rng=rng)
            deviations.append(deviation_of(strategy))
        return deviations

    make = {"history": KITCHEN, "now": at("b1", 2.0)}
    assert sample(make_strategy(**make), 9, max_score=9.0) == [None] * 9  # deviation_prob=0
    sampled = sample(make_strategy(**make, deviation_prob=0.25), 4000, max_score=9.0)
    deviations = [deviation for deviation in sampled if deviation is not None]
    assert len(deviations) / len(sampled) == pytest.approx(0.25, abs=0.03)
    # It begins after 0 to 3 actions, and lasts for 1 to 3.
    assert Counter(deviations).keys() == {(begin, begin + n) for begin in range(4) for n in (1, 2, 3)}
    assert min(Counter(deviations).values()) > 40  # the mean is 83
    always = make_strategy(**make, deviation_prob=1.0)
    always.archives[0].add_reward(steps(("z", 0.0, "go", 0.5), ("z1", 0.5, "on", 1.0)), now=at("z2", 1.5))
    assert set(sample(always, 400, max_score=0.0)) == set(deviations)  # 0: the maximum is unknown
    assert set(sample(always, 99, max_score=2.0)) == {None}  # the best trajectory has all points
    assert set(sample(make_strategy(None, deviation_prob=1.0), 9, max_score=0.0)) == {None}  # no trajectory is known


def test_go_explore_confirms_trajectories_at_the_end_of_an_episode():
    strategy = make_strategy(None)
    episode = begin(strategy)
    episode.take("aside", room("b", 5.0), 5.0)
    assert returns_by(begin(strategy, env=1)) == ["aside"]
    episode.take("up", room("grue", 0.0, done=True), -5.0)
    assert returns_by(begin(strategy, env=1)) == []


def test_go_explore_keeps_an_archive_for_each_game():
    """Environment e plays game e % 2."""
    counts = [NoveltyCounts(), NoveltyCounts()]
    strategy = make_strategy(None, counts=counts)
    begin(strategy).take("up", room("b", 2.0), 2.0)
    assert [returns_by(begin(strategy, env=env)) for env in range(4)] == [["up"], [], ["up"], []]
    counts[1].actions["a", 0.0, "go"] = 99
    rngs = [np.random.default_rng(seed) for seed in range(50)]
    noises = [[begin(strategy, env=env, rng=rng).noise.probs[0] for rng in rngs] for env in (1, 3)]
    assert np.mean(noises) < 0.1  # "go" was taken often in game 1, by any environment


def test_go_explore_keeps_a_map_for_each_game():
    """Room a of game 0 has an exit to room b. In game 1, it leads to room y, and b is not known."""
    strategy = make_strategy(None, counts=[NoveltyCounts(), NoveltyCounts()])
    for env, following in ((0, "b"), (1, "y")):
        begin(strategy, env=env).take("go", room(following, 0.0))
    reached = [set(strategy.maps[env].routes(room("a", 0.0))) for env in range(2)]
    assert reached == [{"a", "b"}, {"a", "y"}]


def test_go_explore_restores_how_often_an_episode_was_in_a_place():
    """It explores on the third visit, also if it was saved and restored before."""
    strategy, restored = make_strategy(), make_strategy(None)
    episode = begin(strategy)
    for _ in range(2):
        episode.take("back", room("a", 0.0))
    assert returns_by(episode) == []
    file = io.BytesIO()
    torch.save(strategy.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    episode.strategy = restored
    episode.ask()
    assert returns_by(episode) == []


def test_go_explore_forgets_an_episode_that_did_not_end():
    """After the crash of a game, the next call is begin_episode."""
    strategy = make_strategy()
    episode = begin(strategy)
    for _ in range(2):
        episode.take("back", room("a", 0.0))
    assert returns_by(episode) == []
    assert returns_by(begin(strategy)) == ["go"]


def test_go_explore_scalars_count_the_actions_of_all_archives():
    strategy = make_strategy(counts=[NoveltyCounts(), NoveltyCounts()])
    strategy.archives[1].add_reward(KITCHEN, now=at("b1", 2.0))
    assert strategy.scalars() == {"collector_iter/commands_leading_on": 3.0 + 3.0}
