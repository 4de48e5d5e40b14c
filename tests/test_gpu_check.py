"""The checks of a device, tried on the CPU: they pass, and planted faults are seen."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import check
import correctness_llm
import correctness_state
import correctness_world_model
import pytest
import torch
from gpu_context import Context, Outcome

from priorzero.llm.models import LanguageModel
from priorzero.policy import PriorZeroPolicy
from priorzero.world_model.unizero import UniZeroLearner

CONTEXT = Context(torch.device("cpu"), "random", "random", quick=True)


def outcome_of(function):
    return check.run_check(function, CONTEXT, limit_s=100)


@pytest.mark.slow
def test_check_writes_each_result_and_ends_with_the_counts(tmp_path):
    arguments = ["--device", "cpu", "--quick", "--parts", "correctness", "--out", str(tmp_path)]
    command = [sys.executable, check.__file__, *arguments, "--only", "float32_is_exact,search,text_encoder"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "3 checks: 3 passed, 0 failed, 0 measured"
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["machine"]["packages"]["torch"] == torch.__version__ and written["arguments"][:2] == arguments[:2]
    assert list(written["results"]) == ["float32_is_exact", "search", "text_encoder"]
    assert all(result["ok"] and result["seconds"] > 0 for result in written["results"].values())
    assert written["results"]["search"]["figures"]["equal"] == 8
    assert not (tmp_path / "results.json.part").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "all"], "--parts all: unknown; known are correctness, speed, runs"),
        (["--parts", "correctness", "--only", "serch"], "--only serch: unknown; known are float32_is_exact"),
    ],
)
def test_check_refuses_unknown_names(tmp_path, capsys, arguments, words):
    assert check.main(["--device", "cpu", "--out", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_run_check_reports_an_exception_and_a_check_that_takes_too_long():
    def fail(context):
        raise RuntimeError("device-side assert")

    failed = check.run_check(fail, CONTEXT, limit_s=5)
    assert failed["ok"] is False and failed["note"] == "RuntimeError: device-side assert"
    assert "in fail" in failed["error"]
    slow = check.run_check(lambda context: time.sleep(30), CONTEXT, limit_s=1)
    assert slow["ok"] is False and "stopped after 1 seconds" in slow["note"] and slow["seconds"] < 5
    assert check.run_check(lambda context: Outcome(None, {"gib_s": 1.5}), CONTEXT, limit_s=5)["ok"] is None
    line = check.line_of("copy", {"ok": None, "seconds": 1, "figures": {"gib_s": 1.5, "rows": 3}, "note": ""})
    assert line.split() == ["-", "1.00s", "copy", "gib_s=1.5", "rows=3"]


def test_load_checks_reports_a_part_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "speed", None)
    (part, function, limit_s), *_ = check.load_checks(["speed"], None).values()
    assert part == "speed" and "speed" in check.run_check(function, CONTEXT, limit_s=limit_s)["note"]


@pytest.mark.slow
def test_checks_of_the_language_model_detect_planted_faults(monkeypatch):
    checks = (correctness_llm.check_packing, correctness_llm.check_scoring, correctness_llm.check_gradient_of_tokens)
    for function in checks:
        assert outcome_of(function)["ok"] is True
    token_logprobs = LanguageModel.token_logprobs

    def leak(llm, rows, **keywords):
        """Rows that are packed together influence each other a little."""
        logprobs, mask = token_logprobs(llm, rows, **keywords)
        return logprobs * (1 + 1e-4 * (len(rows) - 1)), mask

    monkeypatch.setattr(LanguageModel, "token_logprobs", leak)
    for function in checks:
        assert outcome_of(function)["ok"] is False


@pytest.mark.slow
def test_checks_of_the_world_model_detect_planted_faults(monkeypatch):
    checks = (correctness_world_model.check_search_batch, correctness_state.check_checkpoint)
    for function in checks:
        assert outcome_of(function)["ok"] is True
    search, load = PriorZeroPolicy.search, UniZeroLearner.load_training_state

    def dependent(policy, roots, **keywords):
        """The values depend on the size of the batch."""
        results = search(policy, roots, **keywords)
        return [dataclasses.replace(result, root_value=result.root_value + 1e-3 * len(roots)) for result in results]

    def forgetful(policy, state):
        """The moments of AdamW are not loaded."""
        load(policy, {**state, "optimizer": policy._optimizer_world_model.state_dict()})

    monkeypatch.setattr(PriorZeroPolicy, "search", dependent)
    monkeypatch.setattr(UniZeroLearner, "load_training_state", forgetful)
    for function in checks:
        assert outcome_of(function)["ok"] is False


def test_random_models_need_a_folder_with_a_configuration(monkeypatch, tmp_path):
    monkeypatch.setenv("PRIORZERO_GPU_MODELS", str(tmp_path))
    result = outcome_of(lambda context: Outcome(bool(check.Context(CONTEXT.device, "random", "", False).llm_path())))
    assert "contains no config.json; give another folder" in result["note"]
    assert Path(tmp_path, "smollm2").name in result["note"]
