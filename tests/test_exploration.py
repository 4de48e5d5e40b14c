"""The memory of commands: counts, and which commands led on."""

import dataclasses
import itertools
from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_collector import build, collect, state_of

from priorzero.play.exploration import CommandMemory
from priorzero.play.player import Lane
from priorzero.types import ActionPrior, GameState, HistoryStep


def walk(*steps):
    """An episode of ``(place, score, command, reward)``; the room is the place's first letter."""
    return [HistoryStep("", command, reward, (place,), (place[0], score)) for place, score, command, reward in steps]


def at(place, score):
    return GameState(feedback=place, valid_actions=("wait",), score=score, max_score=9.0, moves=0)


KITCHEN = walk(
    ("a", 0.0, "open", 1.0),
    ("a1", 1.0, "take", 0.0),
    ("a2", 1.0, "drop", 0.0),  # back to a1: a loop
    ("a1", 1.0, "go", 0.0),
    ("b", 1.0, "put", 1.0),
)


def remembered(history, *, now, return_first=True):
    memory = CommandMemory(return_first=return_first)
    for step in history:
        memory.add(step.standing, step.action)
    memory.earned(history, now=now)
    return memory


def leading(memory, place, score, *commands, ahead=0.0):
    """Those of the commands that lead on."""
    state = GameState(feedback=place, valid_actions=commands, score=score, max_score=9.0, moves=0)
    leads, _ = memory.way_on(state, ahead=ahead)
    return [command for command, on in zip(commands, leads, strict=True) if on]


def test_the_direct_way_to_points_leads_on():
    memory = remembered(KITCHEN, now=at("b1", 2.0))
    assert memory.num_leading == 3
    assert leading(memory, "a", 0.0, "open", "go") == ["open"]
    assert leading(memory, "a1", 1.0, "take", "drop", "go", "wait") == ["go"]
    assert leading(memory, "b", 1.0, "put", "go") == ["put"]
    assert leading(memory, "a1", 1.0, "take", "drop") == []  # the way is known, but cannot be taken
    assert leading(memory, "c", 1.0, "go") == leading(memory, "a", 1.5, "go") == []


def test_in_an_unknown_place_what_was_given_in_its_room_leads_on():
    steps = walk(("a", 0.0, "take", 0.0), ("a1", 0.0, "go", 0.0), ("b", 0.0, "put", 1.0))
    memory = remembered(steps, now=at("b1", 1.0))
    state = GameState("", ("go", "take", "wait"), 0.0, 9.0, 0, look="a\nA lamp is here.")
    assert state.standing == ("a", 0.0)
    assert memory.way_on(state)[0].tolist() == [True, True, False]
    assert leading(memory, "a", 0.0, "go", "take", "wait") == ["take"]
    assert leading(memory, "a1", 0.0, "go", "take", "wait") == ["go"]
    assert leading(memory, "a", 0.0, "go", "wait") == ["go"]  # the place's own command cannot be given


def test_counts_go_on_where_a_command_led_on():
    memory = remembered(KITCHEN, now=at("b1", 2.0))
    assert memory.add(("a", 1.0), "go") == 2
    assert memory.tries(("a", 1.0), ("take", "drop", "go", "wait")).tolist() == [1, 1, 2, 0]
    assert len(memory) == 5


def test_points_lost_on_the_way_do_not_end_it():
    steps = walk(("a", 5.0, "fall", -1.0), ("b", 4.0, "climb", 0.0), ("c", 4.0, "win", 6.0))
    memory = remembered(steps, now=at("d", 10.0))
    assert memory.num_leading == 3 and leading(memory, "a", 5.0, "fall") == ["fall"]


def dark(*, score=5.0):
    """Down without the lamp, to five points, and dead."""
    return walk(("a", 0.0, "down", score), ("c", score, "walk", 0.0)), at("grue", score)


def test_a_way_to_points_that_are_lost_again_is_worth_what_it_ended_with():
    memory = CommandMemory(return_first=True)
    steps, now = dark()
    memory.earned(steps[:1], now=now)
    assert leading(memory, "a", 0.0, "down", "lamp") == ["down"]
    memory.ended(steps, now=dataclasses.replace(now, score=2.0))  # two are better than nothing
    assert leading(memory, "a", 0.0, "down", "lamp") == ["down"] and leading(memory, "c", 5.0, "walk") == []
    lamp = walk(("a", 0.0, "lamp", 0.0), ("a1", 0.0, "down", 3.0))
    memory.earned(lamp, now=at("c1", 3.0))
    memory.ended([*lamp, *walk(("c1", 3.0, "walk", 0.0))], now=at("d", 3.0))
    assert leading(memory, "a", 0.0, "down", "lamp") == ["lamp"]  # three that stay
    again = CommandMemory(return_first=True)
    memory.earned(steps[:1], now=now)
    assert leading(memory, "a", 0.0, "down", "lamp") == ["down"]  # five, as long as the episode lives
    again.load_state_dict(memory.state_dict())
    assert again.state_dict() == memory.state_dict() and leading(again, "a", 0.0, "down", "lamp") == ["down"]
    for either in memory, again:
        either.ended(steps, now=dataclasses.replace(now, score=2.0))
        assert leading(either, "a", 0.0, "down", "lamp") == ["lamp"]
        drawn = [either.draw_detour(np.random.default_rng(n), share=1.0, max_score=0.0) for n in range(99)]
        assert {detour[0] for detour in drawn if detour} == {0, 1, 2}


def test_only_what_an_episode_did_is_forgotten_at_its_end():
    memory = CommandMemory(return_first=True)
    memory.earned(walk(("a", 0.0, "lamp", 5.0)), now=at("c", 5.0))
    longer = walk(("a", 0.0, "down", 0.0), ("b", 0.0, "get", 5.0))
    memory.earned(longer, now=at("c", 5.0))
    memory.ended([*longer, *walk(("c", 5.0, "walk", -5.0))], now=at("grue", 0.0))
    assert leading(memory, "a", 0.0, "lamp", "down") == ["lamp"] and leading(memory, "b", 0.0, "get") == []


def test_points_after_a_loss_are_forgotten_as_well():
    memory = CommandMemory(return_first=True)
    steps = walk(("a", 0.0, "up", 10.0), ("b", 10.0, "fall", -5.0), ("f", 5.0, "down", 3.0), ("g", 8.0, "walk", -3.0))
    memory.earned(steps[:1], now=at("b", 10.0))
    memory.earned(steps[:3], now=at("g", 8.0))
    assert leading(memory, "f", 5.0, "down") == ["down"]
    memory.ended(steps, now=at("grue", 5.0))
    assert leading(memory, "f", 5.0, "down") == [] and leading(memory, "a", 0.0, "up") == ["up"]


def test_who_dies_on_a_way_that_others_survive_does_not_end_it():
    memory = CommandMemory(return_first=True)
    steps, now = dark()
    memory.earned(steps[:1], now=now)
    memory.ended(steps, now=now)
    memory.ended(steps, now=dataclasses.replace(now, score=-5.0))
    assert leading(memory, "a", 0.0, "down", "lamp") == ["down"]
    early = walk(("a", 0.0, "wait", 0.0))  # it had not come that far
    memory.ended(early, now=at("a", -5.0))
    assert leading(memory, "a", 0.0, "down", "lamp") == ["down"]


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from("abc"), st.integers(0, 2), st.booleans()), min_size=1, max_size=40
    )
)
def test_ends_say_nothing_new_where_no_points_are_lost(decisions):
    """Episodes in two lanes: place, points of the command, whether the episode ends with it."""
    with_ends, without = CommandMemory(return_first=True), CommandMemory(return_first=True)
    histories = [[], []]
    for count, (lane, place, points, ends) in enumerate(decisions):
        history = histories[lane]
        score = history[-1].standing[1] + history[-1].reward if history else 0.0
        history += walk((place, score, f"command {count % 3}", float(points)))
        now = at("z", score + points)
        for memory in (with_ends, without) if points else ():
            memory.earned(history, now=now)
        if ends:
            with_ends.ended(history, now=now)
            histories[lane] = []
        for place_of, points_of in itertools.product("abc", range(6)):
            commands = [f"command {n}" for n in range(3)]
            assert leading(with_ends, place_of, points_of, *commands) == leading(
                without, place_of, points_of, *commands
            )
    assert with_ends.num_leading == without.num_leading


@pytest.mark.parametrize("back", [3.0, 5.0])
def test_points_that_are_lost_and_earned_again_lead_nowhere(back):
    steps = walk(("a", 10.0, "take egg", -5.0), ("b", 5.0, "put egg", back))
    memory = remembered(steps, now=at("c", 5.0 + back))
    assert leading(memory, "a", 10.0, "take egg", "wait") == []
    assert leading(memory, "b", 5.0, "put egg", "wait") == ["put egg"] and memory.num_leading == 1


def test_the_way_to_most_points_leads_on_and_of_two_the_shorter():
    memory = remembered(KITCHEN, now=at("b1", 2.0))  # open, go, put
    longer = walk(("a", 0.0, "open", 1.0), ("a1", 1.0, "take", 0.0), ("a2", 1.0, "go", 0.0), ("b2", 1.0, "put", 1.0))
    memory.earned(longer, now=at("b3", 2.0))
    assert memory.num_leading == 3 and leading(memory, "a1", 1.0, "take", "go") == ["go"]
    assert leading(memory, "b2", 1.0, "put") == ["put"]  # it alone came here
    more = [*longer, *walk(("b3", 2.0, "cut", 1.0))]  # which needs what was taken
    memory.earned(more, now=at("b4", 3.0))
    assert memory.num_leading == 5 and leading(memory, "a1", 1.0, "take", "go") == ["take"]
    known = memory.state_dict()
    memory.earned(KITCHEN, now=at("b1", 2.0))  # shorter, but it leads to less
    assert memory.state_dict() == known
    memory.earned(more[2:], now=at("b4", 3.0))  # "take" was not needed after all
    assert memory.num_leading == 4
    assert leading(memory, "a1", 1.0, "take", "go") == ["take"]  # nobody came to the same from there by fewer
    again = remembered(walk(("z", 1.0, "go", 1.0)), now=at("z1", 2.0))
    again.load_state_dict(memory.state_dict())
    assert again.state_dict() == memory.state_dict() and again.num_leading == 4


def test_without_return_first_commands_are_only_counted():
    memory = remembered(KITCHEN, now=at("b1", 2.0), return_first=False)
    assert memory.num_leading == 0 and leading(memory, "b", 1.0, "put") == []
    assert memory.tries(("b", 1.0), ("put",)).tolist() == [1]


@pytest.mark.parametrize("with_prior", [False, True])
def test_where_no_way_is_known_one_command_takes_the_noise_s_place_mostly_one_that_was_tried_little(with_prior):
    collector, _, _ = build(num_games=1, search={"return_first": True})
    collect(collector, 4)
    lane, player = collector._lanes[0], collector._player
    lane.memory = CommandMemory(return_first=True)
    actions = lane.state.valid_actions
    for _ in range(3):
        lane.memory.add(lane.state.standing, actions[0])
    indices = np.arange(len(actions))
    share, prior = np.full(len(actions), 1.0 / len(actions)), None
    if with_prior:
        share = np.arange(1.0, len(actions) + 1) / np.arange(1.0, len(actions) + 1).sum()
        prior = ActionPrior(np.log(share).astype(np.float32), source="score", version=0)
        share = 0.98 * share + 0.02 / len(actions)  # prior.floor
    drawn = np.array([player._root(lane, lane.state, indices, prior, explore=True).noise for _ in range(4000)])
    assert ((drawn == 1.0).sum(axis=1) == 1).all() and (drawn.sum(axis=1) == 1.0).all()
    share[0] /= (1 + 3) ** 2
    assert drawn.mean(axis=0) == pytest.approx(share / share.sum(), abs=0.03)


def test_a_prior_that_is_sure_of_itself_lets_others_be_tried():
    """``prior.floor`` holds for what is drawn as well."""
    collector, _, _ = build(num_games=1, prior={"floor": 0.5})
    collect(collector, 4)
    lane, player = collector._lanes[0], collector._player
    lane.memory = CommandMemory(return_first=True)
    indices = np.arange(len(lane.state.valid_actions))
    logprobs = np.full(len(indices), -50.0, dtype=np.float32)
    logprobs[0] = 0.0
    prior = ActionPrior(logprobs, source="score", version=0)
    drawn = np.array([player._root(lane, lane.state, indices, prior, explore=True).noise for _ in range(2000)])
    even = 0.5 / len(indices)
    assert drawn.mean(axis=0) == pytest.approx([0.5 + even, *[even] * (len(indices) - 1)], abs=0.04)


def test_without_return_first_the_noise_is_dirichlet_s():
    collector, _, _ = build(num_games=1, search={"root_dirichlet_alpha": 1.0, "return_first": False})
    collect(collector, 4)
    lane = collector._lanes[0]
    indices = np.arange(len(lane.state.valid_actions))
    drawn = np.array(
        [collector._player._root(lane, lane.state, indices, None, explore=True).noise for _ in range(2000)]
    )
    assert drawn.sum(axis=1) == pytest.approx(1.0) and drawn.max() < 1.0
    assert drawn.mean(axis=0) == pytest.approx(1.0 / len(indices), abs=0.03)


@pytest.mark.parametrize("known", [False, True])
def test_collection_explores_less_where_the_way_is_known(known):
    collector, _, _ = build(num_games=1, search={"temperature": 1.0, "return_first": True})
    collect(collector, 4)
    lane = collector._lanes[0]
    lane.memory = CommandMemory(return_first=True)
    state = lane.state
    if known:
        lane.memory.earned(
            [HistoryStep("", state.valid_actions[0], 1.0, ("x",), state.standing)],
            now=dataclasses.replace(state, score=state.score + 1),
        )
    player, indices = collector._player, np.arange(len(state.valid_actions))
    root = player._root(lane, state, indices, None, explore=True)
    if known:
        assert root.noise.tolist() == [1.0] + [0.0] * (len(indices) - 1)
    visits = np.zeros(len(indices), dtype=np.int64)
    visits[:2] = 3, 1  # shares 3/4 and 1/4; squared and normalised 9/10 and 1/10
    result = type("Result", (), {"visit_counts": visits})()
    drawn = [player._choose(lane, state, None, result, explore=True) for _ in range(4000)]
    share = 0.9 if known else 0.75
    assert np.mean([chosen == 0 for chosen, _ in drawn]) == pytest.approx(share, abs=0.03)
    assert all(prob == pytest.approx({0: share, 1: 1 - share}[chosen]) for chosen, prob in drawn)
    assert player._choose(lane, state, None, result, explore=False) == (0, 1.0)
    assert player._root(lane, state, indices, None, explore=False).tries is None


def test_a_collector_remembers_what_earned_points():
    collector, _, _ = build(num_games=2, search={"return_first": True})
    collected = collect(collector, 40)
    assert any(record.reward > 0 for segment in collected.segments for record in segment.records)
    (memory,) = collector.memories
    assert 0 < memory.num_leading <= len(memory)
    assert collected.episodes and memory.state_dict()["kept"]  # what they ended with
    assert collector.scalars(collected)["collector_iter/commands_leading_on"] == memory.num_leading
    plain, _, _ = build(num_games=2, search={"return_first": False})
    collect(plain, 40)
    assert plain.memories[0].num_leading == 0


def test_what_is_known_of_one_game_says_nothing_of_another():
    collector, _, _ = build(num_games=3, different=2)
    collected = collect(collector, 60)
    first, second = collector.memories
    assert [lane.memory for lane in collector._lanes] == [first, second, first]
    for number, own, other in (0, first, second), (1, second, first), (2, first, second):
        start = state_of(number, 1, moves=0, length=7)
        assert own.tries(start.standing, start.valid_actions).sum() > 0
        assert other.tries(start.standing, start.valid_actions).sum() == 0
    assert collector.scalars(collected)["collector_iter/commands_tried"] == len(first) + len(second)


def test_some_episodes_leave_the_known_way_anywhere_on_it():
    memory, rng = remembered(KITCHEN, now=at("b1", 2.0)), np.random.default_rng(0)
    assert [memory.draw_detour(rng, share=0.0, max_score=9.0) for _ in range(9)] == [None] * 9
    drawn = [memory.draw_detour(rng, share=0.25, max_score=9.0) for _ in range(4000)]
    detours = [detour for detour in drawn if detour is not None]
    assert len(detours) / len(drawn) == pytest.approx(0.25, abs=0.03)
    # Before the first command of the direct way, ..., after its last; for one command, or for two or three.
    assert Counter(detours).keys() == {(leave, leave + n) for leave in range(4) for n in (1, 2, 3)}
    assert min(Counter(detours).values()) > 40  # some 83 each
    memory.earned(walk(("z", 0.0, "go", 0.5), ("z1", 0.5, "on", 1.0)), now=at("z2", 1.5))
    # Another way, to less, changes nothing.
    assert {memory.draw_detour(rng, share=1.0, max_score=0.0) for _ in range(400)} == set(detours)
    assert {CommandMemory(return_first=True).draw_detour(rng, share=1.0, max_score=0.0) for _ in range(9)} == {None}
    assert {memory.draw_detour(rng, share=1.0, max_score=2.0) for _ in range(99)} == {None}  # there is nothing more
    again = CommandMemory(return_first=True)
    again.load_state_dict(memory.state_dict())
    twice = [m.draw_detour(np.random.default_rng(1), share=1.0, max_score=0.0) for m in (memory, again)]
    assert twice[0] == twice[1]


def test_what_is_known_with_fewer_points_leads_on_for_who_is_ahead():
    memory = remembered(walk(("a", 0.0, "go", 2.0), ("b", 2.0, "up", 3.0)), now=at("c", 5.0))
    memory.earned(walk(("a", 0.0, "go", 2.0), ("b", 2.0, "take", 1.0), ("b1", 3.0, "sit", 0.5)), now=at("b2", 3.5))
    commands = "go", "up", "take", "sit"
    assert leading(memory, "b", 2.0, *commands) == ["up"]
    assert leading(memory, "b1", 3.0, *commands) == ["sit"]
    # In b half a point is to come with three points, and three are with two, though only the room is known.
    in_b = GameState("", commands, 3.0, 9.0, 0, look="b\nA lamp is here.")
    assert in_b.standing == ("b", 3.0)
    leads, to_come = memory.way_on(in_b)
    assert leads.tolist() == [False, False, False, True] and to_come == 0.5
    leads, to_come = memory.way_on(in_b, ahead=1.0)
    assert leads.tolist() == [False, True, False, False] and to_come == 3.0
    in_b = dataclasses.replace(in_b, valid_actions=("go", "sit"))
    assert memory.way_on(in_b, ahead=1.0)[0].tolist() == [False, True]  # the better one cannot be given
    assert leading(memory, "a", 1.5, *commands, ahead=1.5) == ["go"] and leading(memory, "a", 1.5, *commands) == []
    assert leading(memory, "b", 2.0, *commands, ahead=-1.0) == ["up"]  # more is to come by what is known as it is


MAIN_WAY = walk(("a", 0.0, "go", 2.0), ("b", 2.0, "up", 3.0), ("c", 5.0, "up", 4.0))  # to nine points


class Walker:
    """An episode in a lane, by hand: what the player and the collector tell it and the memory."""

    def __init__(self, memory, *, detour):
        start = self.told("a", 0.0)
        self.lane = Lane(start, deque(), deque(), np.random.default_rng(0), memory=memory, detour=detour)

    def told(self, place, score):
        return GameState(place, ("go", "up", "aside", "back"), score, 99.0, 0)

    def give(self, command, place, reward=0.0):
        """Returns what exploration follows then."""
        lane, state = self.lane, self.told(place, self.lane.state.score + reward)
        promised = lane.promised(lane.state, lane.state.valid_actions.index(command))
        lane.advance(
            action_text=command, action_index=0, reward=reward, state=state, features=np.zeros(1), promised=promised
        )
        if reward > 0:
            lane.memory.earned(lane.history, now=state)
        return self.follows()

    def follows(self):
        state = self.lane.state
        return [action for action, leads in zip(state.valid_actions, self.lane.leading(state), strict=True) if leads]


def test_an_episode_that_has_earned_something_aside_follows_the_known_way_again():
    memory = remembered(MAIN_WAY, now=at("d", 9.0))
    walker = Walker(memory, detour=(1, 99))
    lane = walker.lane
    assert walker.follows() == ["go"]
    assert walker.give("go", "b", 2.0) == [] and lane.ahead == 0.0  # it has left
    assert walker.give("aside", "y") == []
    assert walker.give("aside", "z", -1.0) == [] and lane.ahead == -1.0  # points lost: it stays away
    assert walker.give("aside", "z1", 3.0) == [] and lane.ahead == 2.0  # here no way is known
    again = Walker(memory, detour=None).lane
    again.load_state_dict(lane.state_dict())
    assert again.ahead == 2.0 and again.detour == (1, 99)
    assert walker.give("back", "y") == []  # its own way to what it has now leads nowhere
    assert walker.give("back", "b") == ["up"]
    assert walker.give("up", "c", 3.0) == ["up"] and lane.ahead == 2.0  # the known way's own points are not aside
    assert walker.give("up", "d", 4.0) == [] and lane.state.score == 11.0
    assert leading(memory, "b", 2.0, "up", "aside") == ["aside"]  # both together are the best way now


def test_who_finds_again_what_another_found_aside_is_ahead_as_well():
    memory = remembered(MAIN_WAY, now=at("d", 9.0))
    for _ in range(2):  # the first does not come back
        walker = Walker(memory, detour=(1, 99))
        walker.give("go", "b", 2.0)
        assert walker.give("aside", "z") == []
        assert walker.give("aside", "z1", 1.0) == [] and walker.lane.ahead == 1.0
    assert walker.give("back", "b") == ["up"]


def test_whether_points_are_aside_is_told_by_what_was_known_when_the_command_was_chosen():
    memory = remembered(MAIN_WAY, now=at("d", 9.0))
    lane = Walker(memory, detour=(0, 1)).lane
    promised = lane.promised(lane.state, 0)
    assert promised == 9.0 and lane.promised(lane.state, 1) == 0.0
    memory.earned(walk(("a", 0.0, "back", 30.0)), now=at("x", 30.0))  # another episode, in between
    assert lane.promised(lane.state, 0) == 0.0
    after = GameState("b", ("go", "up"), 2.0, 99.0, 1)
    lane.advance(action_text="go", action_index=0, reward=2.0, state=after, features=np.zeros(1), promised=promised)
    assert lane.ahead == 0.0


def test_a_collector_tells_a_lane_what_was_promised(monkeypatch):
    told = []
    advance = Lane.advance

    def advancing(lane, *, promised, **what):
        told.append(promised)
        advance(lane, promised=promised, **what)

    monkeypatch.setattr(Lane, "promised", lambda lane, state, chosen: 7.0)
    monkeypatch.setattr(Lane, "advance", advancing)
    collector, _, _ = build(num_games=2)
    collect(collector, 6)
    assert told == [7.0] * 6


def test_points_of_the_known_way_do_not_bring_an_episode_back_to_it():
    for detour, command, ahead in [((0, 1), "go", 0.0), ((0, 1), "up", 2.0), (None, "up", 0.0), ((1, 2), "up", 0.0)]:
        walker = Walker(remembered(MAIN_WAY, now=at("d", 9.0)), detour=detour)
        walker.give(command, "b", 2.0)
        assert walker.lane.ahead == ahead


def test_exploration_goes_on_where_the_known_way_is_left():
    collector, _, _ = build(num_games=1, search={"return_first": True})
    collect(collector, 4)
    lane = collector._lanes[0]
    lane.memory = CommandMemory(return_first=True)
    state = lane.state
    known = state.valid_actions[0]
    lane.memory.add(state.standing, known)
    lane.memory.earned(
        [HistoryStep("", known, 1.0, ("x",), state.standing)], now=dataclasses.replace(state, score=state.score + 1)
    )
    player, indices = collector._player, np.arange(len(state.valid_actions))
    now = len(lane.history)
    cases = [(None, True), ((now + 1, now + 9), True), ((now, now + 1), False), ((0, now + 9), False), ((0, now), True)]
    for detour, follows in cases:
        lane.detour = detour
        root = player._root(lane, state, indices, None, explore=True)
        assert root.noise.max() == 1.0 and root.tries[0] == (0 if follows else 1)
        drawn = [player._root(lane, state, indices, None, explore=True).noise.argmax() for _ in range(50)]
        assert (set(drawn) == {0}) == follows


@pytest.mark.parametrize(
    ("share", "max_score", "leaves"), [(0.0, 1000.0, False), (1.0, 1000.0, True), (1.0, 9.0, False)]
)
def test_a_collector_draws_where_each_episode_leaves(share, max_score, leaves):
    """Every episode, none, or none since a way to the most points is known."""
    collector, games, _ = build(num_games=2, search={"explore_share": share})

    def telling(begin):
        async def reset():
            return dataclasses.replace(await begin(), max_score=max_score)

        return reset

    for game in games:
        game.reset = telling(game.reset)
    collect(collector, 30)
    lanes = [lane for lane in collector._lanes if lane is not None]
    assert lanes and all((lane.detour is not None) == leaves for lane in lanes)
