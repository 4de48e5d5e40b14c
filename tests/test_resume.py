"""Runs that are stopped and go on: as if nothing had happened, and with a message where that cannot be."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from priorzero.entry import build_parser, main, resume_from
from priorzero.play.exploration import CommandMemory
from priorzero.runs.checkpoint import (
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    remove_leftovers,
    remove_old_checkpoints,
    save_checkpoint,
    saved_checkpoints,
    set_damaged_aside,
)
from priorzero.runs.folder import claim, cut_files
from priorzero.runs.metrics import fingerprint
from priorzero.runtime.concurrency import StopRequest
from priorzero.runtime.random_state import global_random_state, set_global_random_state
from priorzero.train import run_training
from priorzero.types import GameState, HistoryStep, UserError
from priorzero.world_model.records import RecordTable, pack_arrays, read_records, unpack_arrays
from tests.helpers.faults import RATES, FaultPlan
from tests.helpers.models import make_settings, make_tiny_llm
from tests.helpers.runs import lines, read_events
from tests.helpers.segments import demo_record

SMALL = {
    "run": {"max_iter": 6, "checkpoint_every": 3, "num_threads": 1, "exp_name": "run"},
    "env": {"max_episode_steps": 8},
    "search": {"num_simulations": 4, "tries_exponent": 0.5, "explore_share": 0.5},
    "train": {"collect_env_steps": 10, "batch_size": 8, "update_per_collect": 2, "novelty_bonus": 0.1},
    "llm": {"batch_size": 2, "micro_batch_size": 1},
    "replay": {"segment_length": 5, "buffer_size": 30},
    "eval": {"every": 3},
}
PLAIN = {"prior": {"enabled": False}, "eval": {"modes": ["world_model"]}}


def settings_for(folder, *layers):
    return make_settings(SMALL, {"run": {"output_dir": str(folder)}}, *layers)


def train(folder, *layers, checkpoint=None):
    threads = torch.get_num_threads()
    try:
        return run_training(settings_for(folder, *layers), checkpoint=checkpoint)
    finally:
        torch.set_num_threads(threads)


def charts(folder):
    """All that does not depend on the clock."""
    timed = ("time/", "memory/", "prior/latency", "prior/tokens_per_s")
    return {tag: values for tag, values in read_events(folder).items() if not tag.startswith(timed)}


def learned(folder):
    """Checksums of everything that learns, and of what it learns from."""
    prints = fingerprint(torch.load(folder / "world_model.pt", weights_only=True))
    state = torch.load(folder / "training.pt", weights_only=True)
    prints |= {f"target {name}": value for name, value in fingerprint(state["policy"]["target"]).items()}
    for optimizer in ("optimizer", "llm_optimizer"):
        moments = (state["policy"][optimizer] or {"state": {}})["state"]
        prints |= {f"{optimizer} {n}": fingerprint({"m": m["exp_avg"]})["m"] for n, m in moments.items()}
    if (folder / "llm").exists():
        prints["llm"] = (folder / "llm" / "model.safetensors").read_bytes().__hash__()
    records = {name: fingerprint(packed)["values"] for name, packed in
               ((n, {"values": p["values"]}) for n, p in state["records"]["arrays"].items())}  # fmt: skip
    rngs = [state["buffer"]["rng"], state["collector"]["rngs"], state["collector"]["memories"]]
    return prints, records, state["records"]["scalars"], rngs, state["random"]["python"], state["counters"]


def equal_runs(one, other, *, at):
    assert lines(one, "episodes.jsonl") == lines(other, "episodes.jsonl")
    assert charts(one) == charts(other)
    assert learned(one / "checkpoints" / at) == learned(other / "checkpoints" / at)


@pytest.mark.slow
@pytest.mark.parametrize("with_llm", [False, True])
def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path, with_llm):
    """n iterations, then n more in a fresh state, against 2n at once: the same to the last bit."""
    n = 2 if with_llm else 3
    layers = [] if with_llm else [PLAIN]
    layers.append({"eval": {"modes": ["world_model"], "every": n}})
    layers.append({"run": {"max_iter": 2 * n, "checkpoint_every": n}, "llm": {"update_every": 1}})
    whole = train(tmp_path / "whole", *layers)
    first = train(tmp_path / "parts", *layers, {"run": {"max_iter": n}})
    # Between the two everything that is global is disturbed.
    np.random.seed(5)
    torch.manual_seed(5)
    second = train(tmp_path / "parts", *layers, checkpoint=newest_checkpoint(first.folder))
    assert second.folder == first.folder and second.rows["iterations"] == whole.rows["iterations"] == 2 * n
    assert second.rows["environment steps"] == whole.rows["environment steps"] >= 20 * n
    assert not with_llm or whole.rows["LLM updates"] > first.rows["LLM updates"] > 0
    equal_runs(whole.folder, second.folder, at=f"iteration_{2 * n}")
    assert whole.metrics.keys() == second.metrics.keys() and not whole.stopped


@pytest.mark.slow
def test_what_came_after_the_checkpoint_is_done_again(tmp_path):
    """As after a crash: the files know more than the last checkpoint does."""
    whole = train(tmp_path / "whole", PLAIN)
    crashed = train(tmp_path / "crashed", PLAIN)
    shutil.rmtree(crashed.folder / "checkpoints" / "iteration_6")
    train(tmp_path / "crashed", PLAIN, checkpoint=newest_checkpoint(crashed.folder))
    equal_runs(whole.folder, crashed.folder, at="iteration_6")
    assert lines(whole.folder, "evaluations.jsonl") == lines(crashed.folder, "evaluations.jsonl")


def start(tmp_path, *more):
    arguments = ["--quick_test", "--max_iter", "100000", "--exp_name", "cut", "--set", f"run.output_dir={tmp_path}"]
    for assignment in ("prior.enabled=false", "eval.modes=world_model", "run.num_threads=1", *more):
        arguments += ["--set", assignment]
    command = [sys.executable, "-m", "priorzero.entry", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def read_until(process, words):
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"{words!r} was never said")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_which_goes_on_later(tmp_path, number, capfd):
    with start(tmp_path) as process:
        read_until(process, "iteration 4/")
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == 0, rest
    assert "Traceback" not in rest and f"--resume {tmp_path / 'cut'}" in rest
    (folder,) = saved_checkpoints(tmp_path / "cut")
    counters = read_checkpoint(folder).manifest["counters"]
    assert counters["iteration"] >= 4 and counters["train_iter"] > 0
    iterations = counters["iteration"] + 2
    more = ["--max_iter", str(iterations), "--set", "llm.micro_batch_size=1"]
    assert main(["--resume", str(tmp_path / "cut"), *more]) == 0
    said = capfd.readouterr().err
    assert f"goes on from {folder.name}" in said and f"iteration {iterations}/{iterations}" in said
    assert main(["--resume", str(tmp_path / "cut"), *more]) == 0
    assert f"already at its end: iteration {iterations} of run.max_iter={iterations}" in capfd.readouterr().err
    found = lines(tmp_path / "cut", "episodes.jsonl")
    assert [line["env_step"] for line in found] == sorted({line["env_step"] for line in found})


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(tmp_path):
    # Thousands of updates an iteration: the step would take minutes to finish.
    short = ("env.max_episode_steps=5", "train.batch_size=4", "replay.segment_length=5")  # it learns from the beginning
    with start(tmp_path, "train.update_per_collect=5000", *short) as process:
        read_until(process, "settings that differ")
        time.sleep(15)
        process.send_signal(signal.SIGTERM)
        read_until(process, "SIGTERM: the run will stop")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(10)
    assert process.returncode == 130 and time.monotonic() - began < 5
    assert not saved_checkpoints(tmp_path / "cut")


@pytest.mark.slow
def test_a_signal_while_models_load_ends_all_at_once(tmp_path):
    with start(tmp_path) as process:
        games = []
        while not games:  # they load in processes of their own, beside the models
            assert process.poll() is None
            games = [p for p in psutil.Process(process.pid).children() if "priorzero.envs" in " ".join(p.cmdline())]
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        process.wait(10)
    assert process.returncode == 130
    assert "SIGTERM: exiting immediately; nothing more is saved" in said and "Traceback" not in said
    psutil.wait_procs(games, timeout=2)
    assert not [p for p in games if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(tmp_path, capfd):
    with start(tmp_path, "run.checkpoint_every=2") as process:
        read_until(process, "iteration 5/")
        process.kill()
    folder = tmp_path / "cut"
    assert [path.name for path in saved_checkpoints(folder)][:2] == ["iteration_2", "iteration_4"]
    # The newest is damaged, as by a disk that lied: the one before it is used, and both are named.
    newest = saved_checkpoints(folder)[-1]
    with (newest / "training.pt").open("r+b") as file:
        file.seek(1000)
        file.write(b"\0\0\0\0damage")
    before = saved_checkpoints(folder)[-2]
    command = ["--resume", "auto", "--exp_name", "cut", "--max_iter", "6", "--set", f"run.output_dir={tmp_path}"]
    assert main(command) == 0
    said = capfd.readouterr().err
    assert f"{newest} is damaged (training.pt is not what was written)" in said
    assert f"goes on from {before.name}" in said
    assert newest.with_name(f"damaged_1_{newest.name}").is_dir()
    assert [path.name for path in saved_checkpoints(folder)][-1] == "iteration_6"


@pytest.mark.slow
def test_what_differs_is_said(tmp_path, capsys):
    run = train(tmp_path, PLAIN, {"run": {"max_iter": 1}})
    here = ["--set", f"run.output_dir={tmp_path}"]

    def refused(*arguments):
        before = sorted(path.name for path in run.folder.rglob("*"))
        assert main([*arguments, *here]) == 2
        assert sorted(path.name for path in run.folder.rglob("*")) == before
        return capsys.readouterr().err

    folder = str(run.folder)
    said = refused("--resume", folder, "--env_id", "textworld:simple?seed=8", "--set", "world_model.embed_dim=64")
    assert "run.env_id is 'textworld:simple?seed=8', the checkpoint's is 'textworld:simple?seed=7'" in said
    assert "world_model.embed_dim is 64, the checkpoint's is 128" in said
    assert "prior.enabled is True, the checkpoint's is False" in refused("--resume", folder, "--quick_test")
    assert "there is no such folder" in refused("--resume", str(tmp_path / "nothing"))
    assert "it holds no checkpoint" in refused("--resume", str(run.folder / "log"))
    assert "no run is saved under" in refused("--resume", "auto", "--seed", "99")
    with claim(run.folder):
        assert "another process is running this run" in refused("--resume", folder, "--max_iter", "2")
    # A damaged checkpoint behind it stays where it is as well.
    newest = shutil.copytree(run.folder / "checkpoints" / "iteration_1", run.folder / "checkpoints" / "iteration_2")
    (newest / "training.pt").write_text("?")
    assert "embed_dim is 64" in refused("--resume", folder, "--set", "world_model.embed_dim=64")


def write_checkpoint(folder, **about):
    def write(aside):
        for name in ("training.pt", "world_model.pt", "actions.json"):
            (aside / name).write_text("x" * 100)
        (aside / "config.yaml").write_text("run: {env_id: zork1.z5, seed: 3}")

    return save_checkpoint(folder, write=write, about=about)


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    folder = write_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_2", counters={"iteration": 2})
    assert read_checkpoint(folder).manifest["counters"] == {"iteration": 2}
    assert read_checkpoint(folder).settings.run.seed == 3

    def write(aside):
        (aside / "training.pt").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(folder.with_name("iteration_4"), write=write, about={})
    assert [path.name for path in folder.parent.iterdir()] == ["iteration_2"]


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """And its name, and those of the folders that it is in, are before it is relied on."""
    synced, rename = [], Path.rename

    def fsync(descriptor):
        synced.append(str(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path.resolve())))

    def rename_and_note(path, target):
        synced.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename_and_note)
    write_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_2")
    at = synced.index("renamed")
    aside = min(synced[:at], key=len)
    names = ["", "/actions.json", "/config.yaml", "/manifest.json", "/training.pt", "/world_model.pt"]
    assert sorted(synced[:at]) == [aside + name for name in names]
    assert synced[at + 1 :] == ["run/checkpoints", "run"]


def test_a_checkpoint_that_is_written_again_is_never_away(tmp_path, monkeypatch):
    checkpoints = tmp_path / "checkpoints"
    for phase in ("evaluate", "collect"):
        write_checkpoint(checkpoints / "iteration_2", phase=phase)
    assert newest_checkpoint(tmp_path).manifest["phase"] == "collect"
    assert [path.name for path in checkpoints.iterdir()] == ["iteration_2"]
    rename = Path.rename

    def rename_or_end(path, target):
        if path.name.startswith("."):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_or_end)
        with pytest.raises(OSError, match="Input/output"):
            write_checkpoint(checkpoints / "iteration_2", phase="next")
    assert newest_checkpoint(tmp_path).manifest["phase"] == "collect"
    remove_leftovers(tmp_path)
    assert newest_checkpoint(tmp_path).folder.name == "iteration_2~"
    write_checkpoint(checkpoints / "iteration_2", phase="next")
    assert newest_checkpoint(tmp_path).manifest["phase"] == "next"
    assert [path.name for path in checkpoints.iterdir()] == ["iteration_2"]
    # Killed before the old one was removed: the new one counts.
    shutil.copytree(checkpoints / "iteration_2", checkpoints / "iteration_2~")
    assert newest_checkpoint(tmp_path).folder.name == "iteration_2"
    remove_leftovers(tmp_path)
    assert [path.name for path in checkpoints.iterdir()] == ["iteration_2"]


@pytest.mark.parametrize("flag", [None, "false", "true"])
def test_a_checkpoint_cannot_bring_code(tmp_path, flag):
    """Not by its configuration either: whoever goes on with it says that the model's own code may run."""

    def write(aside):
        for name in ("training.pt", "world_model.pt", "actions.json"):
            (aside / name).write_text("x")
        (aside / "config.yaml").write_text("run: {env_id: zork1.z5}\nllm: {trust_remote_code: true, path: their/model}")

    save_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_2", write=write, about={})
    flags = [] if flag is None else ["--set", f"llm.trust_remote_code={flag}"]
    arguments = build_parser().parse_args(["--resume", str(tmp_path / "run"), *flags])
    if flag is None:
        with pytest.raises(UserError, match=r"runs code that comes with a model \(their/model\)"):
            resume_from(arguments)
    else:
        assert resume_from(arguments)[0].llm.trust_remote_code == (flag == "true")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "training.pt").unlink(), "training.pt is missing"),
        (lambda folder: (folder / "world_model.pt").write_text("x" * 99), "world_model.pt is not what was written"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 1, '), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda folder: edit(folder, format=0), "its format is 0, this version reads"),
        (lambda folder: edit(folder, files={}), "training.pt is missing"),
        (lambda folder: edit(folder, files={"../../../secret": "0"}), "a file outside of it"),
    ],
)
def test_damage_is_seen(tmp_path, damage, words):
    (tmp_path / "secret").write_text("not ours")
    run = tmp_path / "run"
    sound = write_checkpoint(run / "checkpoints" / "iteration_2")
    folder = write_checkpoint(run / "checkpoints" / "iteration_4")
    damage(folder)
    with pytest.raises(ValueError, match=words):
        read_checkpoint(folder)
    checkpoint = newest_checkpoint(run)
    assert checkpoint.folder == sound and checkpoint.damaged == saved_checkpoints(run)[1:]
    damage(sound)
    with pytest.raises(UserError, match=rf"all 2 checkpoints are damaged \(the newest: .*{words}"):
        newest_checkpoint(run)


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_which_run_goes_on(tmp_path):
    def find(where="auto", exp_name="", **wanted):
        found = find_checkpoint(where, output_dir=str(tmp_path), exp_name=exp_name, wanted=wanted)
        return None if found is None else str(found.folder.relative_to(tmp_path))

    assert find() is None
    for name, n in (("a", 2), ("a", 10), ("b", 4)):
        write_checkpoint(tmp_path / name / "checkpoints" / f"iteration_{n}")
    newest = tmp_path / "a" / "checkpoints" / "iteration_10"
    os.utime(newest / "manifest.json", (2e9, 2e9))
    assert find() == "a/checkpoints/iteration_10"  # saved last, and 10 comes after 2
    assert find(exp_name="b") == "b/checkpoints/iteration_4" and find(exp_name="c") is None
    assert find(env_id="zork1.z5", seed=3) == "a/checkpoints/iteration_10"
    assert find(env_id="detective.z5") is None and find(seed=4) is None
    assert find(str(tmp_path / "b")) == "b/checkpoints/iteration_4"
    assert find(str(newest)) == "a/checkpoints/iteration_10"
    with pytest.raises(UserError, match="the run went on to iteration_10"):
        find(str(newest.with_name("iteration_2")))


@given(st.lists(st.one_of(st.none(), st.lists(st.integers(-(2**40), 2**40), max_size=5)), max_size=6))
def test_arrays_come_back(rows):
    arrays = [None if row is None else np.array(row, dtype=np.int64) for row in rows]
    again = unpack_arrays(pack_arrays(arrays))
    assert [None if a is None else a.tolist() for a in again] == rows
    assert all(a is None or len(a) == 0 or a.dtype == np.int64 for a in again)


def test_records_come_back_once_each(tmp_path):
    records = [demo_record(t, episode=3, done=t == 6) for t in range(7)]
    table = RecordTable()
    numbers = [table.number(record) for record in [*records, *records[2:5]]]
    assert numbers == [0, 1, 2, 3, 4, 5, 6, 2, 3, 4]
    torch.save(table.state_dict(), tmp_path / "records.pt")
    again = read_records(torch.load(tmp_path / "records.pt", weights_only=True))
    for old, new in zip(records, again, strict=True):
        assert (old.state, old.prompt, old.reward, old.done) == (new.state, new.prompt, new.reward, new.done)
        assert (old.episode, old.step, old.chosen, old.shaping) == (new.episode, new.step, new.chosen, new.shaping)
        assert (old.root_value, old.predicted_value) == (new.root_value, new.predicted_value)
        for name in ("features", "action_indices", "visit_counts"):
            a, b = getattr(old, name), getattr(new, name)
            assert a.dtype == b.dtype and np.array_equal(a, b)
        assert (old.prior is None) == (new.prior is None)
        if old.prior is not None:
            assert np.array_equal(old.prior.logprobs, new.prior.logprobs) and old.prior.source == new.prior.source


def test_random_numbers_come_back(tmp_path):
    import random

    def draw():
        return random.random(), np.random.rand(3).tolist(), np.random.randn(), torch.rand(3).tolist()

    np.random.randn()  # leaves half of a pair behind
    rng = np.random.default_rng(7)
    torch.save({"global": global_random_state(), "own": rng.bit_generator.state}, tmp_path / "random.pt")
    first, own = draw(), rng.random(5).tolist()
    draw()
    state = torch.load(tmp_path / "random.pt", weights_only=True)
    set_global_random_state(state["global"])
    rng.bit_generator.state = state["own"]
    assert draw() == first and rng.random(5).tolist() == own


def test_exploration_comes_back(tmp_path):
    memory = CommandMemory(return_first=True)
    for command in ("go", "go", "wait"):
        memory.add(("Room", 1.0), command)
    after = GameState(feedback="Gone.", valid_actions=("wait",), score=2.0, max_score=9.0, moves=1)
    memory.earned([HistoryStep("", "go", 1.0, ("Room",), ("Room", 1.0))], now=after)
    memory.add_answer("Taken.")
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    again = CommandMemory(return_first=True)
    again.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    assert again.tries(("Room", 1.0), ["go", "wait", "up"]).tolist() == [2, 1, 0]
    here = GameState(feedback="Room", valid_actions=("wait", "go"), score=1.0, max_score=9.0, moves=1)
    assert again.way_on(here)[0].tolist() == [False, True]
    assert again.num_leading == 1 and again.add(("Room", 1.0), "go") == 3
    assert again.add_answer("Taken.") == 2 and again.add_answer("Dropped.") == 1


def test_files_are_cut_to_what_the_checkpoint_knew(tmp_path):
    for name in (
        "episodes.jsonl",
        "evaluations.jsonl",
        "events.out.tfevents.1.a",
        "events.out.tfevents.2.a",
        "notes.jsonl",
    ):
        (tmp_path / name).write_text("12345")
    cut_files(tmp_path, {"episodes.jsonl": 3, "events.out.tfevents.1.a": 5, "gone.jsonl": 4})
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == {"episodes.jsonl": "123", "events.out.tfevents.1.a": "12345", "notes.jsonl": "12345"}


def test_one_process_a_run(tmp_path):
    with claim(tmp_path), pytest.raises(UserError, match="another process"):
        claim(tmp_path)
    claim(tmp_path).close()


def test_work_ends_when_the_wish_comes():
    ended = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def answer():
        return 7

    async def fails():
        raise ValueError("ours")

    async def check():
        stop = StopRequest()
        assert await stop.run_or_cancel(answer()) == 7
        with pytest.raises(ValueError, match="ours"):
            await stop.run_or_cancel(fails())
        asyncio.get_running_loop().call_later(0.01, stop.request, "test")
        assert await stop.run_or_cancel(work()) is None and ended == [True] and stop.requested

    asyncio.run(check())


def test_the_name_of_a_run_cannot_lead_out_of_its_folder(tmp_path):
    write_checkpoint(tmp_path / "secret" / "checkpoints" / "iteration_1")
    (tmp_path / "data").mkdir()
    assert find_checkpoint("auto", output_dir=str(tmp_path / "data"), exp_name="../secret", wanted={}) is None


def test_a_checkpoint_that_is_damaged_twice(tmp_path):
    for _ in range(2):
        for n in (2, 4):
            folder = tmp_path / "checkpoints" / f"iteration_{n}"
            if not folder.exists():
                write_checkpoint(folder)
        (folder / "training.pt").write_text("?")
        checkpoint = newest_checkpoint(tmp_path)
        assert checkpoint.folder.name == "iteration_2" and "iteration_4 is damaged" in checkpoint.notes[0]
        assert folder.is_dir()  # until it is sure that the run goes on
        set_damaged_aside(checkpoint)
    names = sorted(path.name for path in folder.parent.iterdir())
    assert names == ["damaged_1_iteration_4", "damaged_2_iteration_4", "iteration_2"]


def test_a_damaged_configuration_does_not_hide_a_run(tmp_path):
    for n in (2, 4):
        folder = write_checkpoint(tmp_path / "a" / "checkpoints" / f"iteration_{n}")
    (folder / "config.yaml").write_text("run: [")
    found = find_checkpoint("auto", output_dir=str(tmp_path), exp_name="", wanted={"seed": 3})
    assert found.folder.name == "iteration_2"


def test_the_last_checkpoints_are_kept_and_what_was_left_half_done_is_removed(tmp_path):
    for n in (1, 2, 10, 20):
        write_checkpoint(tmp_path / "checkpoints" / f"iteration_{n}")
    (tmp_path / "checkpoints" / ".iteration_30-x").mkdir()
    remove_old_checkpoints(tmp_path, keep=0)
    assert len(saved_checkpoints(tmp_path)) == 4
    remove_old_checkpoints(tmp_path, keep=2)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["iteration_10", "iteration_20"]
    remove_old_checkpoints(tmp_path, keep=5)
    assert len(saved_checkpoints(tmp_path)) == 2


def test_a_disk_that_is_really_full_is_an_os_error(tmp_path, smollm2):
    """The parameters' writer has errors of its own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        with pytest.raises(OSError, match=r"(?i)too large|serializing"):
            make_tiny_llm(smollm2.tokenizer).save(tmp_path / "llm")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.slow
def test_a_run_that_ended_before_it_saved_makes_room_for_a_new_one(tmp_path, capfd):
    """The command that a batch system starts again and again."""
    left = tmp_path / "job"
    left.mkdir()
    (left / "episodes.jsonl").write_text("{}")
    command = [
        "--quick_test",
        "--max_iter",
        "2",
        "--resume",
        "--exp_name",
        "job",
        "--set",
        f"run.output_dir={tmp_path}",
    ]
    for assignment in ("prior.enabled=false", "eval.modes=world_model", "eval.every=2"):
        command += ["--set", assignment]
    assert main(command) == 0
    assert (tmp_path / "job.unsaved1" / "episodes.jsonl").read_text() == "{}"
    said = capfd.readouterr().err
    assert "a new run begins" in said and "job.unsaved1" in said
    # Once it has saved, the same command goes on; what its flags leave open is the run's own.
    folder, assignments = str(left), ["--set", "llm.micro_batch_size=4", "--set", "train.learning_rate=3e-4"]
    assert main([*command[:2], "4", *command[3:]]) == 0
    assert "goes on from iteration_2" in capfd.readouterr().err
    assert main(["--resume", folder, "--max_iter", "5", "--set", "prior.enabled=false", *assignments]) == 0
    assert "goes on from iteration_4" in capfd.readouterr().err
    state = torch.load(left / "checkpoints" / "iteration_5" / "training.pt", weights_only=True)
    assert {group["lr"] for group in state["policy"]["optimizer"]["param_groups"]} == {3e-4}
    assert main(["--resume", folder, "--set", "run.max_env_step=0"]) == 2
    assert "evaluates and trains nothing" in capfd.readouterr().err


@pytest.mark.slow
def test_an_evaluation_that_was_cut_is_made_later_and_once(tmp_path, monkeypatch):
    """A stop during the last evaluation; then the run goes on with just that."""

    async def cut(self, work):
        work.close()
        self._event.set()

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "run_or_cancel", cut)
        first = train(tmp_path, PLAIN, {"run": {"max_iter": 3}})
    assert (
        first.stopped and read_checkpoint(first.folder / "checkpoints" / "iteration_3").manifest["phase"] == "evaluate"
    )
    assert not (first.folder / "evaluations.jsonl").exists()
    for _ in range(2):  # the second time there is nothing left to do
        second = train(tmp_path, PLAIN, {"run": {"max_iter": 3}}, checkpoint=newest_checkpoint(first.folder))
        assert not second.stopped and len(lines(first.folder, "evaluations.jsonl")) == 1
        assert newest_checkpoint(first.folder).manifest["phase"] == "collect"


@pytest.mark.slow
def test_an_error_beside_collection_loses_nothing_of_it(tmp_path):
    """With overlap the world model learns while games are played; what these bring is stored whatever becomes of it."""
    plan = FaultPlan(0, {**dict.fromkeys(RATES, 0.0), "batch poisoned": 1.0}, delay_s=0.0)
    with (
        pytest.MonkeyPatch.context() as patch,
        plan.inject(patch),
        pytest.raises(UserError, match="3 updates in a row"),
    ):
        overlap = {
            "overlap": "always",
            "update_per_collect": 3,
        }  # all three in one iteration, beside the next one's games
        train(tmp_path, PLAIN, {"train": overlap, "run": {"checkpoint_every": 0}, "eval": {"every": 100}})
    checkpoint = newest_checkpoint(tmp_path / "run")
    state = torch.load(checkpoint.folder / "training.pt", weights_only=True)
    collector, buffer = state["collector"], state["buffer"]
    begun = sum(len(segment["records"]) for segment in collector["collected"]["segments"])
    stored = sum(len(segment["records"]) for segment in buffer["segments"]) + buffer["num_evicted"]
    steps = collector["env_steps"] + collector["collected"]["env_steps"]
    assert steps == stored + begun + sum(map(len, collector["pending"])) > 0
    assert state["counters"]["env_step"] == collector["env_steps"]
    begun_episodes = len(collector["collected"]["episodes"])
    assert len(lines(tmp_path / "run", "episodes.jsonl")) == collector["num_episodes"] - begun_episodes
