"""Collection: records of decisions, groups of games, failing games, and interrupted and restored collection."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest
import torch
from loguru import logger

import priorzero.play.collector
from priorzero.play.exploration import make_exploration
from priorzero.types import GameWorkerError
from priorzero.world_model.records import RecordTable, read_records
from tests.helpers.collecting import LastActionEngine, collect, make_collector, num_pending, records_of


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_collector_records_hold_what_belongs_to_the_same_decision(groups):
    collector, _, player = make_collector(groups=groups)
    collected = collect(collector, 63)
    records, pending = records_of(collected), sum(num_pending(collector))
    assert collected.env_steps == len(records) + pending and 63 <= collected.env_steps <= 65
    if groups == 1:
        assert (collected.env_steps, pending, len(collected.episodes)) == (63, 0, 9)
    for r in records:
        room = int(r.state.score)
        k = len(r.state.valid_actions)
        assert r.state.valid_actions == tuple(f"act {room} {j}" for j in range(2 + room % 3))
        assert r.reward == 10 * room + r.chosen  # the reward of this room and this action
        assert f"room {room}\n" in r.prompt and f"- act {room} {k - 1}" in r.prompt
        assert r.prior.completion == r.prompt[-40:]
        assert r.prior.logprobs.shape == r.visit_counts.shape == r.action_indices.shape == (k,)
        assert r.prior.logprobs.argmax() == k - 1
        assert r.visit_counts.sum() == 6
        assert r.features.tolist() == [room, r.step, k, 1]
        assert player.indexer.indices(r.state.valid_actions).tolist() == r.action_indices.tolist()
        assert r.done == (r.step == 6)
    by_episode = {}
    for r in records:
        by_episode.setdefault(r.episode, []).append(r)
    for episode in by_episode.values():
        assert [r.step for r in episode] == list(range(len(episode))) and len(episode) <= 7
        for r, following in itertools.pairwise(episode):
            assert f"> {r.action_text}" in following.prompt
    assert sorted(e.total_reward for e in collected.episodes) == sorted(
        sum(r.reward for r in episode) for episode in by_episode.values() if episode[-1].done
    )


class SlowEngine(LastActionEngine):
    """Takes 50 ms for a request.

    Attributes:
        most: the largest number of requests at the same time.
    """

    inside = most = 0

    async def priors(self, requests):
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(0.05)
        self.inside -= 1
        return await super().priors(requests)


def test_collector_searches_for_one_group_while_another_waits_for_the_llm():
    collector, _, player = make_collector(groups=2, num_games=4)
    player.prior.engine = SlowEngine()
    collect(collector, 28)
    usage = player.timeline.finish_interval()
    assert player.prior.engine.most == 2
    # Searches and games run during the requests of the other group, so that the parts add up to more than the whole.
    assert usage.overlapped > 0.2 * usage.busy["search"] and sum(usage.busy.values()) > usage.wall
    collector, _, player = make_collector(groups=1, num_games=4)
    player.prior.engine = SlowEngine()
    collect(collector, 28)
    usage = player.timeline.finish_interval()
    assert player.prior.engine.most == 1 and usage.overlapped < 0.001 * usage.wall


async def test_collector_stops_all_groups_if_one_fails():
    collector, games, player = make_collector(groups=2, num_games=4)
    player.prior.engine = SlowEngine()

    async def broken(action):
        raise ZeroDivisionError

    games[1].step = broken

    with pytest.raises(ZeroDivisionError):
        await collector.collect(1000)
    before = games[0].steps
    await asyncio.sleep(0.2)
    assert games[0].steps == before


@pytest.mark.parametrize("exploration", ["go_explore", "dirichlet"])
def test_collector_calls_the_exploration_strategy_in_order(monkeypatch, exploration):
    """The calls contain the state before the action, its outcome and the history up to it."""
    calls, given = {0: [], 1: []}, []

    class Recorder:
        """Another strategy, whose calls are stored."""

        def __init__(self, settings, counts):
            self.strategy = make_exploration(settings, counts)
            given.extend(counts)

        def __getattr__(self, name):
            method = getattr(self.strategy, name)
            if name in ("scalars", "state_dict"):
                return method

            def call(env, *args, **kwargs):
                calls[env].append((name, args, kwargs))
                return method(env, *args, **kwargs)

            return call

    monkeypatch.setattr(priorzero.play.collector, "make_exploration", Recorder)
    collector, _, _ = make_collector(num_games=2, length=3, search={"exploration": exploration}, prior={"alpha": 0.5})
    records = records_of(collect(collector, 12))
    (counts,) = given
    assert counts.actions.total() == 12  # the strategy has the counts that the collector updates
    for env in calls:
        names = [name for name, _, _ in calls[env]]
        assert names == 2 * ["begin_episode", *3 * ["root_noise", "observe"], "end_episode"]
        own = [r for r in records if r.episode % 2 == env]
        asked = [args for name, args, _ in calls[env] if name == "root_noise"]
        observed = [kwargs for name, _, kwargs in calls[env] if name == "observe"]
        for r, (state, probs), outcome in zip(own, asked, observed, strict=True):
            assert state == r.state and probs == pytest.approx(0.98 * np.exp(r.prior.logprobs) + 0.02 / len(probs))
            assert (outcome["position"], outcome["history"][r.step].reward) == (r.chosen, r.reward)
            assert outcome["history"][r.step].action == r.action_text
        for outcome, (following, _) in zip(observed, asked[1:], strict=False):
            if not outcome["after"].done:
                assert outcome["after"] == following
        histories = [args[1] for name, args, _ in calls[env] if name == "end_episode"]
        assert [[step.action for step in history] for history in histories] == [
            [r.action_text for r in own[:3]],
            [r.action_text for r in own[3:]],
        ]


def test_collector_loses_only_the_failed_decision_of_a_failing_game():
    collector, games, _ = make_collector(fail_at=(5, 6))
    collected = collect(collector, 63)
    records = records_of(collected)
    assert collector.num_game_failures == collector.num_steps_lost == 2 and games[1].resets == 5
    # All steps are stored or lost: game 1 lost two decisions, and the earlier ones of its episode are kept.
    assert sum(g.steps for g in games) == 63 == collected.env_steps
    assert len(records) + sum(num_pending(collector)) == 63 - 2
    counts = collector.state_dict(RecordTable())["counts"]
    assert sum(n for own in counts for *_, n in own["actions"]) == 63  # exploration counts the lost ones as well
    truncated = [s for s in collected.segments if not s.records[-1].done and len(s) == len(s.records)]
    assert any(s.records[-1].step == 3 for s in truncated)
    for r in records:
        assert r.reward == 10 * int(r.state.score) + r.chosen


@pytest.mark.parametrize("groups", [1, 2])
def test_collector_gives_up_a_game_that_cannot_start(groups):
    collector, games, _ = make_collector(groups=groups)

    async def broken():
        raise GameWorkerError("made to fail")

    games[1].reset = broken
    collected = collect(collector, 42)
    assert collected.env_steps == games[0].steps + games[2].steps >= 42 and games[1].steps == 0
    assert games[1].restarts == 3 and collector.num_game_failures == 6
    assert collector.scalars(collected)["collector_iter/games_given_up"] == 1
    games[0].reset = games[2].reset = broken
    with pytest.raises(GameWorkerError, match="made to fail"):
        collect(collector, 42)


def test_collector_keeps_a_game_that_starts_at_a_later_attempt():
    collector, games, _ = make_collector()
    reset, attempts = games[1].reset, []

    async def late():
        attempts.append(True)
        if len(attempts) < 5:
            raise GameWorkerError("made to fail")
        return await reset()

    games[1].reset = late
    collected = collect(collector, 42)
    assert games[1].steps > 0 and collector.scalars(collected)["collector_iter/games_given_up"] == 0


@pytest.mark.parametrize("exploration", ["go_explore", "dirichlet"])
async def test_collector_continues_after_an_interruption(tmp_path, exploration):
    """Interrupted at every third decision, saved and restored, it makes the same decisions as without interruption."""
    changes = {"different": 2, "search": {"exploration": exploration, "deviation_prob": 0.5}}

    def decisions(collected):
        return [(r.episode, r.step, r.action_text, r.reward) for r in records_of(collected)]

    uninterrupted, _, _ = make_collector(**changes)
    whole = await uninterrupted.collect(39)
    collector, _, player = make_collector(**changes)
    collected, parts = None, 0
    while collected is None:
        answers = iter([False] * 3)
        collected = await collector.collect(39, stop=lambda answers=answers: next(answers, True))
        if collected is None:
            parts += 1
            table = RecordTable()
            state = collector.state_dict(table)
            torch.save({**state, "records": table.state_dict()}, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
            vocabulary = player.indexer.state_dict()
            collector, _, player = make_collector(**changes)
            player.indexer.load_state_dict(vocabulary)
            await collector.load_state_dict(state, read_records(state.pop("records")))
    assert parts == 4 and decisions(collected) == decisions(whole)
    assert collected.env_steps == whole.env_steps == collector.env_steps == 39
    states = [c.state_dict(RecordTable()) for c in (collector, uninterrupted)]
    for key in ("counts", "exploration", "rngs", "next_episode", "num_episodes", "recent_returns"):
        assert states[0][key] == states[1][key]
    if exploration == "go_explore":
        assert any(deviation is not None for deviation, *_ in states[0]["exploration"]["progress"].values())
    assert collected.episodes == whole.episodes and collected.visit_entropies == whole.visit_entropies
    for a, b in zip(whole.segments, collected.segments, strict=True):
        for name in ("obs", "action", "reward", "root_value", "child_visit", "action_mask", "timestep"):
            assert np.array_equal(getattr(a, f"{name}_segment"), getattr(b, f"{name}_segment"))
        assert np.array_equal(a.returns, b.returns)


async def test_collector_truncates_episodes_that_cannot_be_restored():
    collector, _, _ = make_collector()
    await collector.collect(30)
    table = RecordTable()
    state = collector.state_dict(table)
    pending = [len(numbers) for numbers in state["pending"]]
    other, games, _ = make_collector()
    games[2].fail_at = {1}
    games[0].number = 50  # its feedback differs
    await other.load_state_dict(state, read_records(table.state_dict()))
    assert other.num_game_failures == 2 and pending[0] and pending[2]
    assert len(records_of(other.collected)) == pending[0] + pending[2]
    assert num_pending(other) == [0, pending[1], 0]
    episodes = other.state_dict(RecordTable())["episodes"]
    assert [episode is None for episode in episodes] == [True, False, True]


def test_collector_scalars():
    collector, _, player = make_collector()
    scalars = collector.scalars(collect(collector, 21))
    assert scalars["collector_iter/env_steps"] == 21
    assert scalars["collector_iter/actions_known"] == player.indexer.num_used
    assert 0 < scalars["collector_iter/visit_entropy_mean"] <= np.log(4)
    assert 0 <= scalars["prior/agreement"] <= 1
    assert scalars["collector_iter/reward_mean"] == pytest.approx(np.mean(collector.recent_returns))


def test_collector_episode_results_say_when_they_ended():
    collector, _, _ = make_collector(num_games=2, length=3)
    first, second = collect(collector, 6).episodes
    assert (first.env_step, second.env_step, first.steps) == (5, 6, 3)
    assert first.score > 0 and first.total_reward > 0 and not first.won


def test_collector_keeps_counts_and_archive_of_each_game():
    """Environments 0 and 2 play game 0, environment 1 plays game 1. The rooms are called "game ENVIRONMENT room N"."""
    collector, _, _ = make_collector(num_games=3, different=2)
    collected = collect(collector, 60)
    state = collector.state_dict(RecordTable())
    environments = [{room.split()[1] for room, *_ in counts["actions"]} for counts in state["counts"]]
    assert environments == [{"0", "2"}, {"1"}]
    cells = [[*archive["provisional"], *archive["confirmed"]] for archive in state["exploration"]["archives"]]
    rooms = [{cell[0].split()[1] for cell in own if isinstance(cell[0], str)} for own in cells]
    assert rooms == [{"0", "2"}, {"1"}]
    assert all(archive["provisional"] and archive["confirmed"] for archive in state["exploration"]["archives"])
    tried, scalars = sum(len(counts["actions"]) for counts in state["counts"]), collector.scalars(collected)
    assert scalars["collector_iter/commands_tried"] == tried >= scalars["collector_iter/commands_leading_on"] > 0


@pytest.mark.parametrize(("deviation_prob", "deviates"), [(0.0, False), (1.0, True)])
def test_collector_lets_episodes_deviate(deviation_prob, deviates):
    collector, _, _ = make_collector(num_games=2, search={"deviation_prob": deviation_prob})
    collect(collector, 30)
    deviations = [own["deviation"] for own in collector.state_dict(RecordTable())["exploration"]["progress"].values()]
    assert [deviation is not None for deviation in deviations] == [deviates] * 2


def test_collector_warns_once_when_the_action_vocabulary_is_full():
    messages: list[str] = []
    handler = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    collector, _, player = make_collector(env={"action_space_size": 20})
    collect(collector, 6)  # 2 decisions in each game; the first rooms have 2, 3 and 4 actions
    assert messages == [] and player.indexer.num_overflows == 0
    collect(collector, 60)
    collect(collector, 60)
    logger.remove(handler)
    assert player.indexer.num_overflows > 0
    (message,) = messages
    assert message.startswith("the action vocabulary is full (env.action_space_size=20)")


def test_collector_records_every_nth_episode_with_its_trees():
    collector, _, player = make_collector(num_games=2, length=4, run={"record_every": 3})
    collected = collect(collector, 32)  # eight episodes, of which the numbers 0, 3 and 6 are recorded
    plain, _, _ = make_collector(num_games=2, length=4)
    other = collect(plain, 32)
    assert [r.chosen for r in records_of(collected)] == [r.chosen for r in records_of(other)] and not other.recordings
    assert [(r["episode"], r["env_step"]) for r in collected.recordings] == [(1, 7), (4, 16), (7, 31)]
    texts = set(player.indexer.texts().values())
    by_episode = {}
    for record in records_of(collected):
        by_episode.setdefault(record.episode + 1, []).append(record)
    for recording in collected.recordings:
        assert (recording["mode"], recording["game"], recording["unseen"]) == ("training", "counting 0", False)
        records = by_episode[recording["episode"]]
        assert [s["chosen"] for s in recording["steps"]] == [r.chosen for r in records] and len(records) == 4
        assert [s["reward"] for s in recording["steps"]] == [r.reward for r in records]
        for step in recording["steps"]:
            counts = dict(zip(step["valid_actions"], step["visit_counts"], strict=True))
            assert {node["action"]: node["visit_count"] for node in step["tree"]} == {
                a: n for a, n in counts.items() if n
            }
            assert {child["action"] for node in step["tree"] for child in node["children"]} <= texts


async def test_collector_continues_a_recording_after_a_checkpoint(tmp_path):
    whole, _, _ = make_collector(length=7, run={"record_every": 2})
    expected = (await whole.collect(40)).recordings
    collector, _, player = make_collector(length=7, run={"record_every": 2})
    first = await collector.collect(10)  # in the middle of the first episodes
    table = RecordTable()
    state, models = collector.state_dict(table), player.indexer.state_dict()
    torch.save({"collector": state, "records": table.state_dict()}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, _, player = make_collector(length=7, run={"record_every": 2})
    player.indexer.load_state_dict(models)
    await resumed.load_state_dict(loaded["collector"], read_records(loaded["records"]))
    assert first.recordings == []
    assert (await resumed.collect(30)).recordings == expected and len(expected) >= 2
