"""What episodes of a game teach about its rooms, and the prompts that contain it."""

from __future__ import annotations

import asyncio
import dataclasses

import torch

import priorzero.play.memory
from priorzero.play.evaluator import Evaluator, Evaluators
from priorzero.play.memory import GameMemory
from priorzero.types import Attempt
from priorzero.world_model.records import RecordTable, read_records
from tests.helpers.collecting import CountingGame, collect, make_collector, make_player, records_of
from tests.helpers.exploring import at, steps

LOST = dataclasses.replace(at("hell", 0.0), done=True)
WON = dataclasses.replace(LOST, won=True)
TRUNCATED = dataclasses.replace(LOST, truncated=True)
HISTORY = steps(("nest", 0.0, "open egg", 5.0), ("path", 5.0, "wait", 0.0), ("bridge", 5.0, "jump", 0.0))


def test_after_episode_stores_points_and_the_action_that_lost_the_game():
    """The rooms of ``steps`` are the first letters of the places."""
    points = {("n", "open egg"): (5.0, False)}
    assert GameMemory().after_episode(HISTORY, LOST).outcomes == {**points, ("b", "jump"): (0.0, True)}
    assert GameMemory().after_episode(HISTORY, WON).outcomes == points
    assert GameMemory().after_episode(HISTORY, TRUNCATED).outcomes == points
    dead = steps(("bridge", 5.0, "jump", -2.0))
    assert GameMemory().after_episode(dead, LOST).outcomes == {("b", "jump"): (0.0, True)}
    assert GameMemory().after_episode(dead, TRUNCATED).outcomes == {}


def test_after_episode_combines_what_several_episodes_taught():
    first = GameMemory().after_episode(HISTORY, LOST)
    before = dict(first.outcomes)
    second = first.after_episode(steps(("bridge", 0.0, "jump", 3.0), ("nest", 3.0, "open egg", 2.0)), TRUNCATED)
    assert first.outcomes == before  # it is not changed
    assert second.outcomes == {("b", "jump"): (3.0, True), ("n", "open egg"): (5.0, False)}
    assert list(second.outcomes) == [("b", "jump"), ("n", "open egg")]  # the latest last


def test_after_episode_forgets_what_was_observed_the_longest_time_ago(monkeypatch):
    monkeypatch.setattr(priorzero.play.memory, "MAX_OUTCOMES", 2)
    memory = GameMemory().after_episode(steps(("a", 0.0, "x", 1.0), ("b", 1.0, "x", 1.0)), WON)
    memory = memory.after_episode(steps(("a", 0.0, "x", 1.0), ("c", 1.0, "x", 1.0)), WON)
    assert list(memory.outcomes) == [("a", "x"), ("c", "x")]


def test_attempts_are_those_of_the_room_that_are_valid_and_most_points_come_first():
    memory = GameMemory(
        {
            ("r", "up"): (0.0, True),
            ("r", "take"): (1.0, False),
            ("r", "open"): (10.0, True),
            ("r", "give"): (1.0, False),
            ("r", "gone"): (99.0, False),
            ("s", "wait"): (99.0, False),
        }
    )
    state = dataclasses.replace(at("room", 0.0, ("wait", "give", "up", "take", "open")), look="r\nA room.")
    opened, gave, took = Attempt("open", 10.0, True), Attempt("give", 1.0), Attempt("take", 1.0)
    assert memory.attempts(state, limit=9) == [opened, gave, took, Attempt("up", 0.0, True)]
    assert memory.attempts(state, limit=2) == [opened, gave]
    assert memory.attempts(dataclasses.replace(state, look="t"), limit=9) == []


def attempts_in(prompt):
    return [line for line in prompt.split("\n") if line.startswith("In this place, earlier attempts:")]


def test_collector_shows_what_earlier_episodes_taught():
    """In room r, action k earns 10 r + k points; the third action of each episode loses the game."""
    collector, _, _ = make_collector(num_games=1, length=3, llm={"memory_lines": 9})
    taught: dict[str, dict[int, tuple[int, bool]]] = {}
    num_shown = 0
    records = records_of(collect(collector, 60))
    for number in range(20):
        own = [each for each in records if each.episode == number]
        for each in own:
            known = {k: outcome for k, outcome in taught.get(each.state.room, {}).items()}
            texts = [
                f'"act {int(each.state.score)} {k}" earned {points} points' + " and ended the game" * lost
                for k, (points, lost) in sorted(known.items(), reverse=True)
            ]
            assert attempts_in(each.prompt) == (
                [f"In this place, earlier attempts: {'; '.join(texts)}."] if texts else []
            )
            num_shown += len(texts)
        for each in own:
            known = taught.setdefault(each.state.room, {})
            lost = each.step == 2 or known.get(each.chosen, (0, False))[1]
            known[each.chosen] = 10 * int(each.state.score) + each.chosen, lost
    assert len(records) == 60 and num_shown > 40


def test_collector_limits_the_memory_of_a_prompt():
    for limit in (0, 1):
        collector, _, _ = make_collector(num_games=1, length=2, llm={"memory_lines": limit})
        prompts = [each.prompt for each in records_of(collect(collector, 40))]
        assert max(prompt.count(" earned ") for prompt in prompts) == limit
        assert len(collector.memories) == limit


def test_collector_does_not_change_the_memory_of_an_episode():
    """Game 1 begins a second episode at step 2; it ends after two episodes of game 0 have ended."""
    collector, games, _ = make_collector(num_games=2, length=3, fail_at=(2,), llm={"memory_lines": 9})
    games[1].number = 0  # the same rooms as in game 0
    records = records_of(collect(collector, 20))
    of_second = [each for each in records if each.episode == 2]
    assert [each.step for each in of_second] == [0, 1, 2] and games[1].resets > 2
    assert [attempts_in(each.prompt) for each in of_second] == [[], [], []]
    ended_meanwhile = [each for each in records if each.episode == 0]
    assert of_second[0].state.room == ended_meanwhile[0].state.room
    later = [each for each in records if each.episode == 4]
    assert attempts_in(later[0].prompt)


async def test_collector_restores_the_memory_of_the_game_and_of_each_episode(tmp_path):
    """When it is saved, game 1 is in an episode that began before the last end of an episode of game 0."""
    collector, games, _ = make_collector(num_games=2, length=3, fail_at=(2,), llm={"memory_lines": 9})
    games[1].number = 0
    await collector.collect(8)
    table = RecordTable()
    torch.save({"collector": collector.state_dict(table), "records": table.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other, games, _ = make_collector(num_games=2, length=3, llm={"memory_lines": 9})
    games[1].number = 0
    await other.load_state_dict(state["collector"], read_records(state["records"]))
    assert other.memories == collector.memories and other.num_game_failures == 1  # the one before it was saved
    own, saved = (c.state_dict(RecordTable())["episodes"][1]["memory"] for c in (other, collector))
    assert own == saved == {} and len(other.memories[0].outcomes) == 3


def test_evaluation_reads_the_memory_of_seen_games_and_does_not_change_it():
    player, prompts = make_player(llm={"memory_lines": 9}), []
    engine = player.prior.engine
    priors = engine.priors

    async def recorded(requests):
        prompts.extend(request.prompt for request in requests)
        return await priors(requests)

    engine.priors = recorded

    def evaluator(name):
        return Evaluator(name, [CountingGame(0, length=2)], player=player, episodes=1, seed=0)

    memory = GameMemory({("game 0 room 1", "act 1 2"): (0.0, True)})
    evaluators = Evaluators(["prior"], [evaluator("a"), evaluator("b")], [evaluator("c")])
    asyncio.run(evaluators.evaluate([memory, GameMemory()]))
    shown = [attempts_in(prompt) for prompt in prompts]
    assert shown == [['In this place, earlier attempts: "act 1 2" ended the game.'], [], [], [], [], []]
    assert memory.outcomes == {("game 0 room 1", "act 1 2"): (0.0, True)}
