"""The map of known rooms, and the choice of the command that is tried next."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter

import numpy as np
import pytest
import torch

from priorzero.play.exploration import GoExplore
from priorzero.play.exploration.room_map import RoomMap, Route, Target
from priorzero.play.novelty import NoveltyCounts
from priorzero.types import GameState, HistoryStep
from tests.helpers.exploring import ScriptedEpisode, at

CELLAR = at("cellar", 0.0, ("up", "push rock"))
HALL = at("hall", 0.0, ("down", "east", "look up"))
GARDEN = at("garden", 0.0, ("west", "dig"))
PRIOR = {"cellar": (0.4, 0.6), "hall": (0.2, 0.3, 0.5), "garden": (0.25, 0.75)}


def step(state: GameState, action: str) -> HistoryStep:
    return HistoryStep("", action, 0.0, state.place, state.room, state.score)


def make_map() -> RoomMap:
    """cellar - hall - garden, all visited."""
    rooms = RoomMap()
    for state in (CELLAR, HALL, GARDEN):
        rooms.visit(state, np.array(PRIOR[state.room]))
    for before, action, after in ((CELLAR, "up", HALL), (HALL, "down", CELLAR), (HALL, "east", GARDEN)):
        rooms.add_step(step(before, action), after=after)
    rooms.add_step(step(GARDEN, "west"), after=HALL)
    return rooms


def test_routes_are_the_shortest_known_ways():
    assert make_map().routes(CELLAR) == {"cellar": Route(0, ""), "hall": Route(1, "up"), "garden": Route(2, "up")}
    assert make_map().routes(GARDEN)["cellar"] == Route(2, "west")


def test_routes_begin_with_a_valid_action_and_forget_exits_that_no_longer_lead_out():
    rooms = make_map()
    locked = dataclasses.replace(HALL, valid_actions=("down", "look up"))
    assert set(rooms.routes(locked)) == {"hall", "cellar"}
    rooms.add_step(step(HALL, "east"), after=HALL)
    assert set(rooms.routes(CELLAR)) == {"cellar", "hall"}
    rooms.add_step(step(CELLAR, "up"), after=dataclasses.replace(HALL, done=True))  # the game is lost there
    assert set(rooms.routes(CELLAR)) == {"cellar"}
    rooms.add_step(HistoryStep("", "look up", -5.0, HALL.place, "hall", 0.0), after=GARDEN)  # it lost points
    assert set(rooms.routes(HALL)) == {"hall", "cellar"}
    rooms.add_step(step(HALL, "east"), after=at("roof", 0.0))
    assert rooms.routes(HALL)["roof"] == Route(1, "east")


def test_targets_are_sampled_by_prior_distance_and_count():
    rooms, counts, rng = make_map(), NoveltyCounts(), np.random.default_rng(0)
    rooms.counts.clear()
    counts.actions["cellar", 0.0, "push rock"] = 3
    rooms.counts[CELLAR.place]["push rock"] = 1
    rooms.counts[GARDEN.place]["dig"] = 7  # another room
    counts.actions["garden", 0.0, "dig"] = 2
    counts.actions["garden", 9.0, "west"] = 5  # with another score
    expected = {
        ("cellar", "up"): 0.4,
        ("cellar", "push rock"): 0.6 / (4 * 2) ** 1.5,
        ("hall", "down"): 0.2 / 2,
        ("hall", "east"): 0.3 / 2,
        ("hall", "look up"): 0.5 / 2,
        ("garden", "west"): 0.25 / 3,
        ("garden", "dig"): 0.75 / 3 / 3**3,
    }
    total = sum(weight**2 for weight in expected.values())
    found = Counter(rooms.sample_target(CELLAR, counts, routes=rooms.routes(CELLAR), rng=rng) for _ in range(5000))
    for target, weight in expected.items():
        assert found[Target(*target)] / 5000 == pytest.approx(weight**2 / total, abs=0.02)
    assert set(found) <= {Target(*target) for target in expected}


def test_state_dict_restores_a_map():
    file = io.BytesIO()
    torch.save(make_map().state_dict(), file)
    file.seek(0)
    restored = RoomMap()
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored == make_map()


# ---- the strategy ----


def make_episode(target: Target, *, start=CELLAR) -> tuple[GoExplore, ScriptedEpisode]:
    """An episode whose target is given."""
    strategy = GoExplore([NoveltyCounts()], deviation_prob=0.0)
    strategy.maps[0] = make_map()
    episode = ScriptedEpisode(strategy, start)
    saved = strategy.state_dict()
    saved["progress"][0] |= {"target": tuple(target), "give_up_at": 99}
    strategy.load_state_dict(saved)
    episode.ask()
    return strategy, episode


def proposed(episode: ScriptedEpisode) -> str:
    assert episode.noise is not None and episode.noise.probs.max() == 1.0
    assert (episode.noise.only == (episode.noise.probs == 1.0)).all()
    return episode.state.valid_actions[int(episode.noise.probs.argmax())]


def target_of(strategy: GoExplore) -> Target | None:
    return strategy.state_dict()["progress"][0]["target"]


def test_an_episode_goes_to_its_target_and_tries_it():
    target = Target("garden", "dig")
    strategy, episode = make_episode(target)
    for action, after in (("up", HALL), ("east", GARDEN)):
        assert proposed(episode) == action and target_of(strategy) == tuple(target)
        episode.take(action, after)
    assert proposed(episode) == "dig"
    episode.take("west", GARDEN)  # another command
    assert proposed(episode) == "dig" and target_of(strategy) == tuple(target)
    episode.take("dig", dataclasses.replace(GARDEN, done=True))
    assert target_of(strategy) is None


def test_an_episode_finds_another_way_after_a_step_that_it_did_not_intend():
    strategy, episode = make_episode(Target("cellar", "push rock"), start=HALL)
    assert proposed(episode) == "down"
    episode.take("east", GARDEN)
    assert proposed(episode) == "west" and target_of(strategy) == Target("cellar", "push rock")


@pytest.mark.parametrize(
    ("after", "reward"),
    [
        (at("hall", 0.0, ("look up",)), 0.0),  # no known way
        (at("garden", 0.0, ("west",)), 0.0),  # the command is not valid there
        (dataclasses.replace(HALL, score=5.0), 5.0),  # points were gained
    ],
)
def test_an_episode_chooses_a_new_target_if_it_cannot_reach_it_or_after_points(after, reward):
    strategy, episode = make_episode(Target("garden", "dig"))
    episode.take("up", after, reward)
    target = target_of(strategy)
    assert target is not None and target != Target("garden", "dig")


def test_an_episode_gives_up_a_target_after_twice_the_distance():
    strategy, episode = make_episode(Target("garden", "dig"))
    saved = strategy.state_dict()
    saved["progress"][0]["give_up_at"] = 3
    strategy.load_state_dict(saved)
    episode.ask()
    for _ in range(2):
        episode.take("push rock", CELLAR)
        assert target_of(strategy) == Target("garden", "dig")
    episode.take("push rock", CELLAR)
    target = target_of(strategy)
    distance = make_map().routes(CELLAR)[target[0]].distance
    assert strategy.state_dict()["progress"][0]["give_up_at"] == 3 + 2 * distance + 1
