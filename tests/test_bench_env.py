"""The benchmark of valid actions: its play, its figures, and that it notices missing actions."""

from __future__ import annotations

import itertools
import json
from argparse import Namespace
from types import SimpleNamespace

import bench_env
import bench_tools
import numpy as np
import pytest
from bench_env import Effect, GameFigures, Overlap, PlayFigures, Search

from tests.helpers.game_files import story

SMALL = ["--steps", "5", "--exact-states", "4", "--jericho-states", "2", "--gold-states", "4", "--threads", "1"]


class FakeGame:
    """A game whose states are numbers. It ends after ``length`` commands."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.episodes: list[list[str]] = []

    def reset(self):
        self.episodes.append([])
        return self._observe()

    def step(self, action):
        assert action in ("jump", "sing")
        return self.step_unchecked(action)

    def step_unchecked(self, command):
        self.episodes[-1].append(command)
        return self._observe(), 0.0

    def _observe(self):
        moves = len(self.episodes[-1])
        self.last_search = Search(moves, ("jump", "sing"), 0.5)
        return SimpleNamespace(moves=moves, valid_actions=("jump", "sing"), done=moves == self._length)


def play(game, *, steps, walkthrough=(), seed=0):
    return list(bench_env.play(game, steps=steps, rng=np.random.default_rng(seed), walkthrough=walkthrough))


def test_play_at_random_has_episodes_of_at_most_100_steps():
    game = FakeGame(length=1000)
    searches = play(game, steps=250)
    assert [search.state for search in searches] == [*range(100), *range(100), *range(50)]
    assert [len(episode) for episode in game.episodes] == [100, 100, 50]
    commands = list(itertools.chain(*game.episodes))
    assert 100 < commands.count("jump") < 150
    again, other = FakeGame(length=1000), FakeGame(length=1000)
    play(again, steps=250)
    play(other, steps=250, seed=1)
    assert again.episodes == game.episodes != other.episodes


def test_play_guided_takes_the_commands_of_the_walkthrough_and_sometimes_others():
    walkthrough = [f"go {number}" for number in range(150)]
    game = FakeGame(length=1000)
    assert len(play(game, steps=1000, walkthrough=walkthrough)) == 1000
    for episode in game.episodes[:-1]:
        assert [command for command in episode if command not in ("jump", "sing")] == walkthrough
        assert episode[-1] == walkthrough[-1]
    commands = list(itertools.chain(*game.episodes))
    assert 60 < commands.count("jump") + commands.count("sing") < 140
    game = FakeGame(length=40)  # the game ends first
    play(game, steps=100, walkthrough=walkthrough)
    assert [len(episode) for episode in game.episodes] == [40, 40, 20]
    assert {episode[-1] for episode in game.episodes[:2]} & set(walkthrough)


def test_play_figures_scale_the_exact_search_by_the_share_of_new_states():
    """Hand-counted: 3 of 4 states are new, and an exact search takes 2 s on average."""
    play = PlayFigures([1, 2, 3, 4], {"a", "b"}, new_states=3, fast_s=2.0, exact_s=[1.0, 3.0], jericho_s=[4.0])
    assert (play.fast_per_step, play.exact_per_step) == (0.5, 1.5)
    other = PlayFigures([6, 6], {"b", "c"}, new_states=1, fast_s=1.0, exact_s=[5.0], jericho_s=[6.0])
    game = GameFigures(1, {"random": play, "guided": other})
    assert game.times() == {
        "Jericho's own": 5.0, "exact": 2.0, "fast": 0.5, "ratio, random": 3.0, "ratio, guided": 5.0, "ratio": 4.0,
    }  # fmt: skip
    sizes = {"mean K": 22 / 6, "max K": 6, "action texts": 3, "new, random": 0.75, "new, guided": 0.5}
    assert game.sizes() == pytest.approx(sizes)
    means = bench_env.geometric_means([{"fast": 1.0, "exact": 2.0}, {"fast": 4.0, "exact": 8.0}])
    assert means == pytest.approx({"fast": 2.0, "exact": 4.0})


class FakeReferences:
    """The exact set of a state ``n`` is ``get`` and ``drop``; ``take`` is another name of ``get``."""

    def __init__(self) -> None:
        self.searched: list[int] = []
        self.timed: list[int] = []

    def exact(self, state):
        self.searched.append(state.number)
        return Search(state, ("drop", "get"), 2.0)

    def jericho_s(self, state):
        self.timed.append(state.number)
        return 3.0

    def effects(self, state, commands):
        return [Effect({"take": "get"}.get(command, command).encode(), 0) for command in commands]


def fake_search(number: int, *actions: str) -> Search:
    return Search(SimpleNamespace(number=number, digest=lambda: bytes([number])), actions, 0.5)


def measure(searches, **options):
    figures, references = GameFigures(1), FakeReferences()
    options = Namespace(**{"steps": len(searches), "exact_states": 20, "jericho_states": 4, **options})
    bench_env.measure_play("random", searches, figures=figures, references=references, options=options)
    return figures, references


def test_measure_play_samples_new_states_evenly():
    figures, references = measure([fake_search(number, "get", "drop") for number in range(100)])
    assert references.searched == [0, *range(10, 100, 10)]  # half of the states, since there are two kinds of play
    assert references.timed == [0, 50]
    times = figures.plays["random"]
    assert (times.new_states, times.fast_s, times.exact_s, times.jericho_s) == (100, 50.0, [2.0] * 10, [3.0] * 2)
    figures, references = measure([fake_search(number // 4 * 4, "get", "drop") for number in range(100)])
    assert references.searched == [0, 12, 20, 32, 40, 52, 60, 72, 80, 92]
    assert figures.plays["random"].new_share == 0.25


def test_measure_play_compares_by_text_and_by_effect():
    """Hand-counted: the same set, another name, a missing action, and one that is not valid."""
    sets = [("get", "drop"), ("take", "drop"), ("drop",), ("get", "drop", "fly")]
    figures, _ = measure([fake_search(number, *actions) for number, actions in enumerate(sets)], exact_states=8)
    assert figures.by_text == Overlap(fast=8, exact=8, common=2 + 1 + 1 + 2)
    assert figures.by_effect == Overlap(fast=8, exact=8, common=2 + 2 + 1 + 2)
    assert figures.equal == 1
    total = bench_env.accuracy([figures, figures])
    assert (total["states"], total["recall, effect"], total["precision, effect"]) == (8, 7 / 8, 7 / 8)
    assert (Overlap().recall, Overlap().precision) == (1.0, 1.0)  # no state has an action


@pytest.fixture
def results(monkeypatch, tmp_path):
    for module in (bench_env, bench_tools):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def test_bench_env_returns_2_if_no_game_is_found(capsys):
    assert bench_env.main(["--games", "nowhere.z5"]) == 2
    message = capsys.readouterr().err
    assert "nowhere.z5 is skipped. There is no story file" in message and "bench_env: no game was found" in message


@pytest.mark.slow
def test_bench_env_compares_a_game(results, capsys):
    assert bench_env.main(["--games", f"{story('zork1.z5')},nowhere.z5", *SMALL]) == 0
    output = capsys.readouterr()
    assert "nowhere.z5 is skipped" in output.err and "geometric mean" in output.out
    found = json.loads((results / "env.json").read_text())
    assert found["options"]["steps"] == 5
    (game,) = found["games"].values()
    assert json.loads((results / "env_games" / "zork1.json").read_text()) == game
    assert (game["states"], game["equal"], game["recall, text"], game["precision, effect"]) == (4, 4, 1.0, 1.0)
    assert (game["gold states"], game["gold found"], game["gold lost"]) == (4, 4, 0)
    assert min(game["fast"], game["exact"], game["Jericho's own"]) > 0 and game["threads"] == 1
    assert 1 <= game["mean K"] <= game["max K"] <= game["action texts"]
    plays = game["plays"].values()
    assert np.mean([play["fast"] for play in plays]) == game["fast"]
    assert [len(play["exact, sampled"]) for play in plays] == [2, 2]


@pytest.mark.slow
def test_bench_env_returns_1_if_a_gold_command_is_lost(results, monkeypatch, capsys):
    open_game = bench_env.open_game

    def open_faulty(path, *, mode, **arguments):  # the fast search never finds the way north
        game = open_game(path, mode=mode, **arguments)
        find = game._valid_actions

        def find_too_few(state):
            actions = tuple(action for action in find(state) if action != "north")
            game.last_search = game.last_search._replace(actions=actions)
            return actions

        if mode == "fast":
            game._valid_actions = find_too_few
        return game

    monkeypatch.setattr(bench_env, "open_game", open_faulty)
    assert bench_env.main(["--games", str(story("zork1.z5")), *SMALL]) == 1
    assert "zork1: lost gold commands: 1: N, 2: N" in capsys.readouterr().out
    game = json.loads((results / "env.json").read_text())["games"]["zork1"]
    assert game["gold found"] == 2 and game["gold lost"] == 2
    assert game["recall, effect"] == game["recall, text"] < 1 == game["precision, effect"]


def test_references_exact_searches_a_state_again():
    references = bench_env.References(story("zork1.z5"), threads=1)
    game = bench_env.open_game(story("zork1.z5"), mode="exact", cache="off", threads=1)
    game.reset()
    searches = [references.exact(game.last_search.state) for _ in range(3)]
    assert {search.actions for search in searches} == {game.last_search.actions}
    game._valid_actions(game.last_search.state)  # from memory
    assert min(search.seconds for search in searches) > 5 * game.last_search.seconds
    references.close()
    game.close()


def test_references_effects_are_the_same_for_two_names_of_a_command():
    references = bench_env.References(story("zork1.z5"), threads=1)
    game = bench_env.open_game(story("zork1.z5"), mode="exact", cache="off", threads=1)
    game.reset()
    state, actions = game.last_search.state, game.last_search.actions
    assert len(set(references.effects(state, actions))) == len(actions) > 2
    north, n, opened, nothing = references.effects(state, ("north", "n", "open mailbox", "fly"))
    assert north == n != opened
    assert nothing == Effect(bytes(256), 0) not in (north, opened)
    references.close()
    game.close()
