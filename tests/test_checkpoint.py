"""Checkpoints: written atomically, verified when read; which one ``--resume`` finds."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from priorzero.entry import build_parser, resume_from
from priorzero.envs import GameSpec
from priorzero.preflight import prepare
from priorzero.runs.checkpoint import (
    FORMAT,
    read_checkpoint,
    read_state,
    remove_leftovers,
    remove_old_checkpoints,
    save_checkpoint,
    save_tensors,
    saved_checkpoints,
)
from priorzero.runs.resume import check_games, check_same_settings, find_checkpoint, newest_checkpoint, rename_damaged
from priorzero.runtime.random_state import global_random_state, set_global_random_state
from priorzero.types import UserError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.models import make_settings, make_tiny_llm

# ---- writing ----


def test_checkpoint_is_complete_or_not_there(tmp_path):
    folder = write_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_2", counters={"iteration": 2})
    assert read_checkpoint(folder).manifest["counters"] == {"iteration": 2}
    assert read_checkpoint(folder).settings.run.seed == 3

    def write(temporary):
        (temporary / "training.pt").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(folder.with_name("iteration_4"), write=write, about={})
    assert [path.name for path in folder.parent.iterdir()] == ["iteration_2"]


def test_checkpoint_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """So are its new name and the folders that contain it before the function returns."""
    synced, rename = [], Path.rename

    def fsync(descriptor):
        synced.append(str(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path.resolve())))

    def logged_rename(path, target):
        synced.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    write_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_2")
    at = synced.index("renamed")
    temporary = min(synced[:at], key=len)
    names = ["", "/actions.json", "/config.yaml", "/manifest.json", "/training.pt", "/world_model.pt"]
    assert sorted(synced[:at]) == [temporary + name for name in names]
    assert synced[at + 1 :] == ["run/checkpoints", "run"]


def test_checkpoint_that_is_replaced_never_disappears(tmp_path, monkeypatch):
    checkpoints = tmp_path / "checkpoints"
    for version in (1, 2):
        write_checkpoint(checkpoints / "iteration_2", version=version)
    assert newest_checkpoint(tmp_path).manifest["version"] == 2
    assert [path.name for path in checkpoints.iterdir()] == ["iteration_2"]
    rename = Path.rename

    def failing_rename(path, target):
        if path.name.startswith("."):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing_rename)
        with pytest.raises(OSError, match="Input/output"):
            write_checkpoint(checkpoints / "iteration_2", version=3)
    assert newest_checkpoint(tmp_path).manifest["version"] == 2
    remove_leftovers(tmp_path)
    assert newest_checkpoint(tmp_path).folder.name == "iteration_2~"
    write_checkpoint(checkpoints / "iteration_2", version=3)
    assert newest_checkpoint(tmp_path).manifest["version"] == 3
    assert [path.name for path in checkpoints.iterdir()] == ["iteration_2"]
    # If the process is killed before the old version is removed, the new one counts.
    shutil.copytree(checkpoints / "iteration_2", checkpoints / "iteration_2~")
    assert newest_checkpoint(tmp_path).folder.name == "iteration_2"
    remove_leftovers(tmp_path)
    assert [path.name for path in checkpoints.iterdir()] == ["iteration_2"]


def test_checkpoint_writers_raise_os_errors_on_a_full_disk(tmp_path):
    """torch and safetensors raise errors of other types."""
    from priorzero.llm.models import load_tokenizer

    llm = make_tiny_llm(load_tokenizer(make_settings().llm))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        with pytest.raises(OSError, match=r"Errno 27\] File too large: .*llm"):
            llm.save(tmp_path / "llm")
        with pytest.raises(OSError, match=r"File too large: .*tensors\.pt"):
            save_tensors(torch.zeros(1_000_000), tmp_path / "tensors.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


# ---- reading ----


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def move_and_link(path):
    """Move a file out of the run, and leave a link to it."""
    moved = path.rename(path.parents[3] / f"{path.parent.name}-{path.name}")
    path.symlink_to(moved)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "training.pt").unlink(), "training.pt is missing"),
        (lambda folder: (folder / "world_model.pt").write_text("x" * 99), "world_model.pt has a wrong checksum"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 1, '), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda folder: edit_manifest(folder, files={}), "training.pt is missing"),
        (lambda folder: edit_manifest(folder, files={"../../../secret": "0"}), "a file outside of the folder"),
        (
            lambda folder: move_and_link(folder / "world_model.pt"),
            "a link to a file outside of the folder: world",
        ),
        (lambda folder: (folder / "llm").symlink_to(folder.parent), "a link to a file outside of the folder: llm"),
    ],
)
def test_checkpoint_damage_is_detected(tmp_path, damage, words):
    (tmp_path / "secret").write_text("not part of the checkpoint")
    run = tmp_path / "run"
    intact = write_checkpoint(run / "checkpoints" / "iteration_2")
    folder = write_checkpoint(run / "checkpoints" / "iteration_4")
    damage(folder)
    with pytest.raises(ValueError, match=words):
        read_checkpoint(folder)
    checkpoint = newest_checkpoint(run)
    assert checkpoint.folder == intact and checkpoint.damaged == saved_checkpoints(run)[1:]
    damage(intact)
    with pytest.raises(UserError, match=rf"none of its 2 checkpoints can be used \(the newest: .*{words}"):
        newest_checkpoint(run)
    if "training.pt" not in words:
        with pytest.raises(UserError, match=f"is damaged .*{words if 'manifest' not in words else ''}"):
            read_state(folder, "training.pt")


@pytest.mark.parametrize("number", [0, FORMAT - 1, FORMAT + 1])
def test_checkpoint_of_another_format_is_refused(tmp_path, number):
    run = tmp_path / "run"
    # Its settings may be unknown to this version, too; the format is what the user needs to know.
    folder = write_checkpoint(run / "checkpoints" / "iteration_2", config="search: {tree: lightzero}", format=number)
    with pytest.raises(UserError) as caught:
        newest_checkpoint(run)
    assert str(caught.value) == (
        f"--resume {run}: none of its 1 checkpoints can be used (the newest: its format is {number}, this version of "
        f"priorzero reads format {FORMAT}); start a new run instead"
    )
    with pytest.raises(UserError, match=f"{folder}: .*its format is {number}"):
        read_state(folder, "training.pt")


def test_checkpoint_with_a_damaged_configuration_does_not_hide_its_run(tmp_path):
    for n in (2, 4):
        folder = write_checkpoint(tmp_path / "a" / "checkpoints" / f"iteration_{n}")
    (folder / "config.yaml").write_text("run: [")
    found = find_checkpoint("auto", output_dir=str(tmp_path), exp_name="", wanted={"seed": 3})
    assert found.folder.name == "iteration_2"


def test_rename_damaged_finds_a_free_name(tmp_path):
    for _ in range(2):
        for n in (2, 4):
            folder = tmp_path / "checkpoints" / f"iteration_{n}"
            if not folder.exists():
                write_checkpoint(folder)
        (folder / "training.pt").write_text("?")
        checkpoint = newest_checkpoint(tmp_path)
        assert checkpoint.folder.name == "iteration_2" and "iteration_4 cannot be used" in checkpoint.notes[0]
        assert folder.is_dir()  # until it is certain that the run is resumed
        rename_damaged(checkpoint)
    names = sorted(path.name for path in folder.parent.iterdir())
    assert names == ["damaged_1_iteration_4", "damaged_2_iteration_4", "iteration_2"]


@pytest.mark.parametrize("flag", [None, "false", "true"])
def test_checkpoint_cannot_bring_code(tmp_path, flag):
    """Its configuration cannot either, unless the user allows the model's own code."""
    config = "run: {env_id: zork1.z5}\nllm: {trust_remote_code: true, path: their/model}"
    write_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_2", config=config)
    flags = [] if flag is None else ["--set", f"llm.trust_remote_code={flag}"]
    arguments = build_parser().parse_args(["--resume", str(tmp_path / "run"), *flags])
    if flag is None:
        with pytest.raises(UserError, match=r"runs code that comes with a model \(their/model\)"):
            resume_from(arguments)
    else:
        assert resume_from(arguments)[0].llm.trust_remote_code == (flag == "true")


# ---- finding ----


def test_find_checkpoint_selects_a_run(tmp_path):
    def find(where="auto", exp_name="", **wanted):
        found = find_checkpoint(where, output_dir=str(tmp_path), exp_name=exp_name, wanted=wanted)
        return None if found is None else str(found.folder.relative_to(tmp_path))

    assert find() is None
    for name, n in (("a", 2), ("a", 10), ("b", 4)):
        write_checkpoint(tmp_path / name / "checkpoints" / f"iteration_{n}")
    newest = tmp_path / "a" / "checkpoints" / "iteration_10"
    os.utime(newest / "manifest.json", (2e9, 2e9))
    assert find() == "a/checkpoints/iteration_10"  # saved last, and 10 is later than 2
    assert find(exp_name="b") == "b/checkpoints/iteration_4" and find(exp_name="c") is None
    assert find(env_id="zork1.z5", seed=3) == "a/checkpoints/iteration_10"
    assert find(env_id="detective.z5") is None and find(seed=4) is None
    assert find(str(tmp_path / "b")) == "b/checkpoints/iteration_4"
    assert find(str(newest)) == "a/checkpoints/iteration_10"
    with pytest.raises(UserError, match="the run has a later checkpoint, iteration_10"):
        find(str(newest.with_name("iteration_2")))


def test_find_checkpoint_stays_below_the_output_folder(tmp_path):
    write_checkpoint(tmp_path / "secret" / "checkpoints" / "iteration_1")
    (tmp_path / "data").mkdir()
    assert find_checkpoint("auto", output_dir=str(tmp_path / "data"), exp_name="../secret", wanted={}) is None


def test_resume_from_lets_flags_win_over_the_settings_of_the_run(tmp_path):
    config = "run: {env_id: zork1.z5, seed: 3}\nllm: {batch_size: 16, micro_batch_size: 8}"
    write_checkpoint(tmp_path / "a" / "checkpoints" / "iteration_1", config=config)

    def resumed(*arguments):
        parsed = build_parser().parse_args(["--resume", str(tmp_path / "a"), *arguments])
        return resume_from(parsed)[0]

    assert (resumed().run.seed, resumed().llm.micro_batch_size) == (3, 8)
    assert resumed("--set", "llm.micro_batch_size=4").llm.micro_batch_size == 4
    assert resumed("--set", "llm.gradient_accumulation_steps=8").llm.micro_batch_size == 2
    # A preset or a file gives all settings.
    assert resumed("--preset", "standard").llm.batch_size == 32 and resumed("--quick_test").llm.batch_size == 8


@pytest.mark.parametrize("flags", [["--exp_name", "b"], ["--set", "run.output_dir=elsewhere"]])
def test_resume_from_refuses_another_folder_than_that_of_the_run(tmp_path, flags):
    write_checkpoint(tmp_path / "a" / "checkpoints" / "iteration_1")

    def resume(*arguments):
        return resume_from(build_parser().parse_args(["--resume", str(tmp_path / "a"), *arguments]))[1]

    same = resume("--exp_name", "a", "--set", f"run.output_dir={tmp_path}")
    assert same.run_folder == tmp_path / "a"
    with pytest.raises(
        UserError, match=r"continues the run in this folder, but run\.(exp_name=b|output_dir=elsewhere)"
    ):
        resume(*flags)


def test_newest_checkpoint_explains_a_run_on_a_cluster(tmp_path):
    def write(folder):
        (folder / "llm").mkdir()
        (folder / "llm" / "config.json").write_text("{}")
        (folder / "world_model.pt").write_text("x")

    folder = save_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_1", write=write, about={})
    with pytest.raises(UserError, match=rf"a Ray cluster, which cannot be resumed; .* --set llm\.path={folder}/llm"):
        newest_checkpoint(tmp_path / "run")


def test_check_games_reports_changed_games_and_packages(tmp_path):
    games = [GameSpec("zork1.z5", "jericho", tmp_path, "abc", "zork1")]
    folder = write_checkpoint(tmp_path / "a" / "checkpoints" / "iteration_1", games={"zork1": "abc"})
    checkpoint = read_checkpoint(folder)
    check_games(checkpoint, games)
    assert checkpoint.notes == []
    checkpoint.manifest["versions"]["torch"] = "1.0"
    check_games(checkpoint, games)
    assert "torch 1.0 to" in checkpoint.notes[0] and "results may differ slightly" in checkpoint.notes[0]
    checkpoint.manifest["games"]["zork1"] = "other"
    with pytest.raises(
        UserError, match=r"the game files are \{'zork1': 'abc'\}, the checkpoint has \{'zork1': 'other'\}"
    ):
        check_games(checkpoint, games)


def test_check_same_settings_refuses_another_adapter(tmp_path):
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "checkpoints" / "iteration_1", games={"zork1": "abc"}))
    settings = checkpoint.settings.model_copy(deep=True)
    settings.llm.adapter = "other"
    with pytest.raises(UserError, match=r"llm\.adapter is 'other', the checkpoint has ''"):
        check_same_settings(checkpoint, settings)


def test_changed_settings_of_a_resumed_run_are_reported_before_other_errors(tmp_path):
    """The advice about a missing model would be to change a setting that the run must keep."""
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_1", games={}))
    settings = checkpoint.settings.model_copy(deep=True)
    settings.llm.path = "./nowhere"
    with pytest.raises(UserError, match=r"llm\.path is './nowhere', the checkpoint has"):
        prepare(settings, checkpoint=checkpoint).__enter__()


def test_check_same_settings_refuses_a_checkpoint_of_another_run(tmp_path):
    folder = write_checkpoint(tmp_path / "a" / "checkpoints" / "iteration_1", games={"zork1": "abc"})
    games, config = [GameSpec("zork1.z5", "jericho", tmp_path, "abc", "zork1")], tmp_path / "a" / "config.yaml"
    checkpoint = read_checkpoint(folder)
    config.write_text("run: {env_id: zork1.z5, seed: 4, max_iter: 7}")
    with pytest.raises(UserError, match=r"its settings are not those of .*config.yaml \(run.seed: 4 and 3\)"):
        check_same_settings(checkpoint, checkpoint.settings)
    config.write_text("run: {env_id: zork1.z5, seed: 3, max_iter: 7}")
    check_same_settings(checkpoint, checkpoint.settings)
    assert checkpoint.notes == []
    config.write_text("run: {no_such_setting: 3}")
    check_same_settings(checkpoint, checkpoint.settings)
    assert "config.yaml cannot be used and is replaced" in checkpoint.notes[0]
    del checkpoint.manifest["games"], checkpoint.manifest["versions"]
    with pytest.raises(UserError, match=r"the game files are .*, the checkpoint has \{\}"):
        check_games(checkpoint, games)


@pytest.mark.parametrize(
    "given",
    ["run/", "run/checkpoints", "run/checkpoints/", "run/checkpoints/iteration_1/", "run/../run", "~/run", "$HOME/run"],
)
def test_find_checkpoint_accepts_all_paths_of_a_run(tmp_path, monkeypatch, given):
    folder = write_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = find_checkpoint(given, output_dir="nowhere", exp_name="", wanted={})
    assert found.folder.resolve() == folder and found.run_folder.name == "run"
    monkeypatch.chdir(folder)
    for inside in (".", "..", "../.."):
        found = find_checkpoint(inside, output_dir="nowhere", exp_name="", wanted={})
        assert found.folder == folder and found.run_folder == tmp_path / "run"


def test_find_checkpoint_names_the_newest_run_of_a_folder_of_runs(tmp_path):
    for n, name in enumerate(("first run", "second run")):
        folder = write_checkpoint(tmp_path / name / "checkpoints" / "iteration_1")
        os.utime(folder / "manifest.json", (n, n))
    with pytest.raises(
        UserError, match=r"is not a run's folder, but it contains 2 of them; .* such as '.*/second run'"
    ):
        find_checkpoint(str(tmp_path), output_dir="", exp_name="", wanted={})
    with pytest.raises(UserError, match="this is a file"):
        find_checkpoint(str(folder / "manifest.json"), output_dir="", exp_name="", wanted={})


def test_find_checkpoint_leaves_runs_out_that_cannot_be_read(tmp_path, monkeypatch):
    for name in ("mine", "other"):
        write_checkpoint(tmp_path / name / "checkpoints" / "iteration_1")
    is_file = Path.is_file

    def denied(path):
        if "other" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", denied)
    found = find_checkpoint("auto", output_dir=str(tmp_path), exp_name="", wanted={})
    assert found.run_folder == tmp_path / "mine"
    with pytest.raises(UserError, match="its checkpoints cannot be read"):
        find_checkpoint(str(tmp_path / "other"), output_dir="", exp_name="", wanted={})


# ---- removing ----


def test_remove_old_checkpoints_keeps_the_last_ones(tmp_path):
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


# ---- random numbers ----


def test_random_state_restores_all_generators(tmp_path):
    def draw():
        return random.random(), np.random.rand(3).tolist(), np.random.randn(), torch.rand(3).tolist()

    np.random.randn()  # numpy draws normal numbers in pairs; one of the pair is part of the state
    rng = np.random.default_rng(7)
    torch.save({"global": global_random_state(), "own": rng.bit_generator.state}, tmp_path / "random.pt")
    first, own = draw(), rng.random(5).tolist()
    draw()
    state = torch.load(tmp_path / "random.pt", weights_only=True)
    set_global_random_state(state["global"])
    rng.bit_generator.state = state["own"]
    assert draw() == first and rng.random(5).tolist() == own
