"""``python -m priorzero.doctor``: one line for each check, and an exit code."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

import priorzero
from priorzero import doctor
from priorzero.doctor import Check, Torch
from priorzero.envs import registry
from priorzero.types import UserError
from tests.helpers.models import make_settings

TORCH = Torch(version="2.0")


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine on which everything is fine: torch without a GPU, no network, an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("PRIORZERO_GAMES", raising=False)
    monkeypatch.setattr(doctor, "look_at_torch", lambda: TORCH)
    return tmp_path


def checks_of(*layers):
    settings = make_settings({"run": {"env_id": "textworld:simple?seed=7"}}, *layers)
    return {check.name: check for check in doctor.run_checks(settings)}


@pytest.fixture
def local(tiny_llm_folder):
    """Settings with an LLM that is on this machine."""
    return {"llm": {"path": str(tiny_llm_folder)}}


def test_main_shows_one_line_for_each_check_and_returns_0_if_training_can_start(capsys, machine, tiny_llm_folder):
    arguments = ["--quick_test", "--set", f"llm.path={tiny_llm_folder}"]
    assert doctor.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    end = lines.index("")
    assert {line.split()[0] for line in lines[:end]} == {"ok", "warning"}  # no story file, and no hub
    assert lines[-1] == "training can start"
    names = ["Python", "torch", "vLLM", "gcc", "hub", "LLM", "ray", "wandb", "minigrid"]
    assert all(any(line[8:].startswith(name) for line in lines[:end]) for name in names)
    assert list(machine.iterdir()) == []  # nothing was written


def test_main_returns_1_and_says_what_to_type_if_training_cannot_start(capsys, tiny_llm_folder):
    arguments = ["--env_id", "zork1.z5", "--set", f"llm.path={tiny_llm_folder}", "--set", "run.device=cuda"]
    assert doctor.main(arguments) == 1
    output = capsys.readouterr().out
    lines = output.splitlines()
    torch = next(line for line in lines if line.startswith("error   torch"))
    assert torch.endswith("run.device=cuda: torch sees no GPU; type --set run.device=cpu")
    start = next(n for n, line in enumerate(lines) if line.startswith("error   games"))
    end = next(n for n, line in enumerate(lines) if line.startswith("warning hub"))
    indent = lines[start].index("There is no story file 'zork1.z5'. Searched")
    assert all(line[:indent].isspace() for line in lines[start + 1 : end])  # the message is in one block
    assert lines[end - 1].endswith("type: python scripts/fetch_games.py zork1.z5")
    assert output.endswith("training cannot start with these settings (errors: 2)\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--set", "llm.nonsense=1"], "llm.nonsense"), (["--config", "missing.yaml"], "missing.yaml")],
)
def test_main_returns_2_for_wrong_settings(capsys, arguments, words):
    assert doctor.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and words in captured.err


def test_main_returns_2_for_wrong_arguments():
    with pytest.raises(SystemExit) as caught:
        doctor.main(["--presett", "lora"])
    assert caught.value.code == 2


def test_run_checks_reports_a_check_that_raises(monkeypatch, local):
    def refuse():
        raise UserError("no folder; type mkdir games")

    monkeypatch.setattr(doctor, "hub_problem", lambda: 1 / 0)
    monkeypatch.setattr(doctor, "find_stories", refuse)
    checks = checks_of(local)
    assert checks["hub"].mark == "error" and "failed (ZeroDivisionError: division by zero)" in checks["hub"].text
    assert checks["story files"] == Check("story files", "error", "no folder; type mkdir games")
    assert checks["LLM"].mark == "ok"


def test_run_checks_looks_for_gcc(monkeypatch, local):
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert checks_of(local)["gcc"].mark == "warning"
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert checks_of(local)["gcc"] == Check("gcc", "ok", "/bin/gcc")


def test_run_checks_reports_a_missing_llm_once(machine):
    checks = checks_of({"llm": {"path": "./nowhere"}})
    errors = [check for check in checks.values() if check.mark == "error"]
    assert [check.name for check in errors] == ["LLM"] and "llm.path=./nowhere" in errors[0].text


def test_run_checks_compares_the_memory_of_the_llm(monkeypatch, local):
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    llm = checks_of(local)["LLM"]
    assert llm.mark == "warning" and "0.0 GB of main memory are free; type --set llm.use_lora=true" in llm.text
    monkeypatch.setattr(doctor, "look_at_torch", lambda: Torch(version="2.0", gpu="H100", gpu_bytes=10**11))
    checks = checks_of(local, {"prior": {"engine": "transformers"}})
    assert checks["LLM"].mark == "ok" and "100.0 GB of GPU memory are free" in checks["LLM"].text
    assert "GPU H100, 100.0 GB free" in checks["torch"].text


def test_run_checks_does_not_state_the_size_of_a_checkpoint_without_the_llm(local):
    assert "a checkpoint needs about" in checks_of(local)["run folder"].text
    missing = checks_of({"llm": {"path": "./nowhere"}})["run folder"].text
    assert missing.endswith("a checkpoint contains the LLM, whose size is not known")


@pytest.mark.parametrize("setting", ["run.env_id", "eval.unseen"])
def test_run_checks_opens_registered_games(monkeypatch, local, setting):
    monkeypatch.setattr(registry, "_registered", {})
    priorzero.register_game("counting", "tests.helpers.registered:make_counter")
    priorzero.register_game("nothing", "tests.helpers.registered:make_nothing")
    group, key = setting.split(".")
    assert checks_of(local, {group: {key: "counting:9"}})["games"].mark == "ok"
    games = checks_of(local, {group: {key: "nothing:"}})["games"]
    assert games.mark == "error" and "NoneType has no method reset()" in games.text


@pytest.mark.parametrize(("free", "megabytes"), [(10**6, 1), (0, 0)])
def test_run_checks_reports_a_full_disk(monkeypatch, local, free, megabytes):
    disk = SimpleNamespace(total=10**9, free=free)
    monkeypatch.setattr("priorzero.runtime.paths.shutil.disk_usage", lambda _: disk)
    checks = checks_of(local)
    assert checks["run folder"].mark == "error" and f"{megabytes} MB are free" in checks["run folder"].text
    assert checks["caches"].mark == "warning" and "HF_HOME" in checks["caches"].text


def test_run_checks_accepts_a_disk_whose_size_is_not_known(monkeypatch, local):
    disk = SimpleNamespace(total=0, free=0)  # of a network file system
    monkeypatch.setattr("priorzero.runtime.paths.shutil.disk_usage", lambda _: disk)
    checks = checks_of(local)
    assert checks["caches"].mark == checks["run folder"].mark == "ok"
    assert "free space not known" in checks["caches"].text


def test_run_checks_reports_a_missing_engine(monkeypatch, local):
    monkeypatch.setattr("priorzero.llm.engine_choice.importlib.util.find_spec", lambda _: None)
    vllm = checks_of(local, {"prior": {"engine": "vllm"}})["vLLM"]
    assert vllm.mark == "error" and "scripts/set_up.sh test" in vllm.text


def test_run_checks_without_an_llm_looks_for_none(monkeypatch):
    monkeypatch.setattr(doctor, "check_llm", lambda _: pytest.fail("an LLM is looked for"))
    checks = checks_of({"prior": {"enabled": False}, "eval": {"modes": ["world_model"]}})
    assert not [check for check in checks.values() if check.mark == "error"]


def test_run_checks_says_how_to_install_optional_packages(monkeypatch, local):
    monkeypatch.setattr(doctor, "installed_version", lambda package: "")
    checks = checks_of(local)
    assert checks["wandb"].mark == "ok" and "pip install wandb==" in checks["wandb"].text


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (SimpleNamespace(returncode=0, stdout='warning\n{"version": "2.13"}\n', stderr=""), Torch(version="2.13")),
        (SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nImportError: x"), Torch(problem="ImportError: x")),
        (SimpleNamespace(returncode=-11, stdout="", stderr=""), Torch(problem="the process ended with code -11")),
        (subprocess.TimeoutExpired("python", 30), Torch(problem="its import takes longer than 120 s")),
    ],
)
def test_look_at_torch(monkeypatch, result, expected):
    monkeypatch.undo()

    def run(*_, **__):
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert doctor.look_at_torch() == expected


def test_run_checks_reports_that_torch_cannot_be_imported(monkeypatch, local):
    monkeypatch.setattr(doctor, "look_at_torch", lambda: Torch(problem="ImportError: x"))
    torch = checks_of(local)["torch"]
    assert torch.mark == "error" and torch.text.startswith("ImportError: x; try python -c 'import torch'")
