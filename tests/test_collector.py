"""Playing: every record holds what belongs together, a failing game costs only itself, evaluation repeats itself."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools

import numpy as np
import pytest

from priorzero.llm.engines import RetryingPrior
from priorzero.play.action_vocabulary import ActionVocabulary
from priorzero.play.collector import Collector
from priorzero.play.evaluator import Evaluator
from priorzero.play.player import Player
from priorzero.llm.prompts import prompt_style
from priorzero.policy import PriorZeroPolicy
from priorzero.runtime.concurrency import OwnerThread
from priorzero.runtime.timeline import Timeline
from priorzero.types import ActionPrior, GameState, GameWorkerError
from priorzero.world_model.lightzero import unizero_config
from tests.helpers.models import make_settings

FEATURES = 4


def state_of(game: int, room: int, *, moves: int, length: int) -> GameState:
    """Which room it is can be read from everything: text, actions and score."""
    actions = tuple(f"act {room} {k}" for k in range(2 + room % 3))
    done = moves >= length
    return GameState(f"game {game} room {room}", () if done else actions, float(room), 1000.0, moves, done)


class CountingGame:
    """Action k of room r leads to room 3r + k + 1 (mod 97) and earns 10r + k, so a reward names its decision."""

    def __init__(self, number, *, length=7, fail_at=()):
        self.number, self.length, self.fail_at = number, length, set(fail_at)
        self.steps = self.resets = self.restarts = 0

    async def reset(self):
        self.resets += 1
        self.room, self.moves = 1, 0
        return state_of(self.number, self.room, moves=0, length=self.length)

    async def step(self, action):
        self.steps += 1
        await asyncio.sleep(0)
        if self.steps in self.fail_at:
            raise GameWorkerError("made to fail")
        _, room, k = action.split()
        assert int(room) == self.room, "an action of another room"
        reward = 10.0 * self.room + int(k)
        self.room, self.moves = (3 * self.room + int(k) + 1) % 97, self.moves + 1
        return state_of(self.number, self.room, moves=self.moves, length=self.length), reward

    async def restart(self):
        self.restarts += 1

    async def close(self): ...


class RoomEncoder:
    def features(self, states):
        return np.array([[s.score, s.moves, len(s.valid_actions), 1] for s in states], dtype=np.float32)


class WhitespaceTokenizer:
    all_special_tokens = ()

    def apply_chat_template(self, messages, **_):
        return messages[-1]["content"]

    def __call__(self, text, **_):
        return {"input_ids": text.split()}


class LastActionEngine:
    """Prefers the last valid action and says so; the prior of a state can be told by its length and its favourite."""

    version = 3
    exclusive = False
    calls = 0

    async def ready(self): ...

    async def priors(self, requests):
        self.calls += 1
        answers = []
        for r in requests:
            probs = np.full(len(r.valid_actions), 0.1 / max(1, len(r.valid_actions) - 1))
            probs[-1] = 0.9
            answers.append(ActionPrior(np.log(probs).astype(np.float32), "score", self.version, r.prompt[-40:]))
        return answers

    async def suspend(self): ...

    async def sync_weights(self, version): ...

    def take_statistics(self):
        return {}

    async def close(self): ...


def build(*, num_games=3, different=1, groups=1, length=7, fail_at=(), **changes):
    settings = make_settings(
        {
            "env": {"action_space_size": 512, "collector_env_num": num_games},
            "world_model": {"embed_dim": 16, "num_heads": 2, "num_unroll_steps": 4, "context_length": 4},
            "search": {"num_simulations": 6},
            "replay": {"segment_length": 3},
            "train": {"td_steps": 2, "batch_size": 8},
            "llm": {"list_commands": True},
        },
        changes,
    )
    import torch

    torch.manual_seed(0)
    timeline = Timeline()
    player = Player(
        settings,
        policy=PriorZeroPolicy(settings, feature_size=FEATURES, device="cpu", llm=None),
        encoder=RoomEncoder(),
        indexer=ActionVocabulary(512),
        prior=RetryingPrior(LastActionEngine(), attempts=1, backoff_s=0, timeout_s=5, timeline=timeline),
        style=prompt_style(settings),
        tokenizer=WhitespaceTokenizer(),
        world_model_thread=OwnerThread("world-model", timeline),
        timeline=timeline,
    )
    games = [CountingGame(g, length=length, fail_at=fail_at if g == 1 else ()) for g in range(num_games)]
    config = unizero_config(settings, feature_size=FEATURES, device="cpu")
    seed = np.random.SeedSequence(0)
    collector = Collector(games, player=player, config=config, seed=seed, groups=groups, num_games=different)
    return collector, games, player


def collect(collector, steps):
    return asyncio.run(collector.collect(steps))


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_every_record_holds_what_belongs_together(groups):
    collector, _, player = build(groups=groups)
    collected = collect(collector, 63)
    records = [r for segment in collected.segments for r in segment.records]
    pending = sum(writer.pending for writer in collector._writers)
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
    """Takes its time over a question, and takes note of how many it has at once."""

    inside = most = 0

    async def priors(self, requests):
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(0.05)
        self.inside -= 1
        return await super().priors(requests)


def test_while_one_group_waits_for_the_llm_the_other_is_searched_for():
    collector, _, player = build(groups=2, num_games=4)
    player.prior.engine = SlowEngine()
    collect(collector, 28)
    shares = player.timeline.finish_interval()
    assert player.prior.engine.most == 2
    # Searches and games run inside the time of the other group's questions, so that the parts add up to more than all.
    assert shares.overlapped > 0.2 * shares.busy["search"] and sum(shares.busy.values()) > shares.wall
    collector, _, player = build(groups=1, num_games=4)
    player.prior.engine = SlowEngine()
    collect(collector, 28)
    shares = player.timeline.finish_interval()
    assert player.prior.engine.most == 1 and shares.overlapped < 0.001 * shares.wall


def test_when_one_group_fails_the_other_stops():
    collector, games, player = build(groups=2, num_games=4)
    player.prior.engine = SlowEngine()

    async def broken(action):
        raise ZeroDivisionError

    games[1].step = broken

    async def run():
        with pytest.raises(ZeroDivisionError):
            await collector.collect(1000)
        before = games[0].steps
        await asyncio.sleep(0.2)
        return games[0].steps - before

    assert asyncio.run(run()) == 0


def test_the_same_seed_plays_the_same_game():
    def played():
        collected = collect(build()[0], 42)
        return [(r.episode, r.action_text, r.visit_counts.tolist()) for s in collected.segments for r in s.records]

    first = played()
    assert first == played() and len({action for _, action, _ in first}) > 10


def test_a_failing_game_costs_its_own_decision_only():
    collector, games, _ = build(fail_at=(5, 6))
    collected = collect(collector, 63)
    records = [r for s in collected.segments for r in s.records]
    assert collector.num_game_failures == 2 and games[1].resets == 5
    # In = stored + lost: game 1 lost two decisions; what it had done before was cut off and kept.
    assert sum(g.steps for g in games) == 63 == collected.env_steps
    pending = sum(writer.pending for writer in collector._writers)
    assert len(records) + pending == 63 - 2
    cut = [s for s in collected.segments if not s.records[-1].done and len(s) == len(s.records)]
    assert any(s.records[-1].step == 3 for s in cut)
    for r in records:
        assert r.reward == 10 * int(r.state.score) + r.chosen


@pytest.mark.parametrize("groups", [1, 2])
def test_a_game_that_cannot_begin_is_given_up_and_the_others_go_on(groups):
    collector, games, _ = build(groups=groups)

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


def test_a_game_that_begins_late_is_not_given_up():
    collector, games, _ = build()
    begin, attempts = games[1].reset, []

    async def late():
        attempts.append(True)
        if len(attempts) < 5:
            raise GameWorkerError("made to fail")
        return await begin()

    games[1].reset = late
    collected = collect(collector, 42)
    assert games[1].steps > 0 and collector.scalars(collected)["collector_iter/games_given_up"] == 0


def test_collection_that_was_cut_short_goes_on(tmp_path):
    """Left off at every third decision, written and read back: the same decisions as in one go."""
    import torch

    from priorzero.world_model.records import RecordTable, read_records

    def decisions(collected):
        return [(r.episode, r.step, r.action_text, r.reward) for s in collected.segments for r in s.records]

    changes = {"different": 2, "search": {"explore_share": 0.5}}
    alone, _, _ = build(**changes)
    whole = collect(alone, 39)
    assert any(lane.detour is not None for lane in alone._lanes if lane is not None)

    async def in_parts():
        collector, _, player = build(**changes)
        collected, parts = None, 0
        while collected is None:
            asked = iter([False] * 3)
            collected = await collector.collect(39, stop=lambda asked=asked: next(asked, True))
            if collected is None:
                parts += 1
                table = RecordTable()
                state = collector.state_dict(table)
                torch.save({**state, "records": table.state_dict()}, tmp_path / "state.pt")
                state = torch.load(tmp_path / "state.pt", weights_only=True)
                numbering = player.indexer.state_dict()
                collector, _, player = build(**changes)
                player.indexer.load_state_dict(numbering)
                await collector.load_state_dict(state, read_records(state.pop("records")))
        return collected, parts, collector

    collected, parts, collector = asyncio.run(in_parts())
    assert parts == 4 and decisions(collected) == decisions(whole)
    assert collected.env_steps == whole.env_steps == collector.env_steps == 39
    memories = [[memory.state_dict() for memory in c.memories] for c in (collector, alone)]
    assert memories[0] == memories[1] and memories[0][0] != memories[0][1]
    assert [lane and lane.detour for lane in collector._lanes] == [lane and lane.detour for lane in alone._lanes]
    assert collected.episodes == whole.episodes and collected.visit_entropies == whole.visit_entropies
    for a, b in zip(whole.segments, collected.segments, strict=True):
        for name in ("obs", "action", "reward", "root_value", "child_visit", "action_mask", "timestep"):
            assert np.array_equal(getattr(a, f"{name}_segment"), getattr(b, f"{name}_segment"))
        assert np.array_equal(a.returns, b.returns)


def test_a_game_that_cannot_be_brought_back_is_cut_and_counted(tmp_path):
    from priorzero.world_model.records import RecordTable, read_records

    async def check():
        collector, _, _ = build()
        await collector.collect(30)
        table = RecordTable()
        state = collector.state_dict(table)
        pending = [len(numbers) for numbers in state["pending"]]
        other, games, _ = build()
        games[2].fail_at = {1}
        games[0].number = 50  # says other things
        await other.load_state_dict(state, read_records(table.state_dict()))
        assert other.num_game_failures == 2 and pending[0] and pending[2]
        stored = sum(len(s.records) for s in other.collected.segments)
        assert stored == pending[0] + pending[2]
        assert [writer.pending for writer in other._writers] == [0, pending[1], 0]
        assert [lane is None for lane in other._lanes] == [True, False, True]

    asyncio.run(check())


def test_the_search_gets_the_prior_in_its_order():
    """With the prior alone at the root and values all alike, the visits go where the prior is."""
    collector, _, _ = build(prior={"combine": "replace"}, search={"num_simulations": 20, "root_noise_weight": 0.0})
    records = [r for s in collect(collector, 42).segments for r in s.records]
    assert all(r.visit_counts.argmax() == len(r.visit_counts) - 1 for r in records)


def test_a_small_temperature_takes_the_most_visited_action():
    collector, _, _ = build(search={"temperature": 1e-4, "num_simulations": 20})
    records = [r for s in collect(collector, 42).segments for r in s.records]
    assert len(records) == 42 and all(r.visit_counts[r.chosen] == r.visit_counts.max() for r in records)


def test_metrics_of_collection():
    collector, _, player = build()
    scalars = collector.scalars(collect(collector, 21))
    assert scalars["collector_iter/env_steps"] == 21
    assert scalars["collector_iter/actions_known"] == player.indexer.num_used
    assert 0 < scalars["collector_iter/visit_entropy_mean"] <= np.log(4)
    assert 0 <= scalars["prior/agreement"] <= 1
    assert scalars["collector_iter/reward_mean"] == pytest.approx(np.mean(collector.recent_returns))


@pytest.mark.parametrize("mode", ["world_model", "world_model_with_prior", "prior"])
def test_evaluation_repeats_itself(mode):
    collector, _, player = build()

    def evaluate():
        games = [CountingGame(g, length=5 + g) for g in range(2)]
        return asyncio.run(Evaluator("counting", games, player=player, episodes=2, seed=0).evaluate(mode))

    engine = player.prior.engine
    known = player.indexer.state_dict()
    first = evaluate()
    assert player.indexer.state_dict() == known  # nor does an evaluation in training
    assert (engine.calls == 0) == (mode == "world_model")
    collect(collector, 9)  # other games in between leave no trace
    again = evaluate()
    assert first.returns == again.returns and len(first.returns) == 2
    if mode == "prior":  # the last valid action, always
        room, total = 1, 0.0
        for _ in range(5):
            k = 1 + room % 3
            total += 10 * room + k
            room = (3 * room + k + 1) % 97
        assert first.returns[0] == total


def test_an_evaluation_that_cannot_finish_says_so():
    _, _, player = build()
    broken = CountingGame(1, fail_at=range(100))
    with pytest.raises(GameWorkerError):
        asyncio.run(Evaluator("counting", [broken], player=player, episodes=2, seed=0).evaluate("prior"))
    once = CountingGame(1, fail_at=(3,))
    assert (
        len(
            asyncio.run(
                Evaluator("counting", [once, CountingGame(2)], player=player, episodes=3, seed=0).evaluate("prior")
            ).returns
        )
        == 3
    )


def commands_played(mode, *, seed, episodes=40):
    """Which of the two commands of the first room each episode began with."""
    _, _, player = build()
    game = CountingGame(0, length=3)
    first = []

    async def step(action, own=game.step):
        if game.moves == 0:
            first.append(int(action.split()[2]))
        return await own(action)

    game.step = step
    asyncio.run(Evaluator("counting", [game], player=player, episodes=episodes, seed=seed).evaluate(mode))
    return first


def test_random_play_knows_no_prior_and_a_sampled_prior_follows_its_probabilities():
    """Room 1 has three actions, and the engine gives the last one 0.9."""
    prior, random_play = commands_played("prior_sampled", seed=0), commands_played("random", seed=0)
    assert prior.count(2) >= 30 and len(set(prior)) > 1
    assert random_play.count(2) <= 22 and set(random_play) == {0, 1, 2}
    assert commands_played("prior_sampled", seed=0) == prior  # the same seed plays the same episodes
    assert commands_played("prior_sampled", seed=1) != prior
    assert set(commands_played("prior", seed=0)) == {2}


def test_a_command_given_before_is_worth_less():
    collector, _, _ = build(num_games=1, length=4, train={"novelty_bonus": 0.5, "loss_penalty": 2.0})
    records, tried = [r for s in collect(collector, 60).segments for r in s.records], {}
    for record in records:  # this game says in which room one is, and knows no win
        command = record.state.score, record.action_text
        tried[command] = tried.get(command, 0) + 1
        assert record.shaping == pytest.approx(0.5 / tried[command] ** 0.5 - (2.0 if record.done else 0.0))
    assert records[0].shaping == 0.5 and max(tried.values()) > 1
    quiet, _, _ = build(num_games=1, length=2)
    assert {r.shaping for s in collect(quiet, 10).segments for r in s.records} == {0.0}


def test_an_answer_heard_before_is_worth_less():
    collector, _, _ = build(num_games=1, train={"novelty_bonus": 0.5, "novelty_of": "answer"})
    before, after = state_of(0, 1, moves=1, length=9), state_of(0, 2, moves=2, length=9)
    other = dataclasses.replace(after, feedback="something else")
    assert [collector._shaping(collector.memories[0], before, f"act 1 {n}", after) for n in range(3)] == pytest.approx(
        [0.5, 0.5 / 2**0.5, 0.5 / 3**0.5]  # other commands, but the game says the same
    )
    assert collector._shaping(collector.memories[0], before, "act 1 0", other) == 0.5
    assert collector.memories[0].tries(before.standing, ("act 1 0", "act 1 1")).tolist() == [2, 1]


@pytest.mark.parametrize(("end", "shaping"), [({"won": True}, 0.0), ({"truncated": True}, 0.5), ({}, -2.0)])
def test_the_last_text_of_a_game_is_no_new_answer(end, shaping):
    collector, _, _ = build(num_games=1, train={"novelty_bonus": 0.5, "novelty_of": "answer", "loss_penalty": 2.0})
    before, after = state_of(0, 1, moves=8, length=9), state_of(0, 2, moves=9, length=9)
    after = dataclasses.replace(after, done=True, **end)
    assert collector._shaping(collector.memories[0], before, "act 1 0", after) == shaping


def test_exploration_knows_how_often_a_command_was_given():
    collector, _, _ = build(num_games=2, search={"return_first": False})
    collect(collector, 20)
    lane, state, prior = collector._lanes[0], state_of(0, 1, moves=0, length=7), None
    root = collector._player._root(lane, state, np.arange(len(state.valid_actions)), prior, explore=True)
    assert root.tries.tolist() == collector.memories[0].tries(state.standing, state.valid_actions).tolist()
    assert root.tries.sum() > 0 and root.noise is not None
    assert collector._player._root(lane, state, np.arange(len(state.valid_actions)), prior, explore=False).tries is None


@pytest.mark.parametrize(("end", "shaping"), [({"won": True}, 0.5), ({"truncated": True}, 0.5), ({}, -1.5)])
def test_only_a_lost_game_is_punished(end, shaping):
    collector, _, _ = build(num_games=1, train={"novelty_bonus": 0.5, "loss_penalty": 2.0})
    before, after = state_of(0, 1, moves=8, length=9), state_of(0, 2, moves=9, length=9)
    (memory,) = collector.memories
    assert collector._shaping(memory, before, "act 1 0", dataclasses.replace(after, **end)) == shaping
    assert collector._shaping(memory, before, "act 1 1", before) == 0.5
    assert collector._shaping(memory, dataclasses.replace(before, score=7.0), "act 1 1", before) == 0.5


def test_an_episode_tells_when_it_ended():
    collector, _, _ = build(num_games=2, length=3)
    first, second = collect(collector, 6).episodes
    assert (first.env_step, second.env_step, first.steps) == (5, 6, 3)
    assert first.score > 0 and first.total_reward > 0 and not first.won
