"""Runs that are stopped, killed or interrupted, and are resumed as if nothing had happened."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import time

import numpy as np
import psutil
import pytest
import torch

from priorzero.entry import main
from priorzero.policy import PriorZeroPolicy
from priorzero.runs.checkpoint import read_checkpoint, saved_checkpoints
from priorzero.runs.files import recording_path
from priorzero.runs.folder import lock_folder
from priorzero.runs.logger import RunLogger
from priorzero.runs.progress import Progress
from priorzero.runs.resume import newest_checkpoint
from priorzero.runs.summary import fingerprint
from priorzero.runtime.concurrency import REPEAT_S, StopRequest
from priorzero.types import UserError
from tests.helpers.faults import RATES, FaultPlan
from tests.helpers.processes import ENDLESS_UPDATE, EntryProcess
from tests.helpers.runs import NO_LLM, SHORT, lines, read_events, short_settings, train
from tests.helpers.toy_game import toy_games


def run(folder, *layers, checkpoint=None):
    """A short run of a toy game."""
    with toy_games():
        return train(short_settings(folder, *layers), checkpoint=checkpoint)


def resume(run_folder, *layers):
    """Resume a short run from its newest checkpoint."""
    return run(run_folder.parent, *layers, checkpoint=newest_checkpoint(run_folder))


# ---- a resumed run equals one that was never stopped ----

RECORDED = {"run": {"record_every": 2}}


def recordings(folder):
    return {path.name: path.read_text() for path in (folder / "recordings").iterdir()}


def timeless_events(folder):
    """The metrics that do not depend on the clock or the machine."""
    timed = ("time/", "memory/", "prior/latency", "prior/tokens_per_s")
    return {tag: values for tag, values in read_events(folder).items() if not tag.startswith(timed)}


def learned(folder):
    """Checksums of everything that is learned and of what it is learned from."""
    prints = fingerprint(torch.load(folder / "world_model.pt", weights_only=True))
    state = torch.load(folder / "training.pt", weights_only=True)
    prints |= {f"target {name}": value for name, value in fingerprint(state["policy"]["target"]).items()}
    for optimizer in ("optimizer", "llm_optimizer"):
        moments = (state["policy"][optimizer] or {"state": {}})["state"]
        prints |= {f"{optimizer} {n}": fingerprint({"m": m["exp_avg"]})["m"] for n, m in moments.items()}
    if (folder / "llm").exists():
        prints["llm"] = hash((folder / "llm" / "model.safetensors").read_bytes())
    arrays = {name: fingerprint({"values": p["values"]}) for name, p in state["records"]["arrays"].items()}
    rngs = [state["buffer"]["rng"], state["collector"]["rngs"], state["collector"]["exploration"]]
    rngs += [state["best_episodes"], state["collector"]["memories"]]
    counters = state["loop"]["counters"]
    return prints, arrays, state["records"]["scalars"], rngs, state["random"]["python"], counters


def assert_equal_runs(one, other, *, at):
    assert lines(one, "episodes.jsonl") == lines(other, "episodes.jsonl")
    assert lines(one, "evaluations.jsonl") == lines(other, "evaluations.jsonl")
    assert timeless_events(one) == timeless_events(other)
    assert learned(one / "checkpoints" / at) == learned(other / "checkpoints" / at)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Six iterations without a stop; checkpoints after three and six."""
    return run(tmp_path_factory.mktemp("whole"), NO_LLM, RECORDED)


def test_resumed_run_with_an_llm_equals_a_run_that_was_never_stopped(tmp_path, tiny_llm_folder):
    layer = {
        "run": {"max_iter": 4, "checkpoint_every": 2},
        "llm": {"path": str(tiny_llm_folder), "learning_rate": 1e-3},
        "eval": {"every": 2, "modes": ["world_model_with_prior"]},
    }
    whole = run(tmp_path / "whole", layer)
    first = run(tmp_path / "parts", layer, {"run": {"max_iter": 2}})
    np.random.seed(5)
    torch.manual_seed(5)
    second = resume(first.folder, layer)
    assert whole.rows["LLM updates"] > first.rows["LLM updates"] > 0
    assert whole.metrics.keys() == second.metrics.keys()
    assert_equal_runs(whole.folder, second.folder, at="iteration_4")


def test_resumed_run_keeps_the_best_episodes_and_the_memory(tmp_path, tiny_llm_folder, monkeypatch):
    """Half of each LLM batch is imitated, and prompts contain what earlier episodes taught."""
    batches, learn_llm = [], PriorZeroPolicy.learn_llm

    def recorded(self, decisions):
        batches.append((len(decisions.records), decisions.num_imitated))
        return learn_llm(self, decisions)

    monkeypatch.setattr(PriorZeroPolicy, "learn_llm", recorded)
    layer = {
        "run": {"env_id": "toy,toy2", "max_iter": 6, "checkpoint_every": 2},
        "env": {"collector_env_num": 4},
        "train": {"collect_env_steps": 20},
        "llm": {
            "path": str(tiny_llm_folder),
            "learning_rate": 1e-3,
            "batch_size": 4,
            "imitation_share": 0.5,
            "memory_lines": 3,
        },
        "replay": {"buffer_size": 40},
        "eval": {"every": 2, "modes": ["prior"], "unseen": "toy3"},
    }
    whole = run(tmp_path / "whole", layer)
    assert set(batches[1:]) == {(4, 2)} and len(batches) >= 5
    first = run(tmp_path / "parts", layer, {"run": {"max_iter": 4}})
    second = resume(first.folder, layer)
    assert_equal_runs(whole.folder, second.folder, at="iteration_6")
    assert read_events(whole.folder)["buffer/imitation_decisions"][-1] >= 2
    state = torch.load(first.folder / "checkpoints" / "iteration_4" / "training.pt", weights_only=True)
    assert state["best_episodes"]["best"].keys() == {0, 1} and all(state["collector"]["memories"])
    assert any(episode and episode["history"] and episode["memory"] for episode in state["collector"]["episodes"])
    assert any("earlier attempts" in prompt for prompt in state["records"]["scalars"]["prompt"])


def test_resumed_run_repeats_what_came_after_the_checkpoint(whole_run, tmp_path):
    """As after a crash: the run's files are ahead of the last checkpoint."""
    crashed = shutil.copytree(whole_run.folder, tmp_path / "run")
    shutil.rmtree(crashed / "checkpoints" / "iteration_6")
    recording_path(crashed, env_step=61, episode=9).write_text("of an iteration that is not repeated in the same way")
    second = resume(crashed, NO_LLM, RECORDED)
    assert second.folder == crashed and second.rows["iterations"] == whole_run.rows["iterations"] == 6
    assert second.rows["environment steps"] == whole_run.rows["environment steps"] >= 60
    assert whole_run.metrics.keys() == second.metrics.keys() and not whole_run.stopped
    assert recordings(crashed) == recordings(whole_run.folder) and len(recordings(crashed)) == 4
    assert_equal_runs(whole_run.folder, crashed, at="iteration_6")


def test_run_without_an_llm_logs_and_saves_nothing_of_one(whole_run):
    scalars = read_events(whole_run.folder)
    assert "train/wm_total_loss" in scalars and not [tag for tag in scalars if "llm" in tag or tag.startswith("prior/")]
    assert not (whole_run.folder / "checkpoints" / "iteration_6" / "llm").exists()


# ---- signals ----


def arguments(tmp_path, *more):
    """The command line of a long run of a toy game."""
    words = ["--quick_test", "--env_id", "toy", "--max_iter", "100000", "--exp_name", "run"]
    layers = {**SHORT, "prior": {"enabled": False}, "eval": {"modes": "world_model", "every": 1000, "at_start": False}}
    layers["run"] = {"num_threads": 1, "checkpoint_every": 0, "output_dir": tmp_path}
    for group, values in layers.items():
        for key, value in values.items():
            words += ["--set", f"{group}.{key}={value}"]
    return [*words, *more]


def test_run_stops_at_a_signal_and_can_be_resumed(tmp_path, capfd, monkeypatch):
    show = Progress.show

    def signal_in_iteration_4(self, **values):
        show(self, **values)
        if values["iteration"] == 4 and not monkeypatch.sent:
            monkeypatch.sent = True
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.sent = False
    monkeypatch.setattr(Progress, "show", signal_in_iteration_4)
    with toy_games():
        assert main(arguments(tmp_path)) == 0
        stderr = capfd.readouterr().err
        assert "Traceback" not in stderr and f"--resume {tmp_path / 'run'}" in stderr
        (folder,) = saved_checkpoints(tmp_path / "run")
        counters = read_checkpoint(folder).manifest["counters"]
        assert counters["iteration"] >= 4 and counters["train_iter"] > 0
        iterations = counters["iteration"] + 2
        more = ["--max_iter", str(iterations), "--set", "llm.micro_batch_size=1"]
        assert main(["--resume", str(tmp_path / "run"), *more]) == 0
        stderr = capfd.readouterr().err
        assert f"resumed from {folder.name}" in stderr and f"iteration {iterations}/{iterations}" in stderr
        assert main(["--resume", str(tmp_path / "run"), *more]) == 0
        stderr = capfd.readouterr().err
        assert f"the run had already ended: iteration {iterations} of run.max_iter={iterations}" in stderr
    episodes = lines(tmp_path / "run", "episodes.jsonl")
    assert [line["env_step"] for line in episodes] == sorted({line["env_step"] for line in episodes})


@pytest.mark.slow
def test_run_ends_immediately_at_a_second_signal(tmp_path):
    with EntryProcess(arguments(tmp_path), folder=tmp_path, endless_update=True) as process:
        process.wait_for(ENDLESS_UPDATE)
        workers = psutil.Process(process.pid).children()
        process.send(signal.SIGTERM)
        process.wait_for("SIGTERM: the run will stop")
        time.sleep(REPEAT_S)
        began = time.monotonic()
        process.send(signal.SIGTERM)
        assert process.wait(10) == 130 and time.monotonic() - began < 5
        assert "second SIGTERM: exiting immediately" in process.stderr
    assert workers and not psutil.wait_procs(workers, timeout=2)[1]
    assert not saved_checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_run_is_saved_when_all_its_processes_get_the_signals_of_batch_systems(tmp_path):
    """Different signals, one after the other, also while the run is being saved."""
    with EntryProcess(arguments(tmp_path), folder=tmp_path) as process:
        process.wait_for("iteration 2/")
        for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU, signal.SIGXCPU, signal.SIGTERM, signal.SIGTERM):
            process.send_to_all(number)
        assert process.wait(30) == 0
    assert "the run will stop" in process.stderr and "failed" not in process.stderr
    assert len(saved_checkpoints(tmp_path / "run")) == 1 and (tmp_path / "run" / "report.html").is_file()
    assert "game_failures" not in process.stderr and "Traceback" not in process.stderr


@pytest.mark.slow
def test_run_is_saved_when_its_terminal_is_closed(tmp_path):
    """The kernel sends SIGHUP, and nothing can be written to the terminal any more."""
    own, other = pty.openpty()
    with EntryProcess(arguments(tmp_path), folder=tmp_path, terminal=os.ttyname(other)) as process:
        output = b""
        while not re.search(rb"iteration ([2-9]|\d\d)", output):  # not every iteration is shown
            output += os.read(own, 10_000)
        os.close(other)
        os.close(own)
        assert process.wait(30) == 0
    assert len(saved_checkpoints(tmp_path / "run")) == 1 and (tmp_path / "run" / "report.html").is_file()
    assert "SIGHUP: the run will stop" in (tmp_path / "run" / "log" / "run.log").read_text()


@pytest.mark.slow
def test_run_ends_immediately_at_a_signal_while_models_load(tmp_path):
    output = tmp_path / "output"
    with EntryProcess(arguments(output), folder=tmp_path) as process:
        workers = []
        while not workers:  # they start in processes of their own while the models load
            assert process.wait(0.01) is None
            children = psutil.Process(process.pid).children()
            workers = [p for p in children if "priorzero.envs" in " ".join(p.cmdline())]
        process.send(signal.SIGTERM)
        assert process.wait(10) == 130
        stderr = process.stderr
    assert "SIGTERM: exiting immediately; nothing more is saved" in stderr and "Traceback" not in stderr
    assert not psutil.wait_procs(workers, timeout=2)[1]
    assert not output.exists()


# ---- crashes and errors ----


@pytest.mark.slow
def test_run_that_is_killed_is_resumed_from_its_last_intact_checkpoint(tmp_path, capfd):
    with EntryProcess(arguments(tmp_path, "--set", "run.checkpoint_every=2"), folder=tmp_path) as process:
        process.wait_for("iteration 5/")
        process.send(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    folder = tmp_path / "run"
    assert "iteration_4" in [path.name for path in saved_checkpoints(folder)]
    # The newest checkpoint is damaged, as by a faulty disk: the one before it is used, and both are named.
    newest, before = saved_checkpoints(folder)[-1], saved_checkpoints(folder)[-2]
    with (newest / "training.pt").open("r+b") as file:
        file.seek(1000)
        file.write(b"\0\0\0\0damage")
    last = read_checkpoint(before).manifest["counters"]["iteration"] + 2
    command = ["--resume", "auto", "--exp_name", "run", "--max_iter", str(last), "--set", f"run.output_dir={tmp_path}"]
    with toy_games():
        assert main(command) == 0
    stderr = capfd.readouterr().err
    assert f"{newest} cannot be used (training.pt has a wrong checksum)" in stderr
    assert f"resumed from {before.name}" in stderr
    assert newest.with_name(f"damaged_1_{newest.name}").is_dir()
    assert saved_checkpoints(folder)[-1].name == f"iteration_{last}"


def test_run_continues_an_evaluation_that_was_cancelled(tmp_path, monkeypatch):
    """A stop during the last evaluation: the resumed run makes this evaluation, once."""

    async def stopped(self, work):
        work.close()
        self._event.set()

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "run_or_cancel", stopped)
        first = run(tmp_path, NO_LLM, {"run": {"max_iter": 3}})
    manifest = read_checkpoint(first.folder / "checkpoints" / "iteration_3").manifest
    assert first.stopped and manifest["evaluation_due"]
    assert not (first.folder / "evaluations.jsonl").exists()
    for _ in range(2):  # the second time nothing is left to do
        second = resume(first.folder, NO_LLM, {"run": {"max_iter": 3}})
        assert not second.stopped and len(lines(first.folder, "evaluations.jsonl")) == 1
        assert not newest_checkpoint(first.folder).manifest["evaluation_due"]


def test_run_saves_all_collected_steps_when_an_update_fails_during_collection(tmp_path):
    """With overlap the world model learns while games are played. What these bring is stored in any case."""
    plan = FaultPlan(0, {**dict.fromkeys(RATES, 0.0), "batch poisoned": 1.0}, delay_s=0.0)
    # All three updates are made during the collection of the next iteration.
    overlap = {"overlap": "always", "update_per_collect": 3}
    with (
        pytest.MonkeyPatch.context() as patch,
        plan.inject(patch),
        pytest.raises(UserError, match=r"3 non-finite updates in a row.*: the world model's rewards are not finite"),
    ):
        run(tmp_path, NO_LLM, {"train": overlap, "run": {"checkpoint_every": 0}, "eval": {"every": 100}})
    checkpoint = newest_checkpoint(tmp_path / "run")
    state = torch.load(checkpoint.folder / "training.pt", weights_only=True)
    collector, buffer = state["collector"], state["buffer"]
    begun = sum(len(segment["records"]) for segment in collector["collected"]["segments"])
    stored = sum(len(segment["records"]) for segment in buffer["segments"]) + buffer["num_evicted"]
    steps = collector["env_steps"] + collector["collected"]["env_steps"]
    assert steps == stored + begun + sum(map(len, collector["pending"])) > 0
    assert state["loop"]["counters"]["env_step"] == collector["env_steps"]
    saved = torch.load(tmp_path / "run" / "not_finite" / "batch_1.pt", weights_only=True)
    assert saved["error"].startswith("the world model's rewards are not finite in update 0")
    assert len(saved["records"]["states"]) > 0 and saved["arrays"]["target"][0].isnan().sum() == 1
    begun_episodes = len(collector["collected"]["episodes"])
    assert len(lines(tmp_path / "run", "episodes.jsonl")) == collector["num_episodes"] - begun_episodes


def test_run_with_a_full_disk_keeps_the_last_checkpoint(whole_run, tmp_path, monkeypatch):
    folder = shutil.copytree(whole_run.folder, tmp_path / "run")
    plan = FaultPlan(0, {**dict.fromkeys(RATES, 0.0), "disk full": 1.0}, delay_s=0.0)
    message = r"the run has ended, but iteration_12 could not be written \(.*No space left.*iteration_6"
    with plan.inject(monkeypatch), pytest.raises(UserError, match=message):
        resume(folder, NO_LLM, {"run": {"max_iter": 12}})
    assert plan.counts["disk full"] == 2
    assert [path.name for path in saved_checkpoints(folder)] == ["iteration_3", "iteration_6"]


@pytest.mark.parametrize(("method", "saved"), [("log_iteration", "iteration_3"), ("log_evaluations", "iteration_6")])
def test_run_with_a_full_disk_keeps_a_checkpoint_that_agrees_with_its_files(tmp_path, monkeypatch, method, saved):
    """An iteration that cannot be logged is not saved: the resumed run repeats it. An evaluation remains due."""
    original = getattr(RunLogger, method)

    def full_disk(self, first, **values):
        if (first.iteration if method == "log_iteration" else values["env_step"] // 10) >= 5:
            raise OSError(28, "No space left on device")
        return original(self, first, **values)

    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, method, full_disk)
        with pytest.raises(UserError, match=r"cannot write .*No space left.*type --resume"):
            run(tmp_path, NO_LLM)
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint.folder.name == saved and checkpoint.manifest["evaluation_due"] == (saved == "iteration_6")
    second = resume(tmp_path / "run", NO_LLM)
    assert second.rows["iterations"] == 6 and len(lines(second.folder, "evaluations.jsonl")) == 2
    episodes = lines(second.folder, "episodes.jsonl")
    assert len(episodes) == second.rows["episodes finished"]


# ---- the command line ----


def test_resume_refuses_other_settings_and_changes_nothing(whole_run, tmp_path, capsys):
    folder = shutil.copytree(whole_run.folder, tmp_path / "run")

    def refused(*arguments):
        before = sorted(path.name for path in folder.rglob("*"))
        with toy_games():
            assert main([*arguments, "--set", f"run.output_dir={tmp_path}"]) == 2
        assert sorted(path.name for path in folder.rglob("*")) == before
        return capsys.readouterr().err

    stderr = refused("--resume", str(folder), "--env_id", "toy8", "--set", "world_model.embed_dim=128")
    assert "run.env_id is 'toy8', the checkpoint has 'toy'" in stderr
    assert "world_model.embed_dim is 128, the checkpoint has 64" in stderr
    assert "prior.enabled is True, the checkpoint has False" in refused("--resume", str(folder), "--quick_test")
    assert "there is no such folder" in refused("--resume", str(tmp_path / "nothing"))
    assert "it has no checkpoint" in refused("--resume", str(folder / "log"))
    assert "no run is saved under" in refused("--resume", "auto", "--seed", "99")
    assert "run.max_env_step=0 only evaluates" in refused("--resume", str(folder), "--set", "run.max_env_step=0")
    with lock_folder(folder):
        assert "another process is running this run" in refused("--resume", str(folder), "--max_iter", "7")
    # A later checkpoint that is damaged is not renamed either.
    newest = shutil.copytree(folder / "checkpoints" / "iteration_6", folder / "checkpoints" / "iteration_7")
    (newest / "training.pt").write_text("?")
    assert "embed_dim is 128" in refused("--resume", str(folder), "--set", "world_model.embed_dim=128")


def test_resume_without_a_saved_run_starts_a_new_one(tmp_path, capfd):
    """The same command can be given again and again, for example by a batch system."""
    unsaved = tmp_path / "run"
    unsaved.mkdir()
    (unsaved / "episodes.jsonl").write_text("{}")
    command = ["--resume", *arguments(tmp_path)]

    def run_command(*words):
        with toy_games():
            assert main(words) == 0
        return capfd.readouterr().err

    stderr = run_command(*command, "--max_iter", "2")
    assert (tmp_path / "run.unsaved1" / "episodes.jsonl").read_text() == "{}"
    assert "a new run starts" in stderr and "run.unsaved1" in stderr
    # Once the run has saved, the same command resumes it. What the flags do not give comes from the run.
    assert "resumed from iteration_2" in run_command(*command, "--max_iter", "4")
    assignments = ["--set", "llm.micro_batch_size=2", "--set", "llm.dtype=float32", "--set", "train.learning_rate=3e-4"]
    stderr = run_command("--resume", str(unsaved), "--max_iter", "5", *assignments)
    assert "resumed from iteration_4" in stderr
    state = torch.load(unsaved / "checkpoints" / "iteration_5" / "training.pt", weights_only=True)
    assert {group["lr"] for group in state["policy"]["optimizer"]["param_groups"]} == {3e-4}
