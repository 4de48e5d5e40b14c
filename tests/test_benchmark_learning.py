"""scripts/benchmark_learning.py: its runs and its results; scripts/plot_learning.py: tables and curves."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import sys
from pathlib import Path

import benchmark_learning as bench
import compare_learning as compare
import plot_learning as plot
import pytest

from priorzero.config import dump_settings, parse_assignments, read_config_file, resolve_settings

GAME = "textworld:simple?seed=201"
LOG_TAIL = "something broke"


def episode(env_step, score, *, won=False, wall_s=0.0):
    return {"total_reward": score, "score": score, "steps": 5, "won": won, "env_step": env_step, "wall_s": wall_s}


def evaluation(mode, scores, *, wins=0, env_step=0, unseen=False):
    figures = {"mode": mode, "returns": scores, "scores": scores, "wins": wins, "max_score": 4.0, "wall_s": 1.0}
    return {"env_step": env_step, "game": "g", "unseen": unseen, **figures}


class FakeRuns:
    """Replaces ``run_process`` and writes the files of a run.

    Attributes:
        names: names of the runs that were started.
        failing: a run fails if its name contains one of these.
    """

    def __init__(self):
        self.names = []
        self.failing = ()

    async def __call__(self, command, log):
        flags = dict(zip(command[3::2], command[4::2], strict=True))
        layer = parse_assignments([value for flag, value in itertools.pairwise(command) if flag == "--set"])
        settings = resolve_settings(read_config_file(flags["--config"]), layer)
        name = flags["--exp_name"]
        self.names.append(name)
        if any(part in name for part in self.failing):
            log.write_text(f"working\n{LOG_TAIL}\n")
            return 1
        log.write_text("done\n")
        folder = Path(settings.run.output_dir) / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_settings(settings))
        lines = [evaluation(mode, [1.0, 2.0], env_step=settings.run.max_env_step) for mode in settings.eval.modes]
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if settings.run.max_env_step:
            lines = [episode(20, 1.0, wall_s=2.0), episode(40, 4.0, won=True, wall_s=3.5)]
            (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0


@pytest.fixture
def runs(monkeypatch):
    fake = FakeRuns()
    monkeypatch.setattr(bench, "run_process", fake)
    monkeypatch.setattr(bench, "resolve_game", lambda env_id: None)
    return fake


@pytest.fixture
def call(tmp_path):
    """Runs the benchmark; returns its exit code and the lines of its results."""
    config, out = tmp_path / "settings.yaml", tmp_path / "out"
    config.write_text("search: {num_simulations: 8}\n")

    def call(*flags):
        fixed = ["--config", str(config), "--out", str(out), "--env_steps", "40", "--games", GAME]
        return bench.main([*fixed, *flags]), bench.read_results(out / "results.jsonl")

    return call


# ---- the benchmark ----


@pytest.mark.parametrize(
    ("wins", "index"),
    [("", None), ("1111", None), ("11111", 0), ("0111101111", None), ("01011111", 3), ("111110", 0), ("0111111", 1)],
)
def test_solved_index_is_the_first_of_five_wins_in_a_row(wins, index):
    assert bench.solved_index([win == "1" for win in wins]) == index


def test_make_line_of_a_run_that_learns(tmp_path):
    settings = resolve_settings({"search": {"num_simulations": 8}, "run": {"output_dir": "/somewhere"}})
    (tmp_path / "config.yaml").write_text(dump_settings(settings))
    scores = [0.0, 3.0, *[4.0] * 5, *[2.0] * 49]
    episodes = [episode(10 * n, score, won=score == 4) for n, score in enumerate(scores, start=1)]
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in episodes))
    evaluations = [
        evaluation("world_model", [0.0, 1.0], env_step=100),
        evaluation("world_model", [3.0, 4.0], env_step=560, wins=1),
        evaluation("world_model", [1.0, 1.0], env_step=560, unseen=True),
        evaluation("world_model", [4.0, 2.0], env_step=560, unseen=True, wins=1),
    ]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    job = bench.Job("unizero", "x", GAME, 3, 560, (), "d")
    line = bench.make_line(job, tmp_path)
    assert bench.key_of(line) == job.key
    assert (line["simulations"], line["max_score"], len(line["episodes"])) == (8, 4.0, 56)
    assert line["episodes"][2] == [30, 4.0, 4.0, True, 0.0]
    # 0 + 3 + 20 + 98 over 56; the last 50 are one of 4 and 49 of 2
    assert (line["mean_score"], line["best_score"], line["last_mean_score"]) == (121 / 56, 4.0, 102 / 50)
    assert (line["first_win_at"], line["solved_at"]) == (30, 30)
    seen, unseen = line["evaluations"]["world_model"], line["evaluations"]["unseen_world_model"]
    assert (seen["env_step"], seen["mean_score"], seen["wins"], seen["episodes"]) == (560, 3.5, 1, 2)
    assert (unseen["mean_score"], unseen["wins"], unseen["episodes"]) == (2.0, 1, 4)
    assert line["settings"] == {"search": {"num_simulations": 8}}  # no folder of this machine


def test_benchmark_only_evaluates_agents_that_do_not_learn(runs, call):
    code, lines = call("--agents", "random,prior,unizero")
    assert code == 0
    random, prior, unizero = lines
    assert (random["env_steps"], random["episodes"], random["mean_score"], random["simulations"]) == (0, [], 1.5, 0)
    assert random["settings"]["eval"] == {"modes": ["random"], "episodes": 50}
    assert list(prior["evaluations"]) == ["prior_sampled", "prior"]
    assert (unizero["env_steps"], unizero["mean_score"], unizero["simulations"]) == (40, 2.5, 8)


def test_benchmark_runs_only_what_is_missing(runs, call, capsys):
    assert call("--agents", "random,unizero", "--seeds", "0,1")[0] == 0
    assert len(runs.names) == 4
    capsys.readouterr()
    code, lines = call("--agents", "random,unizero,priorzero_sft", "--seeds", "0,1")
    assert code == 0 and len(runs.names) == 6 and len(lines) == 6
    assert capsys.readouterr().out.count("already complete: ") == 4
    # The number of threads does not matter. Another setting, label or number of steps is another run.
    assert len(call("--agents", "unizero", "--jobs", "2")[1]) == 6
    assert len(call("--agents", "unizero", "--set", "search.num_simulations=9")[1]) == 7
    assert len(call("--agents", "unizero", "--label", "again")[1]) == 8
    assert len(call("--agents", "unizero", "--env_steps", "60")[1]) == 9
    # The number of environment steps does not apply to agents that do not learn.
    assert len(call("--agents", "random", "--env_steps", "60")[1]) == 9
    assert len(set(runs.names)) == 9


def test_benchmark_repeats_runs_with_other_defaults(runs, call, monkeypatch):
    assert len(call("--agents", "unizero")[1]) == 1
    changed_default = {"search": {"deviation_prob": 0.9}}
    monkeypatch.setattr(bench, "resolve_settings", lambda *layers: resolve_settings(changed_default, *layers))
    assert len(call("--agents", "unizero")[1]) == 2


def test_benchmark_repeats_failed_runs(runs, call, capsys):
    runs.failing = ("unizero",)
    code, lines = call("--agents", "random,unizero")
    assert code == 1 and [line["agent"] for line in lines] == ["random"]
    error = capsys.readouterr().err
    assert "unizero" in error and LOG_TAIL in error
    log = Path(error.split("(log: ")[1].split(")")[0])
    assert LOG_TAIL in log.read_text()
    runs.failing = ()
    code, lines = call("--agents", "random,unizero")
    assert code == 0 and [line["agent"] for line in lines] == ["random", "unizero"]
    assert LOG_TAIL in log.read_text()  # the second run has another log


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("episodes.jsonl", lambda lines: [], "no episode ended"),
        # A run that a signal stops has exit code 0, but fewer steps than requested.
        (
            "evaluations.jsonl",
            lambda lines: [{**line, "env_step": 30} for line in lines],
            "stopped at 30 of 40 env",
        ),
    ],
)
def test_benchmark_fails_if_a_run_is_incomplete(runs, call, monkeypatch, capsys, name, changed, message):
    read = bench._read_jsonl
    monkeypatch.setattr(bench, "_read_jsonl", lambda file: changed(read(file)) if file.name == name else read(file))
    assert call("--agents", "unizero") == (1, [])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "run.seed=3"], "--seeds"),
        (["--set", "search.num_simulation=3"], "search.num_simulations"),
        (["--agents", "unizero", "--set", "eval.modes=prior"], "agent unizero"),
        (["--set", "run.max_iter=1"], "run.max_iter=1"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_benchmark_reports_wrong_arguments_before_any_run(runs, call, capsys, flags, message):
    code, lines = call(*flags)
    assert (code, lines, runs.names) == (2, [], [])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_run_process_ends_the_process_when_cancelled(tmp_path):
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('interrupted', flush=True), sys.exit()))\n"
        "print('up', flush=True)\ntime.sleep(60)"
    )
    log = tmp_path / "log"

    async def cancel_when_up():
        task = asyncio.create_task(bench.run_process([sys.executable, "-c", script], log))
        while not (log.exists() and "up" in log.read_text()):
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(cancel_when_up(), 30))
    assert log.read_text().split() == ["up", "interrupted"]


# ---- the table and the curves ----


def line_of(agent, game, seed, episodes=(), *, max_score=10.0, env_steps=100, mean_return=1.0, label="", wall_s=50.0):
    """``episodes``: (env_step, score, won, wall_s)."""
    learns = agent not in bench.MODE_OF
    scores = [e[1] for e in episodes] if learns else [mean_return]
    return {
        "agent": agent,
        "label": label,
        "game": game,
        "seed": seed,
        "env_steps": env_steps if learns else 0,
        "digest": f"of {agent}",
        "simulations": 8 if learns else 0,
        "max_score": max_score,
        "episodes": [[at, score, score, won, wall] for at, score, won, wall in episodes],
        "mean_score": sum(scores) / len(scores),
        "best_score": max(scores),
        "solved_at": 80 if learns and scores[-5:] == [10.0] * 5 else None,
        "evaluations": {} if learns else {bench.MODE_OF[agent]: {"mean_return": mean_return}},
        "wall_s": wall_s,
    }


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        file = tmp_path / "results.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return file

    return write


A, B = "textworld:coin-collector?level=5&seed=1", "textworld:coin-collector?level=5&seed=2"


def two_games_two_seeds():
    wins = [(80 + n, 10.0, True, 30.0 + n) for n in range(5)]
    return [
        line_of("random", A, 0, mean_return=1.0),
        line_of("random", B, 0, mean_return=2.0, max_score=20.0),
        line_of("unizero", A, 0, [(20, 0.0, False, 5.0), (60, 4.0, False, 20.0), (90, 8.0, False, 40.0)]),
        line_of("unizero", B, 0, [(30, 2.0, False, 6.0), (100, 6.0, False, 44.0)], max_score=20.0, wall_s=30.0),
        line_of("unizero", A, 1, wins, wall_s=20.0),
        line_of("unizero", B, 1, [(10, 20.0, True, 3.0)] + [(90, 20.0, True, 41.0)] * 4, max_score=20.0, wall_s=20.0),
    ]


def test_table_of_hand_made_lines(write):
    rows = plot.read_rows([write(*two_games_two_seeds())])
    assert [row.name for row in rows] == ["random", "unizero"]
    random, unizero = (plot.table_cells(row, plot.ENV_STEP) for row in rows)
    # random: (1 of 10 + 2 of 20) / 2 = 0.1, one seed
    assert random == ["coin-collector: random", "2 x 1", "-", "-", "0.100", "-", "0.100", "-", "-", "-, -, -", "50"]
    # Seed 0: (0 + 4 + 8)/3 of 10 = 0.4 and (2 + 6)/2 of 20 = 0.2, mean 0.3; seed 1: 1 and 1. Mean 0.65, deviation
    # 0.7/sqrt(2) = 0.495. Last quarter: 0.8 and 0.3, mean 0.55; seed 1: 1; mean 0.775, deviation 0.45/sqrt(2) = 0.318.
    # Best: (0.8 + 0.3)/2 and 1. Solved: two of four, at 80 and 10; so the median lies between 80 and never.
    assert unizero == [
        "coin-collector: unizero", "2 x 2", "100", "8", "0.650 ± 0.495", "0.775 ± 0.318", "0.775", "0.50", "never",
        "-, -, -", "30",
    ]  # fmt: skip
    table = plot.main_table(rows, plot.ENV_STEP)
    assert table.count("\n") == 6 and "Maximum scores: coin-collector 10 to 20." in table


def test_table_shows_time_to_solved_and_what_is_missing(write):
    lines = two_games_two_seeds()
    rows = plot.read_rows([write(*lines[:2], *lines[4:])])
    assert [plot.table_cells(rows[1], by)[8] for by in (plot.ENV_STEP, plot.WALL_S)] == ["45", "16"]  # 80, 10; 30, 3
    incomplete = plot.read_rows([write(*lines[:5])])[1]
    assert plot.table_cells(incomplete, plot.ENV_STEP)[1] == "3 of 2 x 2"
    early = plot.read_rows([write(lines[0], line_of("unizero", A, 0, [(75, 5.0, False, 1.0)]))])[1]
    assert plot.table_cells(early, plot.ENV_STEP)[5] == "-"  # no episode ended in the last quarter


def test_greedy_wins_by_mode(write):
    lines = two_games_two_seeds()
    for line, wins in zip(lines[2:5], (1, 0, 1), strict=True):  # the fourth was not evaluated so
        line["evaluations"] = {"world_model": {"wins": wins, "episodes": 1}, "prior": {"wins": 1, "episodes": 4}}
    assert plot.greedy_wins(plot.read_rows([write(*lines)])[1]) == "0.67, -, 0.25"


def test_run_table_shows_one_figure_of_each_run(write, capsys):
    lines = two_games_two_seeds()
    assert plot.main([str(write(*lines[:5])), "--each", "solved_at"]) == 0  # the last run is missing
    assert capsys.readouterr().out.endswith(
        f"\n| coin-collector: solved_at | unizero, 100 steps |\n| --- | --- |\n| {A} | -, 80 |\n| {B} | -, - |\n"
    )
    assert plot.main([str(write(*lines)), "--each", "best_score"]) == 0
    assert f"| {B} | 2 | 6, 20 |\n" in capsys.readouterr().out


def test_bin_means():
    points = [(20, 1.0), (25, 3.0), (26, 5.0), (99, 7.0), (100, 9.0), (101, 50.0)]
    assert plot.bin_means(points, end=100, bins=4) == [2.0, 5.0, 5.0, 8.0]  # the third has none of its own
    later = plot.bin_means([(60, 1.0)], end=100, bins=4)
    assert math.isnan(later[0]) and math.isnan(later[1]) and later[2:] == [1.0, 1.0]


def test_learning_curve_is_the_mean_over_games_with_the_deviation_over_seeds(write):
    random, unizero = plot.read_rows([write(*two_games_two_seeds())])
    x, means, deviations = plot.learning_curve(unizero, by=plot.ENV_STEP, bins=2)
    assert x == [25.0, 75.0]
    # Until 50: seed 1 of game A has ended no episode. Then seed 0: (0.4 + 0.8)/2 and 0.3, mean 0.45; seed 1: 1.
    assert math.isnan(means[0]) and math.isnan(deviations[0])
    assert means[1] == pytest.approx(0.725) and deviations[1] == pytest.approx(0.55 / math.sqrt(2))
    # By wall time: until 34 s, where the shortest run ends. Seed 0: 0 then 0.4; 0.1, which stays. Seed 1: from 30 s on.
    x, means, _ = plot.learning_curve(unizero, by=plot.WALL_S, bins=2)
    assert x == [8.5, 25.5] and means[1] == pytest.approx(((0.4 + 0.1) / 2 + 1) / 2)
    assert plot.mean_return(random) == pytest.approx(0.1)


def test_table_needs_runs_of_the_random_agent(write, capsys):
    lines = two_games_two_seeds()
    assert plot.main([str(write(*lines[2:]))]) == 2
    assert f"--agents random --games '{A},{B}'" in capsys.readouterr().err
    assert plot.main([str(write(*lines[1:]))]) == 2  # one game has one
    assert f"--agents random --games '{A}'" in capsys.readouterr().err
    assert plot.main([str(write(*lines))]) == 0


def test_table_rejects_a_row_with_different_settings(write, capsys):
    lines = two_games_two_seeds()
    again = {**lines[2], "digest": "other", "mean_score": 9.0}
    assert plot.main([str(write(*lines, again))]) == 2
    message = capsys.readouterr().err
    assert "the later one is used" in message and "its runs have different settings" in message
    # All runs of the row were made again: the later ones are used.
    later = [{**line, "digest": "other", "mean_score": line["max_score"]} for line in lines[2:]]
    assert plot.table_cells(plot.read_rows([write(*lines, *later)])[1], plot.ENV_STEP)[4] == "1.000 ± 0.000"


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot_is_reproducible(write, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    lines = two_games_two_seeds()
    labelled = [{**line, "label": "x"} for line in lines[2:]]
    zork = [line_of("random", "zork1.z5", 0), line_of("unizero", "zork1.z5", 0, [(50, 5.0, False, 1.0)])]
    file = write(*lines, *labelled, *zork)
    pictures = []
    for name in ("a", "b"):
        target = tmp_path / f"{name}.{suffix}"
        assert plot.main([str(file), "--table", str(tmp_path / "table.md"), "--plot", str(target)]) == 0
        pictures.append(target.read_bytes())
    assert pictures[0] == pictures[1]
    if suffix == "svg":
        text = pictures[0].decode()
        assert all(name in text for name in ("coin-collector", "zork1", "unizero (x)", "random"))


def test_plot_reports_missing_matplotlib(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main([str(write(*two_games_two_seeds())), "--plot", str(tmp_path / "a.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


# ---- scripts/compare_learning.py ----


def test_area_under_the_learning_curve_by_hand():
    """Twenty bins of five steps: eleven with 0, six with 4, three with 8."""
    line = line_of("unizero", A, 0, [(20, 0.0, False, 5.0), (60, 4.0, False, 20.0), (90, 8.0, False, 40.0)])
    assert compare.area(line) == pytest.approx((6 * 4 + 3 * 8) / 20)


def test_sign_test_by_hand():
    """Five of six: p = 2 * (1 + 6) / 2^6."""
    assert compare.sign_test([1, 2, 3, 4, 5, -1, 0]) == (5, 1, 1, pytest.approx(14 / 64))
    assert compare.sign_test([0.0]) == (0, 0, 1, 1.0)


def test_compare_prints_games_and_pairs(write, capsys):
    baseline = [line_of("unizero", game, seed, [(5, 2.0, False, 1.0)]) for game in (A, B) for seed in (0, 1)]
    agent = [
        {**line_of("priorzero_frozen", game, seed, [(5, score, False, 1.0)]), "label": "x"}
        for game, seed, score in ((A, 0, 3.0), (A, 1, 5.0), (B, 0, 1.0))  # one run is missing
    ]
    arguments = [str(write(*baseline, *agent)), "--agent", "priorzero_frozen (x)"]
    assert compare.main(arguments) == 0
    printed = capsys.readouterr()
    table = printed.out.splitlines()
    assert printed.err == "runs without a partner, which are left out: 1\n"
    assert f"| {A} (10) | 2 | 4.0, 2.0 | nan, nan | 4.0, 2.0 |" in table
    assert f"| {B} (10) | 1 | 1.0, 2.0 | nan, nan | 1.0, 2.0 |" in table
    # Gains: (4 / 2 - 1) and (1 / 2 - 1); two pairs of three are ahead.
    assert "| last 25% | 0 | 0 | 0 | 1 | - |" in table
    assert "| area | 2 | 1 | 0 | 1 | +25% |" in table and "| best | 2 | 1 | 0 | 1 | +25% |" in table


def test_compare_reports_missing_runs(write, capsys):
    file = str(write(*two_games_two_seeds()))
    assert compare.main([file, "--agent", "priorzero"]) == 2
    assert capsys.readouterr().err == "error: there are no runs of priorzero; the files have runs of unizero\n"
    assert compare.main([file, "--agent", "unizero"]) == 2
    assert capsys.readouterr().err.startswith("error: --agent and --baseline are both unizero")
    assert compare.main([file, "--agent", "random"]) == 2
    assert "no run with the same game, seed and number of environment steps" in capsys.readouterr().err
