"""``python -m priorzero.doctor``: one line for each check, and an exit code."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from priorzero import doctor
from priorzero.doctor import Torch
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
    assert "error   torch" in output and "  torch: type --set run.device=cpu" in output
    found, advice = output.split("what to do:")
    line = next(line for line in found.splitlines() if line.startswith("error   games"))
    assert line.endswith("There is no story file 'zork1.z5'.")
    assert "  games: Searched" in advice and "scripts/fetch_games.py zork1.z5" in advice
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
    monkeypatch.setattr(doctor, "find_stories", lambda: 1 / 0)
    monkeypatch.setattr(doctor, "_gcc", lambda: (_ for _ in ()).throw(UserError("no gcc; type apt-get install gcc")))
    checks = checks_of(local)
    assert checks["story files"].mark == "error" and "ZeroDivisionError" in checks["story files"].text
    assert (checks["gcc"].mark, checks["gcc"].text, checks["gcc"].advice) == (
        "error",
        "no gcc",
        "type apt-get install gcc",
    )
    assert checks["LLM"].mark == "ok"


def test_run_checks_reports_a_missing_llm_once(machine):
    checks = checks_of({"llm": {"path": "./nowhere"}})
    errors = [check for check in checks.values() if check.mark == "error"]
    assert [check.name for check in errors] == ["LLM"] and "llm.path=./nowhere" in errors[0].text
    assert checks["LLM's memory"].mark == "warning"


def test_run_checks_compares_the_memory_of_the_llm(monkeypatch, local):
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    memory = checks_of(local)["LLM's memory"]
    assert memory.mark == "error" and "of the main memory" in memory.text and "llm.use_lora=true" in memory.advice
    monkeypatch.setattr(doctor, "look_at_torch", lambda: Torch(version="2.0", gpu="H100", gpu_bytes=10**11))
    checks = checks_of(local, {"prior": {"engine": "transformers"}})
    assert checks["LLM's memory"].mark == "ok" and "100.0 GB of the GPU memory" in checks["LLM's memory"].text
    assert "GPU H100, 100.0 GB free" in checks["torch"].text


def test_run_checks_reports_a_full_disk(monkeypatch, local):
    monkeypatch.setattr("priorzero.runtime.paths.shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, free=10**6))
    checks = checks_of(local)
    assert checks["run folder"].mark == "error" and "1 MB are free" in checks["run folder"].text
    assert checks["caches"].mark == "warning" and "HF_HOME" in checks["caches"].advice


def test_run_checks_reports_a_missing_engine(monkeypatch, local):
    monkeypatch.setattr("priorzero.llm.engine_choice.importlib.util.find_spec", lambda _: None)
    vllm = checks_of(local, {"prior": {"engine": "vllm"}})["vLLM"]
    assert vllm.mark == "error" and "scripts/set_up.sh test" in vllm.advice


def test_run_checks_without_an_llm_looks_for_none(monkeypatch):
    monkeypatch.setattr(doctor, "check_llm", lambda _: pytest.fail("an LLM is looked for"))
    checks = checks_of({"prior": {"enabled": False}, "eval": {"modes": ["world_model"]}})
    assert not [check for check in checks.values() if check.mark == "error"]


def test_run_checks_says_how_to_install_optional_packages(monkeypatch, local):
    monkeypatch.setattr(doctor, "_version", lambda name: "")
    checks = checks_of(local)
    assert checks["wandb"].mark == "ok" and "pip install wandb==" in checks["wandb"].text


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (SimpleNamespace(returncode=0, stdout='warning\n{"version": "2.13"}\n', stderr=""), Torch(version="2.13")),
        (SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nImportError: x"), Torch(problem="ImportError: x")),
        (SimpleNamespace(returncode=-11, stdout="", stderr=""), Torch(problem="the process ended with code -11")),
        (subprocess.TimeoutExpired("python", 30), Torch(problem="its import takes longer than 30 s", is_slow=True)),
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


def test_torch_that_is_slow_is_a_warning_and_torch_that_fails_an_error(monkeypatch, local):
    for torch, mark in ((Torch(problem="slow", is_slow=True), "warning"), (Torch(problem="ImportError"), "error")):
        monkeypatch.setattr(doctor, "look_at_torch", lambda torch=torch: torch)
        assert checks_of(local)["torch"].mark == mark
