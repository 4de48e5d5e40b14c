"""Watching a trained agent: the command line, the episodes that it plays, the terminal, and recordings."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from priorzero.play.transcript import read_transcripts, write_transcripts
from priorzero.play.watching import Viewer, play_episode
from priorzero.runs.checkpoint import save_checkpoint
from priorzero.runs.pages.terminal import actions_table, best_first, printable, read_choice, show_episode
from priorzero.types import GameWorkerError
from priorzero.watch import main
from tests.helpers.collecting import CountingGame, evaluate, make_player
from tests.helpers.reports import make_episode, make_step
from tests.helpers.runs import NO_LLM, lines, restored_threads, short_settings, train
from tests.helpers.toy_game import toy_games


def watch(*arguments):
    """The exit code of the command, which plays toy games. The number of torch's threads is restored."""
    with toy_games(), restored_threads():
        return main([str(argument) for argument in arguments])


def data_of(page):
    """The episode in a page."""
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    [episode] = json.loads(text)["episodes"]
    return episode


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run without an LLM that recorded every second training episode."""
    with toy_games():
        settings = short_settings(tmp_path_factory.mktemp("runs"), NO_LLM, {"run": {"record_every": 2}})
        return train(settings).folder


def env_step_of(run_folder, iteration=6):
    manifest = json.loads((run_folder / "checkpoints" / f"iteration_{iteration}" / "manifest.json").read_text())
    return manifest["counters"]["env_step"]


# ---- a trained agent ----


def test_watch_writes_a_page_with_the_episode_of_the_last_evaluation(run_folder, tmp_path, capsys):
    assert watch(run_folder, "--out", tmp_path / "new" / "pages") == 0
    [page] = (tmp_path / "new" / "pages").iterdir()
    assert (
        capsys.readouterr().out == f"{page}\n"
        and page.name == f"toy_world_model_step{env_step_of(run_folder)}_seed0_1.html"
    )
    watched = data_of(page)
    env_step, [evaluated] = read_transcripts(run_folder / "last_evaluation.json")
    assert (watched["mode"], watched["game"], watched["unseen"], watched["episode"]) == ("world_model", "toy", False, 1)
    assert watched["env_step"] == env_step and watched["steps"][0]["tree"]
    for step in watched["steps"]:
        step["tree"] = step["predicted_reward"] = None
    assert all(watched[key] == value for key, value in evaluated.items())


def test_watch_plays_other_games_modes_and_seeds(run_folder, tmp_path, capsys):
    arguments = ("--games", "other", "--mode", "random", "--episodes", 3, "--set", "env.max_episode_steps=5")
    checkpoint = run_folder / "checkpoints" / "iteration_3"
    found = []
    for seed in (3, 4, 3):
        assert watch(checkpoint, "--out", tmp_path, "--seed", seed, *arguments) == 0
        name = f"other_random_step{env_step_of(run_folder, 3)}_seed{seed}"
        found.append([data_of(tmp_path / f"{name}_{n}.html") for n in (1, 2, 3)])
    assert found[0] == found[2] != found[1]
    chosen = {tuple(step["chosen"] for step in episode["steps"]) for episode in found[0]}
    assert len(chosen) == 3 and all(e["unseen"] and len(e["steps"]) <= 5 for e in found[0])
    assert found[0][0]["steps"][0]["visit_counts"] is None


def test_watch_writes_a_page_for_each_checkpoint_seed_and_game(run_folder, tmp_path):
    for iteration, *more in ((3,), (6,), (6, "--seed", 1), (6, "--games", "toy,other")):
        checkpoint = run_folder / "checkpoints" / f"iteration_{iteration}"
        assert watch(checkpoint, "--mode", "random", "--out", tmp_path, *more) == 0
    early, late = (env_step_of(run_folder, iteration) for iteration in (3, 6))
    assert {path.name for path in tmp_path.iterdir()} == {
        f"toy_random_step{early}_seed0_1.html",
        f"toy_random_step{late}_seed0_1.html",
        f"toy_random_step{late}_seed1_1.html",
        f"other_random_step{late}_seed0_1.html",
    }


def test_watch_plays_without_the_llm_if_it_is_disabled(run_folder, tmp_path):
    """The run's own evaluations need the LLM, which is not there."""

    def write(folder):
        shutil.copytree(run_folder / "checkpoints" / "iteration_6", folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["prior"]["enabled"], config["eval"]["modes"] = True, ["prior"]
        config["llm"]["path"] = "/nowhere"
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

    checkpoint = save_checkpoint(tmp_path / "copy", write=write, about={"counters": {}, "games": {}})
    for number, arguments in enumerate((["--set", "prior.enabled=false"], ["--mode", "random"]), 1):
        assert watch(checkpoint, "--out", tmp_path / "pages", *arguments) == 0
        assert len(list((tmp_path / "pages").iterdir())) == number


def test_watch_writes_into_the_runs_folder(run_folder, capsys):
    assert watch(run_folder / "checkpoints" / "iteration_3", "--mode", "random") == 0
    page = run_folder / "watch" / f"toy_random_step{env_step_of(run_folder, 3)}_seed0_1.html"
    assert capsys.readouterr().out == f"{page}\n" and page.is_file()


def test_watch_in_the_terminal(run_folder, capsys):
    assert watch(run_folder, "--text") == 0
    shown = capsys.readouterr().out
    _, [evaluated] = read_transcripts(run_folder / "last_evaluation.json")
    assert "toy: episode 1 of 1" in shown and shown.count("step ") == len(evaluated["steps"])
    for step in evaluated["steps"]:
        assert f"➤ {step['valid_actions'][step['chosen']]}" in shown
    assert f"score {evaluated['score']:g} of 5" in shown and ".html" not in shown


def test_watch_lets_a_person_play(run_folder, tmp_path, capsys, monkeypatch):
    commands = ["nonsense", "GO  east", "", "1", *["wait"] * 20]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(commands)))
    assert watch(run_folder, "--human", "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "'nonsense' is not in the list; type a number or a text from it" in shown
    assert "end): nonsense\n" in shown and "end): GO  east\n" in shown
    played = data_of(tmp_path / f"toy_human_step{env_step_of(run_folder)}_seed0_1.html")
    names = [step["valid_actions"][step["chosen"]] for step in played["steps"]]
    assert len(names) == 8 and names[0] == "go east" and names[3:] == ["wait"] * 5
    best = [max(range(len(s["visit_counts"])), key=s["visit_counts"].__getitem__) for s in played["steps"]]
    assert played["steps"][1]["chosen"] == best[1] and played["steps"][2]["chosen"] == best[2]
    assert played["steps"][3]["behaviour_prob"] == 1.0 and played["mode"] == "human"


def test_watch_ends_an_episode_that_a_person_leaves(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("wait\n"))
    assert watch(run_folder, "--human", "--episodes", 2, "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("The input has ended before the episode, which is not written.\n")
    assert shown.count("step ") == 2 and "episode 2 of 2" not in shown and list(tmp_path.iterdir()) == []


def play(mode, *, viewer=None, game=None, player=None):
    player = player or make_player()
    game = game or CountingGame(0, length=5)
    rng = np.random.default_rng(0)
    return asyncio.run(play_episode(game, player, game="counting", mode=mode, rng=rng, viewer=viewer or Viewer()))


@pytest.mark.parametrize("mode", ["world_model_with_prior", "world_model", "prior"])
def test_play_episode_plays_as_an_evaluation(mode):
    player = make_player()
    before = player.indexer.state_dict()
    expected = evaluate(player, mode, games=[CountingGame(0, length=5)], episodes=1).first_episode
    played = play(mode, player=player)
    assert player.indexer.state_dict() == before
    has_trees = [step.pop("tree") is not None for step in played["steps"]]
    assert has_trees == [mode != "prior"] * 5
    for step in (*played["steps"], *expected["steps"]):
        step.pop("tree", None)
        step.pop("predicted_reward")
    assert played == expected


def test_play_episode_takes_the_actions_of_its_viewer():
    class Other(Viewer):
        def __init__(self):
            self.wanted, self.taken = [], []

        async def choose(self, step):
            assert step["reward"] is None and sum(step["visit_counts"]) == 6
            self.wanted.append((step["chosen"] + 1) % len(step["valid_actions"]))  # not the agent's
            return self.wanted[-1] if len(self.wanted) < 4 else None

        def show(self, step):
            assert step["reward"] is not None
            self.taken.append(step["chosen"])

    viewer = Other()
    assert play("world_model", viewer=viewer) is None
    assert viewer.taken == viewer.wanted[:3] and len(viewer.wanted) == 4


def test_play_episode_raises_if_the_game_fails():
    with pytest.raises(GameWorkerError):
        play("random", game=CountingGame(1, fail_at=(2,)))


# ---- files ----


def test_watch_opens_recorded_training_episodes(run_folder, capsys):
    recordings = sorted((run_folder / "recordings").glob("*.json"))
    of_run = lines(run_folder, "episodes.jsonl")
    numbers = [int(path.stem.split("episode")[1]) for path in recordings]
    # Episodes are numbered when they begin, so the last recorded one may not have ended.
    assert sorted(numbers) == list(range(1, 2 * len(numbers), 2)) and len(numbers) >= max(3, len(of_run) // 2 - 1)
    for path, number in zip(recordings, numbers, strict=True):
        env_step, [recorded] = read_transcripts(path)
        assert path.name == f"step{env_step:07d}_episode{number:06d}.json" and recorded["episode"] == number
        [line] = [e for e in of_run if e["env_step"] == env_step and e["total_reward"] == recorded["total_reward"]][:1]
        assert line["steps"] == len(recorded["steps"]) and recorded["mode"] == "training"
        assert watch(path) == 0
        page = path.with_suffix(".html")
        assert capsys.readouterr().out == f"{page}\n"
        shown = data_of(page)
        assert {key: shown[key] for key in recorded} == recorded


def test_watch_opens_the_last_evaluation(tmp_path, capsys):
    path = tmp_path / "last_evaluation.json"
    write_transcripts(path, [make_episode("prior"), make_episode("random")], env_step=7)
    assert watch(path) == 0
    pages = capsys.readouterr().out.split()
    assert pages == [f"{tmp_path}/watch/toy_prior_step7_1.html", f"{tmp_path}/watch/toy_random_step7_2.html"]
    assert [data_of(Path(page))["env_step"] for page in pages] == [7, 7]
    assert watch(path, "--text") == 0
    assert capsys.readouterr().out.count("THE END") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN", "--mode", "prior"], "the mode prior needs an LLM, but the agent of"),
        (["RUN", "--episodes", "0"], "--episodes 0: give a whole number of at least 1"),
        (["RUN", "--set", "eval.modes=random"], "--set eval.modes has no effect here; name the mode with --mode"),
        (["RUN", "--seed", "-1"], "run.seed=-1"),
        (["RUN", "--text", "--human"], "--text and --human cannot be combined"),
        (["RUN", "--games", ""], "--games is empty; name a game"),
        (["RUN/recordings"], "name a file in it, such as "),
        (["RUN/checkpoints/iteration_6/config.yaml"], "is not a recorded episode, since it is not JSON"),
        (["RUN", "--games", "zork9.z5", "--out", "FILE"], "is not a writable folder"),
        (["RUN", "--out", "FILE"], "is not a writable folder"),
        (["RUN", "--out", ""], "--out is empty"),
        (["RUN", "--set", "search.nothing=1"], "search.nothing"),
        (["nowhere"], "there is no such folder"),
        (["RUN/.."], "contains 1 of them; name one"),
        (["FILE"], "cannot be read"),
        (["FILE", "--seed", "0"], "--seed: FILE is a file, whose episodes were played before"),
        (["FILE", "--human"], "--human: FILE is a file"),
        (["EMPTY"], "contains no episodes"),
    ],
)
def test_watch_reports_wrong_input_and_writes_nothing(run_folder, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("{}")
    write_transcripts(tmp_path / "EMPTY", [], env_step=1)
    before = sorted([*tmp_path.rglob("*"), *run_folder.rglob("*")])
    assert watch(*(argument.replace("RUN", str(run_folder)) for argument in arguments)) == 2
    out, error = capsys.readouterr()
    assert out == "" and words in error and error.count("error:") == 1 and "Traceback" not in error
    assert sorted([*tmp_path.rglob("*"), *run_folder.rglob("*")]) == before


def test_watch_reports_a_game_that_fails(run_folder, tmp_path, capsys, monkeypatch):
    async def fail(*_):
        raise GameWorkerError("it crashed")

    monkeypatch.setattr("tests.helpers.toy_game.InProcessWorker.step", fail)
    assert watch(run_folder, "--out", tmp_path) == 2
    assert "error: the game failed: it crashed\n" in capsys.readouterr().err


# ---- the terminal ----


def rendered(table):
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()


def test_actions_table_lists_the_best_actions_first_with_bars():
    text = rendered(actions_table(make_step(0), numbered=True))
    rows = [row.split() for row in text.splitlines()]
    assert rows == [
        ["#", "action", "LLM", "prior", "policy", "visits", "Q"],
        ["1", "➤", "take", "0", "50%", "████", "25%", "██", "7", "██████", "1.5", "████████"],
        ["2", "wait", "0", "38%", "███", "50%", "████", "2", "██", "-"],
        ["3", "go", "0", "12%", "█", "25%", "██", "1", "█", "0.1", "█"],
    ]
    assert "and 2 more" in rendered(actions_table(make_step(0), limit=1))


def test_actions_table_shows_small_q_values_with_significant_digits():
    step = make_step(0)
    step["action_values"] = [-0.00123, 0.0004, -0.0]
    rows = [row.split() for row in rendered(actions_table(step)).splitlines()]
    found = {row[row.index("0") - 1]: row[-2:] for row in rows[1:]}
    assert found == {"take": ["4e-4", "█"], "wait": ["0", "█"], "go": ["█", "-1e-3"]}


def test_show_episode_shows_values_and_rewards_in_the_same_units():
    episode = make_episode(steps=2)
    episode["reward_scale"] = 3.0
    episode["discount_factor"] = 0.5
    console = Console(file=io.StringIO(), width=200)
    show_episode(console, episode)
    text = console.file.getvalue()
    assert "All values and rewards are points times 3 (train.reward_scale)." in text
    assert "real value 4.5; reward 3\n" in re.sub(" +\n", "\n", text)


def test_read_choice_takes_a_number_a_text_or_the_agents_action():
    step = make_step(5)  # go 5, take 5, wait 5; the table lists 1, 2, 0
    assert best_first(step) == [1, 2, 0]
    assert [read_choice(step, answer) for answer in ("", "1\n", " 3 ", "Wait  5\n")] == [1, 1, 0, 2]
    assert [read_choice(step, answer) for answer in ("0", "4", "wait", "9" * 5000, "²")] == [None] * 5


def test_terminal_output_has_no_control_characters_of_the_game():
    assert (
        printable("a\x1b[2Jb\rc\nd\x07é")
        == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}c\nd\N{REPLACEMENT CHARACTER}é"
    )
    hostile = "\x1b[31m[bold]x[/bold]\x9b"
    episode = make_episode(text=hostile, game=hostile, tree=True)
    episode["steps"][0]["valid_actions"][1] = hostile
    episode["final_obs_text"] = hostile
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    show_episode(console, episode)
    text = console.file.getvalue()
    assert "\x1b" not in text and "\x9b" not in text and text.count("[bold]x[/bold]") == 6
