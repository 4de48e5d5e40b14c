"""The loggers of metrics: their files are read back with the libraries that users read them with."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from priorzero.runs.folder import truncate_files
from priorzero.runs.loggers import check_loggers, make_metrics_writer, metrics_files
from priorzero.runs.loggers.csv_file import CsvLogger, read_metrics_csv
from priorzero.runs.loggers.tensorboard import TensorBoardLogger, hyper_parameters
from priorzero.runs.loggers.transcript_text import MAX_CHARACTERS, MAX_STEPS, episode_rows, episode_text
from priorzero.runs.loggers.wandb_run import TRANSCRIPTS
from priorzero.runs.report.data import read_run, read_scalars
from priorzero.runs.resume import newest_checkpoint
from priorzero.types import UserError
from tests.helpers.models import make_settings
from tests.helpers.reports import make_episode
from tests.helpers.runs import NO_LLM, read_events, short_settings, train
from tests.helpers.toy_game import toy_games
from tests.helpers.wandb_server import wandb_server

ROOT = Path(__file__).parent.parent


def csv_rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [tuple(row[name] for name in ("metric", "axis", "step", "value")) for row in csv.DictReader(file)]


# ---- all loggers ----


def test_make_metrics_writer_writes_with_each_logger_once(tmp_path):
    settings = make_settings({"run": {"loggers": ["csv", "tensorboard", "csv"]}})
    writer = make_metrics_writer(tmp_path, settings, last={"a": 0.5}, seconds=lambda: 1.0)
    assert writer.last == {"a": 0.5}
    writer.write({"a": 1.5, "b": float("nan")}, step=3, axis="train_iter")
    writer.close()
    assert csv_rows(tmp_path) == [("a", "train_iter", "3", "1.5")]
    assert read_events(tmp_path) == {"a": [1.5]}


def test_make_metrics_writer_makes_no_event_file_without_tensorboard(tmp_path):
    settings = make_settings({"run": {"loggers": ["csv"]}})
    writer = make_metrics_writer(tmp_path, settings, last=None, seconds=lambda: 1.0)
    writer.write({"a": 1.0}, step=1, axis="iteration")
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


# ---- csv ----


def test_csv_logger_writes_one_line_for_each_value(tmp_path):
    seconds = iter([1.24, 2.0])
    log = CsvLogger(tmp_path, seconds=lambda: next(seconds))
    log.write({"a": 0.1, 'odd,"name"': 2.0}, step=1, axis="iteration")
    log.write_evaluation({"score": 7.0}, transcripts=[make_episode()], env_step=40)
    expected = 'metric,axis,step,value,wall_s\na,iteration,1,0.1,1.2\n"odd,""name""",iteration,1,2.0,1.2\n'
    assert (tmp_path / "metrics.csv").read_text() == expected + "score,env_step,40,7.0,2.0\n"
    assert read_metrics_csv(tmp_path / "metrics.csv") == {"a": [(1, 0.1)], 'odd,"name"': [(1, 2)], "score": [(40, 7)]}


def test_csv_logger_and_tensorboard_contain_the_same_values(tmp_path):
    settings = make_settings({"run": {"loggers": ["csv", "tensorboard"]}})
    writer = make_metrics_writer(tmp_path, settings, last=None, seconds=lambda: 0.0)
    for step in (1, 2, 3):
        writer.write({"a": step / 3, **({"rare": -1e-30} if step == 2 else {})}, step=step, axis="iteration")
    writer.write_evaluation({"score_mean": 1234567.5}, transcripts=[], env_step=40)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    in_events = {(name, event.step, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    # TensorBoard stores float32.
    in_csv = {(name, int(step), float(np.float32(value))) for name, _, step, value in csv_rows(tmp_path)}
    assert in_csv == in_events and {name for name, *_ in in_csv} == {"a", "rare", "score_mean"} and len(in_csv) == 5
    exact = [float(value) for name, _, _, value in csv_rows(tmp_path) if name == "a"]
    assert exact == [1 / 3, 2 / 3, 1.0]


def test_csv_logger_raises_os_error_on_a_full_disk(tmp_path):
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        CsvLogger(tmp_path, seconds=lambda: 0.0).write({"a": 1.0}, step=1, axis="iteration")
    assert caught.value.errno == errno.ENOSPC


def test_read_metrics_csv_leaves_a_cut_line_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("metric,axis,step,value,wall_s\na,iteration,1,2.5,0.1\na,iteration,2")
    assert read_metrics_csv(path) == {"a": [(1.0, 2.5)]}


def test_truncate_files_cuts_metrics_csv_to_the_checkpoint(tmp_path):
    log = CsvLogger(tmp_path, seconds=lambda: 0.0)
    log.write({"a": 1.0}, step=1, axis="iteration")
    sizes = {path.name: path.stat().st_size for path in metrics_files(tmp_path)}
    log.write({"a": 2.0}, step=2, axis="iteration")
    truncate_files(tmp_path, sizes, env_step=0)
    assert csv_rows(tmp_path) == [("a", "iteration", "1", "1.0")]
    truncate_files(tmp_path, {}, env_step=0)  # a file that is younger than the checkpoint
    assert not metrics_files(tmp_path)


@pytest.mark.slow
def test_run_with_csv_is_resumed_without_duplicates_and_reported(tmp_path):
    changes = {"run": {"loggers": ["csv"], "max_iter": 4, "checkpoint_every": 3}}
    with toy_games():
        folder = train(short_settings(tmp_path, NO_LLM, changes)).folder
        before = csv_rows(folder)
        # As if the run had ended between its last checkpoint, which is at iteration 3, and its end.
        for path in (folder / "checkpoints" / "iteration_4").iterdir():
            path.unlink()
        (folder / "checkpoints" / "iteration_4").rmdir()
        changes["run"]["max_iter"] = 6
        train(short_settings(tmp_path, NO_LLM, changes), checkpoint=newest_checkpoint(folder))
    after = csv_rows(folder)
    counts = Counter((metric, axis, step) for metric, axis, step, _ in after)
    assert set(counts.values()) == {1}
    assert {step for metric, _, step, _ in after if metric == "time/run_s"} == set("123456")
    learned = [row for row in before if row[0] == "train/wm_total_loss"]
    assert learned and [row for row in after if row in learned] == learned  # iteration 4 was repeated equally
    assert not list(folder.glob("events*"))
    assert len(read_run(folder).scalars["train/wm_total_loss"]) == sum(row[0] == "train/wm_total_loss" for row in after)


def test_read_scalars_reads_event_files_and_metrics_csv_of_a_run_that_has_both(tmp_path):
    events = TensorBoardLogger(tmp_path)
    events.write({"a": 1.0}, step=1, axis="iteration")
    events.write_evaluation({}, transcripts=[make_episode()], env_step=1)
    events.close(failed=False)
    log = CsvLogger(tmp_path, seconds=lambda: 0.0)
    for step in (1, 2):
        log.write({"a": float(step), "b": 3.0}, step=step, axis="iteration")
    assert read_scalars(tmp_path) == {"a": [(1, 1), (2, 2)], "b": [(1, 3), (2, 3)]}


# ---- TensorBoard ----


def hparams_table(folder):
    """The HParams plugin's own view of a log directory: the settings that differ, and a row for each run."""
    from tensorboard import context
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    events = plugin_event_multiplexer.EventMultiplexer()
    events.AddRunsFromDirectory(str(folder))
    events.Reload()
    provider = data_provider.MultiplexerDataProvider(events, str(folder))
    plugin = backend_context.Context(base_plugin.TBContext(data_provider=provider, logdir=str(folder)))
    request = context.RequestContext()
    experiment = plugin.experiment_from_metadata(request, "x", True, plugin.hparams_metadata(request, "x"), None)
    query = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=10, allowed_statuses=[0, 1, 2, 3])
    groups = list_session_groups.Handler(request, plugin, "x", query).run().session_groups
    rows = {
        group.name: (
            {metric.name.tag: metric.value for metric in group.metric_values},
            api_pb2.Status.Name(group.sessions[0].status),
            {name: value.number_value for name, value in group.hparams.items()},
        )
        for group in groups
    }
    return {info.name for info in experiment.hparam_infos if info.differs}, rows, len(experiment.hparam_infos)


def test_tensorboard_logger_shows_settings_and_scores_in_the_hparams_plugin(tmp_path):
    for seed in (1, 2):
        settings = make_settings({"run": {"seed": seed}})
        (tmp_path / f"run{seed}").mkdir()
        log = TensorBoardLogger(tmp_path / f"run{seed}", settings=settings, last={})
        log.write({"train/loss": 4.0}, step=1, axis="train_iter")
        for env_step in (1, 2):
            scores = {
                "evaluator_step/world_model_score_mean": 3.0 * seed * env_step,
                "evaluator_step/prior_fallbacks": 0.0,
            }
            log.write_evaluation(scores, transcripts=[], env_step=env_step)
        log.close(failed=seed == 2)
    differing, rows, num_settings = hparams_table(tmp_path)
    assert differing == {"run.seed"} and num_settings == len(hyper_parameters(settings))
    scores, status, values = rows["run1/hparams"]
    assert (scores, status, values["run.seed"]) == ({"hparam/world_model_score_mean": 6.0}, "STATUS_SUCCESS", 1)
    scores, status, values = rows["run2/hparams"]
    assert (scores, status, values["run.seed"]) == ({"hparam/world_model_score_mean": 12.0}, "STATUS_FAILURE", 2)


def test_tensorboard_logger_of_a_resumed_run_keeps_the_scores_and_shows_changed_settings(tmp_path):
    first = TensorBoardLogger(tmp_path, settings=make_settings(), last={})
    first.write_evaluation({"evaluator_step/reward_mean": 2.0}, transcripts=[], env_step=5)
    first.close(failed=False)
    changed = make_settings({"run": {"max_iter": 77}})
    TensorBoardLogger(tmp_path, settings=changed, last={"evaluator_step/reward_mean": 2.0}).close(failed=False)
    _, rows, _ = hparams_table(tmp_path)
    scores, _, values = rows["hparams"]
    assert scores == {"hparam/reward_mean": 2.0} and values["run.max_iter"] == 77
    assert len(list((tmp_path / "hparams").iterdir())) == 1


def test_tensorboard_logger_shows_transcripts_as_text_that_is_not_interpreted(tmp_path):
    from tensorboard.plugins.text.text_plugin import text_array_to_html

    log = TensorBoardLogger(tmp_path)
    episode = make_episode(text="# A *hostile* <script>alert(1)</script> text")
    log.write_evaluation({}, transcripts=[episode], env_step=40)
    log.close(failed=False)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    name = f"evaluator_text/{episode['mode']}/{episode['game']}/text_summary"
    (event,) = events.Tensors(name)
    text = event.tensor_proto.string_val[0].decode()
    html = text_array_to_html(np.array([text]), enable_markdown=True)
    assert event.step == 40 and "<script>" not in html and "# A *hostile*" in html and "<h1>" not in html


# ---- transcripts ----


def test_episode_text_reads_like_the_game():
    episode = make_episode()
    step = episode["steps"][0]
    text = episode_text(episode)
    assert f"{step['raw_obs_text']}\n\n> {step['valid_actions'][step['chosen']]}" in text
    assert text.splitlines()[0].startswith(f"{len(episode['steps'])} steps, score {episode['score']:g} of 7")
    assert text.endswith(episode["final_obs_text"])


def test_episode_text_and_rows_of_a_long_episode_are_shortened():
    episode = make_episode()
    step = {**episode["steps"][0], "raw_obs_text": "x" * (MAX_CHARACTERS + 1)}
    episode = {**episode, "steps": [step] * (MAX_STEPS + 5)}
    assert episode_text(episode).endswith("(5 more steps are in last_evaluation.json)")
    rows = episode_rows(episode)
    assert len(rows) == MAX_STEPS and rows[0][4] == "x" * MAX_CHARACTERS + " ..."


# ---- Weights & Biases ----


def start_python(code, *arguments, **environment):
    """Start Python in a process of its own, since W&B keeps settings and changes hooks of the process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", **environment},
    )


def run_python(code, *arguments, **environment):
    """Run Python in a process of its own until it ends."""
    process = start_python(code, *arguments, **environment)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


OFFLINE = """
import sys
from pathlib import Path
from priorzero.runs.loggers.wandb_run import WandbLogger, check_wandb
from tests.helpers.models import make_settings
from tests.helpers.reports import make_episode

folder = Path(sys.argv[1])
check_wandb()

def log(steps, *, failed, **changes):
    logger = WandbLogger(folder, make_settings({"run": changes}))
    for step in steps:
        logger.write({"train/loss": step / 4}, step=10 * step, axis="train_iter")
        logger.write({"buffer/decisions": float(step)}, step=step, axis="iteration")
    logger.write_evaluation({"score": 7.0}, transcripts=[make_episode()], env_step=20 * steps[-1])
    logger.close(failed=failed)

log([1, 2, 3], failed=True, max_iter=3)
log([3, 4], failed=False, max_iter=4)  # resumed from a checkpoint at iteration 2
"""


@pytest.mark.slow
def test_wandb_logger_offline_and_resumed(tmp_path):
    pytest.importorskip("wandb")
    from tests.helpers.wandb_files import read_wandb_runs

    done = run_python(OFFLINE, tmp_path, WANDB_MODE="offline", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = read_wandb_runs(tmp_path)
    assert first.run_id == second.run_id and first.project == second.project == "priorzero"
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert (first.config["run"]["max_iter"], second.config["run"]["max_iter"]) == (3, 4)
    assert first.step_metrics == {
        "train/loss": "train_iter",
        "buffer/decisions": "iteration",
        "score": "env_step",
        TRANSCRIPTS: "env_step",
    }

    def values(run, name, axis):
        return [(row[axis], row[name]) for row in run.rows if name in row]

    assert values(first, "train/loss", "train_iter") == [(10, 0.25), (20, 0.5), (30, 0.75)]
    assert values(second, "train/loss", "train_iter") == [(40, 1.0)]  # step 30 was logged before
    assert values(second, "buffer/decisions", "iteration") == [(4, 4.0)]
    assert values(first, "score", "env_step") == [(60, 7.0)] and values(second, "score", "env_step") == [(80, 7.0)]
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/evaluator_text/transcripts_*.table.json"))
    table = json.loads(tables[0].read_text())
    assert len(tables) == 2 and len(table["data"]) == 3
    row = dict(zip(table["columns"], table["data"][1], strict=True))
    assert (row["step"], row["text"], row["action"], row["reward"]) == (1, "You wait.", "take 1", 1.0)
    assert done.stderr.count("to upload the run, type wandb sync") == 2


CRASH = """
import errno, sys, time
from pathlib import Path
import psutil
from loguru import logger
from priorzero.runs.loggers import wandb_run
from tests.helpers.models import make_settings

def full_disk(path, text):
    raise OSError(errno.ENOSPC, "No space left on device")

log = wandb_run.WandbLogger(Path(sys.argv[1]), make_settings())
replace_text, wandb_run.replace_text = wandb_run.replace_text, full_disk
try:
    log.write({"a": 1.0}, step=1, axis="iteration")
except OSError as error:
    print("raised", errno.errorcode[error.errno])
wandb_run.replace_text = replace_text
for process in psutil.Process().children(recursive=True):
    process.kill()
    process.wait()
for step in range(2, 6):
    time.sleep(0.2)
    log.write({"a": 1.0}, step=step, axis="iteration")
log.close(failed=False)
print("the run went on")
"""


@pytest.mark.slow
def test_wandb_logger_raises_os_error_on_a_full_disk_and_goes_on_after_the_death_of_its_process(tmp_path):
    pytest.importorskip("wandb")
    done = run_python(CRASH, tmp_path, WANDB_MODE="offline", HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "raised ENOSPC\nthe run went on\n")
    assert done.stderr.count("W&B has failed") == 1 and "type wandb sync" in done.stderr
    assert "Traceback" not in done.stderr


ONLINE = """
import sys, time
from pathlib import Path
from priorzero.runs.loggers import wandb_run
from tests.helpers.models import make_settings

wandb_run.FINISH_TIMEOUT_S = 3.0
wandb_run.check_wandb()
log = wandb_run.WandbLogger(Path(sys.argv[1]), make_settings())
log.write({"a": 1.0}, step=1, axis="iteration")
print("logged", flush=True)
sys.stdin.readline()  # the server goes away
started = time.monotonic()
for step in range(2, 5):
    log.write({"a": float(step)}, step=step, axis="iteration")
print(f"{time.monotonic() - started < 2}", flush=True)
log.close(failed=False)
print(f"{time.monotonic() - started < 20}", flush=True)
"""


@pytest.mark.slow
def test_wandb_logger_goes_on_when_the_connection_is_lost(tmp_path):
    pytest.importorskip("wandb")
    with wandb_server() as server:
        process = start_python(ONLINE, tmp_path, HOME=str(tmp_path), WANDB_BASE_URL=server.url, WANDB_API_KEY="k" * 40)
        assert process.stdout.readline() == "logged\n", process.communicate()[1]
        for _ in range(600):
            if server.history:
                break
            time.sleep(0.1)
    stdout, stderr = process.communicate("\n", timeout=120)
    assert [(row["a"], row["iteration"]) for row in server.history] == [(1.0, 1)]
    assert (process.returncode, stdout) == (0, "True\nTrue\n") and "Traceback" not in stderr
    assert f"W&B: {server.url}/me/priorzero/runs/x" in stderr


CHECK = """
import os, sys, time
import wandb
from priorzero.runs.loggers import check_loggers
from priorzero.types import UserError
from tests.helpers.models import make_settings

key, host = "k" * 40, sys.argv[1]
settings = make_settings({"run": {"loggers": ["wandb"]}}).run
for changes in (
    {"WANDB_BASE_URL": host},
    {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": key},
    {"WANDB_BASE_URL": host, "WANDB_API_KEY": key},
    {"WANDB_MODE": "offline"},
    {"WANDB_MODE": "disabled"},
):
    os.environ.update(changes)
    started = time.monotonic()
    try:
        check_loggers(settings)
        print("ok")
    except UserError as error:
        print(error)
    assert time.monotonic() - started < 60
    wandb.teardown()  # its settings are read again
    for name in changes:
        del os.environ[name]
"""


@pytest.mark.slow
def test_check_loggers_says_what_to_type_without_login_network_or_valid_key(tmp_path):
    pytest.importorskip("wandb")
    with wandb_server(knows_key=False) as server:
        host = server.url
        done = run_python(CHECK, host, HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path), NETRC=str(tmp_path / "netrc"))
    assert done.returncode == 0, done.stderr
    no_login, no_network, refused, offline, disabled = done.stdout.splitlines()
    assert no_login.startswith(f"run.loggers=wandb: W&B is not logged in at {host}; type wandb login")
    assert no_network.startswith("run.loggers=wandb: http://127.0.0.1:9 cannot be reached (")
    assert (
        refused.startswith("run.loggers=wandb: W&B refuses the API key (") and "type wandb login --relogin" in refused
    )
    assert all(
        "WANDB_MODE=offline" in line and "--set run.loggers=" in line for line in (no_login, no_network, refused)
    )
    assert offline == disabled == "ok"


def test_check_loggers_without_the_package(monkeypatch):
    monkeypatch.setattr("priorzero.runs.loggers.wandb_run.importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"wandb is not installed; type pip install wandb==[\d.]+, or leave"):
        check_loggers(make_settings({"run": {"loggers": ["csv", "wandb"]}}).run)
    check_loggers(make_settings({"run": {"loggers": ["csv"]}}).run)
