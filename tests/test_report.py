"""The report of a run: what it reads, what it shows, and that every run writes one."""

from __future__ import annotations

import fcntl
import json
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser

import pytest

import priorzero.runs.report
from priorzero import entry, ray_entry
from priorzero.config import PRESETS, resolve_settings
from priorzero.report import main
from priorzero.runs.checkpoint import saved_checkpoints
from priorzero.runs.files import is_locked
from priorzero.runs.loggers import MetricsWriter
from priorzero.runs.loggers.tensorboard import TensorBoardLogger
from priorzero.runs.report import write_report
from priorzero.runs.report.charts import Series, bucket_means, line_chart, running_mean, thin, ticks
from priorzero.runs.report.commands import commands, plain_arguments
from priorzero.runs.report.data import read_run
from priorzero.runs.report.page import MAX_TRANSCRIPT_CHARS, duration, time_shares
from priorzero.runs.resume import newest_checkpoint
from priorzero.train import TrainingRun
from priorzero.types import UserError
from tests.helpers.models import make_settings
from tests.helpers.reports import evaluation_line, make_episode, make_run
from tests.helpers.runs import NO_LLM, lines, short_settings, train
from tests.helpers.toy_game import toy_games


class Page(HTMLParser):
    """The text of each section of a page (by id; ``head`` for the header), and the embedded data."""

    def __init__(self, path):
        super().__init__()
        self.text, self.data, self._section, self._script = {}, None, "head", None
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag == "section":
            self._section = named["id"]
        if tag in ("script", "style"):
            self._script = named.get("id", "")

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._script = None

    def handle_data(self, data):
        if self._script == "data":
            self.data = json.loads(data)
        elif self._script is None:
            own = self.text.get(self._section, "")
            self.text[self._section] = " ".join(f"{own} {data}".split())


def report(folder, **arguments):
    return Page(write_report(folder, **arguments))


# ---- numbers ----


def test_report_shows_the_numbers_of_the_files(tmp_path):
    evaluations = [
        evaluation_line(0, "prior", [2.0, 3.0]),
        evaluation_line(0, "world_model_with_prior", [1.0, 1.0]),
        evaluation_line(40, "prior", [0.0, 0.0]),
        evaluation_line(200, "prior", [4.0, 5.5], wins=1),
        evaluation_line(200, "world_model_with_prior", [7.0, 7.0], wins=2),
    ]
    page = report(make_run(tmp_path / "run", iterations=10, evaluations=evaluations))
    head = page.text["head"]
    assert "textworld:simple?seed=7 done seed 0" in head
    for fact in ("iterations 10 of 10", "environment steps 200", "training episodes 10", "world-model updates 20"):
        assert fact in head
    assert "LLM updates 10" in head and "wall time 2 min 5 s" in head and "search.num_simulations 10" in head
    assert (
        "agent before training after 200 steps "
        "LLM and world model world_model_with_prior 1 of 7 won 0 of 2 7 of 7 won 2 of 2 "
        "LLM alone prior 2.5 of 7 won 0 of 2 4.75 of 7 won 1 of 2"
    ) in page.text["learned"]
    assert "World model: value 4 → 0.4" in page.text["losses"]
    assert "LLM: RFT on rewards -0.5 → -0.05" in page.text["losses"] and "KL" not in page.text["losses"]
    assert "LLM update 60.0% 1 min 0 s idle 25.0% 25 s search 15.0% 15 s" in page.text["time"]
    more = {"real_values": [1.75, 1.5, 1.0], "outcome": "limit of moves reached"}
    assert page.data["episodes"] == [{**make_episode(), **more}]


def test_report_of_a_run_with_one_evaluation_has_one_column(tmp_path):
    page = report(make_run(tmp_path / "run", iterations=10))
    assert "evaluated once, after 200 environment steps" in page.text["learned"]
    assert "before training" not in page.text["learned"]


def test_report_merges_games_and_names_unseen_ones(tmp_path):
    evaluations = [
        evaluation_line(80, "random", [1.0], game="a"),
        evaluation_line(80, "random", [4.0], game="b", max_score=9.0),
        evaluation_line(80, "random", [5.0], game="c", unseen=True),
    ]
    page = report(make_run(tmp_path / "run", evaluations=evaluations))
    assert "random actions random 2.5 of 8 won 0 of 2" in page.text["learned"]
    assert "random actions, unseen games random 5 of 7 won 0 of 1" in page.text["learned"]


def test_report_without_an_llm_shows_none(tmp_path):
    layer = {"prior": {"enabled": False}, "eval": {"modes": ["world_model"]}}
    folder = make_run(tmp_path / "run", layer, transcripts=[make_episode("world_model")])
    page = report(folder)
    assert "LLM none UniZero alone" in page.text["head"]
    assert page.data["episodes"][0]["steps"][0]["prior_probs"] is None


@pytest.mark.parametrize(
    ("arguments", "changes", "state"),
    [
        ({"running": False}, {"iterations": 4}, "stopped"),
        ({"running": True}, {"iterations": 4}, "running"),
        ({"running": False, "error": "GameWorkerError: <hung>"}, {"iterations": 4}, "ended by an error"),
        ({"running": False}, {"iterations": 10}, "done"),
        ({"running": False}, {"iterations": 10, "evaluations": []}, "stopped before the last evaluation"),
    ],
)
def test_report_names_the_state_of_the_run(tmp_path, arguments, changes, state):
    head = report(make_run(tmp_path / "run", **changes), **arguments).text["head"]
    assert f"seed=7 {state} seed 0" in head
    assert ("The run ended by an error: GameWorkerError: <hung>" in head) == ("error" in arguments)


def test_report_finds_out_whether_the_run_is_going_on(tmp_path):
    folder = make_run(tmp_path / "run")
    assert not is_locked(folder)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_locked(folder) and "running" in report(folder).text["head"]
    assert not is_locked(folder) and "stopped" in report(folder).text["head"]


def test_report_of_a_run_in_which_nothing_happened(tmp_path):
    page = report(make_run(tmp_path / "run", iterations=0, evaluations=[]))
    assert "stopped" in page.text["head"] and "iterations 0 of 10" in page.text["head"]
    for section, words in [
        ("learned", "was not evaluated"),
        ("curve", "No episode"),
        ("losses", "no update"),
        ("time", "No iteration"),
        ("transcript", "No step"),
    ]:
        assert words in page.text[section]


def test_report_leaves_out_transcripts_of_another_evaluation(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(evaluation_line(90, "prior", [1.0])) + "\n")
    page = report(folder)
    assert page.data["episodes"] == [] and "from an evaluation at 80 environment steps" in page.text["head"]
    (folder / "last_evaluation.json").unlink()
    assert "last_evaluation.json is missing" in report(folder).text["head"]


def test_report_leaves_long_prompts_out(tmp_path):
    episode = make_episode(steps=2)
    episode["steps"][0]["prompt"] = "x" * MAX_TRANSCRIPT_CHARS
    folder = make_run(tmp_path / "run", transcripts=[episode])
    page = report(folder)
    assert [step["prompt"] for step in page.data["episodes"][0]["steps"]] == [None, None]
    notes = "The prompts are too long for this page. last_evaluation.json contains them."
    assert notes in page.text["head"] and "larger than usual" not in page.text["head"]
    assert len(page.source) < 100_000
    assert read_run(folder).transcripts[0]["steps"][1]["prompt"] == "Prompt of step 1"


def test_report_escapes_everything_that_is_not_its_own(tmp_path):
    hostile = "</script><script>alert(1)</script><!-- <b>&amp;"
    layer = {"run": {"env_id": hostile}}
    episode = make_episode(text=hostile, game=hostile)
    evaluations = [evaluation_line(80, hostile, [1.0], game=hostile)]
    folder = make_run(tmp_path / "a <b>&", layer, evaluations=evaluations, transcripts=[episode])
    page = report(folder, error=hostile)
    assert "<script>alert" not in page.source and page.source.count("<script") == page.source.count("</script>") == 2
    assert page.data["episodes"][0]["steps"][0]["raw_obs_text"] == hostile
    assert page.text["head"].count("alert(1)") == 4 and "<b>&" in page.text["head"]


def test_report_is_small_and_needs_no_network(tmp_path):
    episodes = [make_episode(mode, steps=25, text="x" * 500) for mode in ("world_model", "prior")]
    folder = make_run(tmp_path / "run", transcripts=episodes)
    line = {"total_reward": 1.0, "score": 1.0, "steps": 20, "won": False, "wall_s": 1.0}
    with (folder / "episodes.jsonl").open("a") as file:
        file.writelines(json.dumps({**line, "env_step": 100 + n}) + "\n" for n in range(5000))
    page = report(folder)
    assert len(page.source) < 200_000  # 5000 episodes are drawn as MAX_POINTS
    assert re.findall(r"""(?:https?:)?//[\w.]+|url\(|@import|\ssrc=""", page.source) == []


# ---- wrong folders ----


def test_report_command_line(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/report.html\n" and (folder / "report.html").is_file()
    (tmp_path / "empty").mkdir()
    checkpoint = folder / "checkpoints" / "iteration_4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text("{}")
    old = make_run(tmp_path / "old")
    (old / "config.yaml").write_text("search: {return_first: true}")
    damaged = make_run(tmp_path / "damaged")
    (damaged / "episodes.jsonl").write_text('{"env_step": 1, "total_reward": 2}\nnonsense\n')
    foreign = make_run(tmp_path / "foreign")
    (foreign / "evaluations.jsonl").write_text('{"env_step": 1}\n')
    for path, words in [
        (tmp_path / "missing", "there is no such folder; give a run's folder, such as data_priorzero/NAME"),
        (tmp_path / "empty", "is not a run's folder: it has no config.yaml"),
        (folder / "config.yaml", "is a file; give a run"),
        (tmp_path, f"is not a run's folder, but it contains 4 of them; name one, such as {tmp_path}/"),
        (checkpoint, f"is a checkpoint; give its run's folder, {folder}"),
        (old, "another version of PriorZero. the configuration is invalid"),
        (damaged, "episodes.jsonl, line 2: is not valid JSON"),
        (foreign, "evaluations.jsonl, line 1: lacks one of env_step, mode"),
    ]:
        assert main([str(path)]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith(f"error: {path}") and words in output.err
        assert not (path / "report.html").exists()


def test_report_of_a_killed_run_leaves_unfinished_lines_out(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "episodes.jsonl").open("a") as file:
        file.write('{"total_rew')
    (events,) = folder.glob("events*")
    events.write_bytes(events.read_bytes()[:-7])  # in the last record, which is time/run_s or the environment steps
    run = read_run(folder)
    assert len(run.episodes) == 4 and run.iteration == 3 and run.env_step == 60


def test_report_command_line_imports_no_model(tmp_path):
    folder = make_run(tmp_path / "run")
    code = (
        f"import sys; from priorzero.report import main; assert main([{str(folder)!r}]) == 0\n"
        "print({'torch', 'transformers', 'lzero', 'ding', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{folder}/report.html", "set()"] and done.stderr == ""


# ---- commands ----


def text_of(run, purpose):
    return next((command.text for command in commands(run) if command.purpose == purpose), None)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", ""),
        ("--quick_test --seed 3", "--quick_test --seed 3"),
        ("--preset pure_unizero", "--preset pure_unizero"),
        ("--quick_test --engine transformers --max_iter 50", "--quick_test --max_iter 50 --engine transformers"),
        (
            "--preset lora --env_id detective.z5 --set eval.modes=random,prior --set prior.alpha=0.25",
            "--preset lora --env_id detective.z5 --set prior.alpha=0.25 --set eval.modes=random,prior",
        ),
        ("--set 'run.output_dir=\"12: [x\"'", "--set 'run.output_dir=\"12: [x\"'"),
    ],
)
def test_report_commands_give_the_settings_of_the_run(words, expected):
    settings = entry.settings_from(entry.build_parser().parse_args(shlex.split(words)))
    arguments = plain_arguments(settings)
    assert shlex.join(arguments) == expected
    assert entry.settings_from(entry.build_parser().parse_args(arguments)) == settings


def test_report_shows_no_long_command():
    many = {"train": {"batch_size": 40, "update_per_collect": 3, "collect_env_steps": 7, "td_steps": 3}}
    more = {"search": {"num_simulations": 11, "temperature": 0.7, "pb_c_init": 1.0, "deviation_prob": 0.1}}
    quick_test = PRESETS["quick_test"]
    assert plain_arguments(resolve_settings(quick_test, many, more)) is not None
    assert plain_arguments(resolve_settings(quick_test, many, more, {"eval": {"every": 3}})) is None


def test_report_commands_continue_a_run_that_has_a_checkpoint(tmp_path):
    stopped, done = make_run(tmp_path / "a run"), make_run(tmp_path / "done", iterations=10)
    assert text_of(read_run(stopped), "Continue the run") is None
    assert "has no checkpoint" in report(stopped).text["commands"]
    for folder in (stopped, done):
        (folder / "checkpoints" / "iteration_4").mkdir(parents=True)
        (folder / "checkpoints" / "iteration_4" / "training.pt").touch()
    assert text_of(read_run(stopped), "Continue the run") == f"python -m priorzero.entry --resume '{stopped}'"
    longer = f"python -m priorzero.entry --resume {done} --max_iter 20"
    assert text_of(read_run(done), "Train longer") == longer and longer in report(done).text["commands"]
    again = text_of(read_run(stopped), "Repeat the run with the same settings")
    assert entry.settings_from(entry.build_parser().parse_args(shlex.split(again)[3:])) == make_settings()


def test_report_of_a_run_on_a_cluster(tmp_path):
    folder = make_run(tmp_path / "run", iterations=0)
    writer = MetricsWriter([TensorBoardLogger(folder)])
    writer.write(
        {"cluster/collector_restarts": 0.0, "ppo/steps": 3.0, "collector_iter/env_steps": 40.0},
        step=2,
        axis="iteration",
    )
    writer.write({"train/wm_total_loss": 1.0}, step=9, axis="train_iter")
    writer.close()
    run = read_run(folder)
    assert run.on_cluster and (run.iteration, run.env_step, run.llm_updates, run.world_model_updates) == (2, 40, 3, 9)
    again = text_of(run, "Repeat the run with the same settings")
    assert again == f"python -m priorzero.ray_entry --config {folder}/config.yaml"
    ray_entry.settings_from(ray_entry.build_parser().parse_args(shlex.split(again)[3:]), {})
    page = report(folder)
    assert "PPO steps 3 of the LLM" in page.text["head"] and "cannot be continued" in page.text["commands"]


# ---- charts ----


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 10, 5, [0, 2, 4, 6, 8, 10]),
        (0, 7, 5, [0, 2, 4, 6, 8]),
        (-0.3, 0.4, 4, [-0.4, -0.2, 0, 0.2, 0.4]),
        (12.4, 12.9, 3, [12.4, 12.6, 12.8, 13.0]),
        (0, 1_000_000, 4, [0, 500_000, 1_000_000]),
        (4, 4, 4, [2, 3, 4, 5, 6]),
        (0.008, 0.008, 4, [0.004, 0.006, 0.008, 0.01, 0.012]),
        (0, 0, 5, [-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6]),
    ],
)
def test_chart_ticks_are_round_and_cover_the_range(low, high, count, expected):
    assert ticks(low, high, count=count) == pytest.approx(expected)


def test_chart_points_are_thinned_and_averaged():
    points = [(float(n), float(n % 2)) for n in range(8)]
    assert thin(points, limit=8) == bucket_means(points, limit=8) == points
    assert thin(points, limit=3) == [points[0], points[4], points[7]]
    assert bucket_means(points, limit=4) == [(0.5, 0.5), (2.5, 0.5), (4.5, 0.5), (6.5, 0.5)]
    assert running_mean([(1, 3.0), (2, 5.0), (3, 1.0), (4, 9.0)], window=2) == [(1, 3.0), (2, 4.0), (3, 3.0), (4, 5.0)]


def test_chart_puts_points_where_they_belong():
    series = [Series("a", [(0, 0), (50, 1)], "line", 0), Series("<b>", [(100, 2)], "marks", 1)]
    svg = line_chart(series, title='"t"', x_label="x & y", width=464, height=250, limit=2.0, from_zero=True)
    root = xml.etree.ElementTree.fromstring(svg)  # well-formed, so everything is escaped
    # The margins are 52, 12, 10 and 40: x from 52 to 452, y from 210 up to 10.
    assert root.find("polyline").get("points") == "52.0,210.0 252.0,110.0"
    assert root.find("g").get("transform") == "translate(452.0 10.0)"
    assert root.find("g/title").text == "<b>: 2 at 100" and root.find(".//*[@class='limit']").get("y1") == "10.0"
    texts = [text.text for text in root.findall("text")]
    assert texts == ["0", "0.5", "1", "1.5", "2", "0", "50", "100", "x & y"]


def test_time_shares_are_fractions_of_the_iterations(tmp_path):
    shares = {share.name: share for share in time_shares(read_run(make_run(tmp_path / "run")))}
    assert list(shares) == ["LLM update", "idle", "search"]
    assert shares["search"].seconds == 6.0 and shares["search"].share == pytest.approx(0.15)
    assert [duration(s) for s in (0.04, 9.94, 59.4, 61, 3725)] == ["0.0 s", "9.9 s", "59 s", "1 min 1 s", "1 h 2 min"]


# ---- every run writes one ----


def run_short(folder, *layers, checkpoint=None):
    with toy_games():
        return train(short_settings(folder, *layers), checkpoint=checkpoint)


def test_run_writes_a_report_of_what_it_logged(tmp_path, tiny_llm_folder):
    layer = {"llm": {"path": str(tiny_llm_folder)}, "run": {"max_iter": 4, "checkpoint_every": 2}}
    summary = run_short(tmp_path, layer)
    page = Page(summary.folder / "report.html")
    head = page.text["head"]
    assert "toy done seed 0" in head and "iterations 4 of 4" in head
    assert f"environment steps {summary.rows['environment steps']}" in head
    assert f"training episodes {summary.rows['episodes finished']}" in head
    assert f"world-model updates {summary.rows['world-model updates']}" in head
    assert f"LLM updates {summary.rows['LLM updates']}" in head
    evaluations = lines(summary.folder, "evaluations.jsonl")
    shown = {(e["mode"], e["score"], e["total_reward"]) for e in page.data["episodes"]}
    last = [line for line in evaluations if line["env_step"] == evaluations[-1]["env_step"]]
    assert shown == {(line["mode"], line["scores"][0], line["returns"][0]) for line in last} and len(shown) == 3
    for name in ("train/wm_value_loss", "train/llm_sft_loss"):
        assert f"→ {summary.metrics[name]:.3g}" in page.text["losses"]
    assert f"{summary.folder}/report.html" in (summary.folder / "log" / "run.log").read_text()


def test_run_that_is_resumed_writes_its_report_again(tmp_path):
    first = run_short(tmp_path, NO_LLM, {"run": {"max_iter": 3}})
    before = Page(first.folder / "report.html").text["head"]
    second = run_short(tmp_path, NO_LLM, checkpoint=newest_checkpoint(first.folder))
    after = Page(second.folder / "report.html").text["head"]
    assert "done" in before and "iterations 3 of 3" in before and "iterations 6 of 6" in after
    assert f"training episodes {second.rows['episodes finished']}" in after
    run = read_run(second.folder)
    assert [step for step, _ in run.scalars["collector_iter/env_steps"]] == [1, 2, 3, 4, 5, 6]
    assert run.seconds >= read_run(first.folder).scalars["time/run_s"][2][1]


def test_run_that_is_stopped_or_fails_writes_a_report(tmp_path, monkeypatch):
    collect = TrainingRun.collect

    async def fail_in_iteration_3(run):
        if run.counters.iteration == 2:
            raise UserError("made to fail")
        return await collect(run)

    monkeypatch.setattr(TrainingRun, "collect", fail_in_iteration_3)
    with pytest.raises(UserError, match="made to fail"):
        run_short(tmp_path, NO_LLM)
    folder = tmp_path / "run"
    page = Page(folder / "report.html")
    assert "toy ended by an error seed 0" in page.text["head"] and "UserError: made to fail" in page.text["head"]
    assert "iterations 2 of 6" in page.text["head"] and len(saved_checkpoints(folder)) == 1
    assert f"--resume {folder}" in page.text["commands"]
    assert Page(write_report(folder)).text["head"] == page.text["head"]  # the command line does not know the error

    def request_stop(run, collected):
        log(run, collected)
        run.stop.request("the test")

    log = TrainingRun.log
    monkeypatch.setattr(TrainingRun, "collect", collect)
    monkeypatch.setattr(TrainingRun, "log", request_stop)
    assert run_short(tmp_path, NO_LLM, checkpoint=newest_checkpoint(folder)).stopped
    assert "toy stopped seed 0" in Page(folder / "report.html").text["head"]
    assert "toy stopped seed 0" in Page(write_report(folder)).text["head"]


def test_run_survives_a_report_that_fails(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("made to fail")

    monkeypatch.setattr(priorzero.runs.report, "render", fail)
    with toy_games():
        summary = train(short_settings(tmp_path, NO_LLM, {"run": {"max_iter": 2}}))
    assert summary.rows["iterations"] == 2 and len(saved_checkpoints(summary.folder)) == 1
    log = (summary.folder / "log" / "run.log").read_text().splitlines()
    (warning,) = (line for line in log if " WARNING " in line)
    assert warning.endswith("the report could not be written (made to fail)")
    assert not (summary.folder / "report.html").exists()
