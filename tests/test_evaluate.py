"""``python -m priorzero.evaluate``: the run's own results, intervals, the protocol of TALES, and wrong input."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from priorzero.evaluate import main
from priorzero.play.evaluator import Evaluation
from priorzero.preflight import prepare_agent
from priorzero.runs.evaluation_table import mean_interval, result_lines, result_table
from priorzero.saved_agent import evaluate_agent
from priorzero.types import GameWorkerError, UserError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.runs import NO_LLM, lines, restored_threads, short_settings, train
from tests.helpers.toy_game import toy_games


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """The folder of a run without an LLM on two toy games and an unseen one."""
    layer = {
        "run": {"env_id": "toy,coins", "max_iter": 2},
        "eval": {"modes": ["world_model", "random"], "episodes": 4, "unseen": "other"},
    }
    with toy_games():
        return train(short_settings(tmp_path_factory.mktemp("runs"), NO_LLM, layer)).folder


def run_command(capsys, *arguments):
    """The lines that the command prints, and the table."""
    with toy_games():
        assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_evaluate_reports_what_the_run_reported_at_its_last_step(trained_run, capsys):
    found, table = run_command(capsys, trained_run)
    reported = lines(trained_run, "evaluations.jsonl")
    last = [line for line in reported if line["env_step"] == reported[-1]["env_step"]]
    assert [{key: line[key] for key in last[0]} for line in found] == last and len(last) == 6
    for line in found:
        assert line["mean_score"] == np.mean(line["scores"]) and line["best_score"] == max(line["scores"])
        assert line["checkpoint"].endswith("iteration_2") and line["iteration"] == 2
        assert f"{line['mean_score']:.2f}" in table
    assert "other (not trained on)" in table and "mean of 3 games" in table


def test_evaluate_is_deterministic_for_a_seed(trained_run, capsys, tmp_path):
    arguments = [trained_run, "--games", "coins", "--modes", "world_model_sampled,random", "--episodes", "6", "--seed"]
    first, _ = run_command(capsys, *arguments, "1")
    again, table = run_command(capsys, *arguments, "1", "--out", tmp_path / "results.jsonl")
    assert again == [] and "random actions" in table
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == first
    other, _ = run_command(capsys, *arguments, "2")
    assert [line["returns"] for line in other] != [line["returns"] for line in first]
    assert {line["seed"] for line in first} == {1} and all(len(line["scores"]) == 6 for line in first)
    sampled = next(line for line in first if line["mode"] == "world_model_sampled")
    assert len(set(sampled["returns"])) > 1, "actions are not sampled"


def test_evaluate_by_the_protocol_of_tales(trained_run, capsys):
    """Random play loses or wins the toy game long before 100 steps, and the game begins again."""
    found, table = run_command(
        capsys, trained_run, "--games", "toy", "--modes", "random", "--episodes", "5", "--protocol", "tales"
    )
    (line,) = found
    assert line["step_limit"] == 100 and line["valid_actions_given"] is True
    assert line["mean_score"] == np.mean(line["best_scores"])
    assert line["normalised_score"] == pytest.approx(line["mean_score"] / 5)
    (standard,), _ = run_command(capsys, trained_run, "--games", "toy", "--modes", "random", "--episodes", "5")
    assert line["mean_score"] > standard["mean_score"]
    assert "TALES" in table and "valid actions" in table


def removed_once(monkeypatch, folder):
    """The first call of ``prepare_agent`` finds a checkpoint that is removed afterwards."""

    def prepare(*arguments, **options):
        prepared = prepare_agent(*arguments, **options)
        shutil.rmtree(folder, ignore_errors=True)
        return prepared

    monkeypatch.setattr("priorzero.preflight.prepare_agent", prepare)


def test_evaluate_takes_another_checkpoint_if_the_run_has_removed_its_own(trained_run, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(trained_run, tmp_path / "run")
    newest = shutil.copytree(run / "checkpoints" / "iteration_2", run / "checkpoints" / "iteration_3")
    removed_once(monkeypatch, newest)
    [line], _ = run_command(capsys, run, "--games", "toy", "--modes", "random")
    assert line["checkpoint"].endswith("iteration_2") and not newest.exists()


def test_evaluate_agent_reports_a_checkpoint_that_is_removed_while_it_is_loaded(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    with toy_games(), restored_threads():
        prepared = prepare_agent(run, games="toy", modes=["random"])
        shutil.rmtree(prepared.checkpoint.folder)
        with pytest.raises(UserError, match=r"iteration_2: this checkpoint was removed while .*type the command again"):
            asyncio.run(evaluate_agent(prepared))


def test_evaluate_reports_a_game_that_fails_without_advice_about_time(trained_run, capsys, monkeypatch):
    async def fail(*_):
        raise GameWorkerError("it crashed")

    monkeypatch.setattr("tests.helpers.toy_game.InProcessWorker.step", fail)
    with toy_games():
        assert main([str(trained_run), "--games", "toy", "--modes", "random"]) == 2
    error = capsys.readouterr().err
    assert "1 of 1 evaluations failed" in error and "step_timeout_s" not in error and error.count("Traceback") == 0


# ---- intervals and the table ----


def percentiles_of_all_resamples(samples):
    """The exact percentile interval: every resample of every game, each equally probable."""
    means = [[np.mean(chosen) for chosen in itertools.product(values, repeat=len(values))] for values in samples]
    return np.percentile([np.mean(combination) for combination in itertools.product(*means)], [2.5, 97.5])


@pytest.mark.parametrize("samples", [[[1.0, 2.0, 5.0, 6.0]], [[1.0, 2.0, 5.0], [30.0, 30.0, 42.0]]])
def test_mean_interval_resamples_each_game_separately(samples):
    expected = percentiles_of_all_resamples(samples)
    assert mean_interval(samples, seed=0) == pytest.approx(expected, abs=0.3)
    assert mean_interval(samples, seed=0) == mean_interval(samples, seed=0)


def test_mean_interval_needs_two_episodes():
    assert mean_interval([[1.0]], seed=0) is None and mean_interval([], seed=0) is None
    assert mean_interval([[2.0, 2.0]], seed=0) == (2.0, 2.0)


def test_result_table_normalises_scores_only_if_all_maxima_are_known():
    def rows(maximum):
        of_games = {
            "a": Evaluation("random", [5.0, 5.0], [5.0, 5.0], 0, 10.0, [6.0, 7.0]),
            "b": Evaluation("random", [1.0, 3.0], [1.0, 3.0], 2, maximum, [4.0, 4.0]),
        }
        found = result_lines({("random", False): of_games}, about={}, protocol="standard", seed=0)
        table = result_table(found, protocol="standard", seed=0)
        return list(zip(*(list(column.cells) for column in table.columns), strict=True))

    assert [row[2] for row in rows(4.0)] == ["5.00", "2.00", "50.0%"]
    assert [row[2] for row in rows(0.0)] == ["5.00", "2.00", "3.50"]
    assert [row[4] for row in rows(4.0)] == ["5", "3", "75.0%"] and rows(4.0)[2][6] == "2 of 4"


def test_result_table_shows_names_with_brackets_and_equal_scores_of_a_game():
    of_games = {
        "a[red]b": Evaluation("random", [1.0, 1.0], [1.0, 1.0], 0, 0.0, [1.0, 1.0]),
        "b": Evaluation("random", [9.0, 9.0], [9.0, 9.0], 0, 0.0, [9.0, 9.0]),
    }
    found = result_lines({("random", False): of_games}, about={}, protocol="standard", seed=0)
    console = Console(file=io.StringIO(), width=140)
    console.print(result_table(found, protocol="standard", seed=0))
    text = console.file.getvalue()
    assert "a[red]b" in text and text.count("no variation") == 3 and "mean of 2 games" in text


# ---- wrong input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes", "0"], "--episodes 0: give a whole number of at least 1"),
        (["--seed", "-1"], "--seed -1: give a whole number between 0 and"),
        (["--modes", "world_model,best"], "'best' is not a mode; give one or more of world_model,"),
        (["--modes", ""], "--modes is empty; give one or more of world_model,"),
        (["--games", "textworld:file="], "textworld:file= names no game; type textworld:file=PATH"),
        (["--modes", "random,random"], "names a mode twice"),
        (
            ["--modes", "prior"],
            "the mode prior needs an LLM, but .* the modes without an LLM are world_model, world_model_sampled, random",
        ),
        (["--games", ""], "--games is empty; name a game"),
        (["--games", "zork9.z5"], "There is no story file 'zork9.z5'"),
        (["--games", "textworld:nothing"], "Unknown TextWorld challenge 'nothing'"),
        (["--out", "missing/results.jsonl"], "--out missing/results.jsonl: there is no folder missing; create it"),
        (["--out", "."], "--out .: this is not a file"),
        (
            ["--set", "world_model.num_layers=9"],
            "world_model.num_layers=9: the architecture of a trained agent cannot change; world_model.num_layers is 2",
        ),
        (["--set", "env.action_space_size=7"], "env.action_space_size=7: the architecture of a trained agent cannot"),
        (["--set", "encoder.path=package:other"], "encoder.path=package:other: the architecture"),
        (["--set", "search.simulations=3"], "unknown setting 'search.simulations'"),
        (["--set", "run.env_id=zork1.z5"], "name the games with --games"),
        (["--set", "eval.modes=random"], "--set eval.modes has no effect here; name the modes with --modes A,B"),
        (["--modes", "random", "--set", "eval.modes=random"], "name the modes with --modes A,B"),
        (["--episodes", "3", "--set", "eval.episodes=4"], "contradict each other; leave one out"),
        (["--protocol", "tales", "--set", "env.max_episode_steps=50"], "contradict each other; leave one out"),
    ],
)
def test_evaluate_reports_wrong_input(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    config = "run: {env_id: 'textworld:simple?seed=7'}\nprior: {enabled: false}\neval: {modes: [world_model]}\n"
    write_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_1", config=config)
    assert main(["run", *arguments]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err) and captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nothing", "evaluate nothing: there is no such folder; name a run's folder, a folder RUN/checkpoints/"),
        (".", "this is not a run's folder, but it contains 1 of them; name one, such as"),
        ("run", "none of its 1 checkpoints can be used .*world_model.pt has a wrong checksum"),
        ("run/checkpoints/iteration_1", "world_model.pt has a wrong checksum; name a run's folder"),
    ],
)
def test_evaluate_reports_missing_and_damaged_checkpoints(tmp_path, capsys, monkeypatch, where, message):
    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_1")
    (folder / "world_model.pt").write_text("damaged")
    assert main([where]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_evaluate_checks_its_input_without_torch(tmp_path):
    config = "run: {env_id: 'textworld:simple?seed=7'}\nprior: {enabled: false}\neval: {modes: [world_model]}\n"
    write_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_1", config=config)
    code = (
        "import sys; from priorzero.evaluate import main\n"
        f"codes = [main([{str(tmp_path / 'run')!r}, *more]) for more in (['--modes', 'prior'], ['--games', 'x.z5'])]\n"
        "print(codes, {'torch', 'lzero'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "[2, 2] set()\n"
