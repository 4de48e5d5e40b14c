"""What both training loops build from the settings."""

from __future__ import annotations

import pytest
import torch

from priorzero.agent import check_games
from priorzero.llm.engines.make import choose_engine
from priorzero.types import UserError
from tests.helpers.models import make_settings
from tests.helpers.toy_game import toy_spec


def choose(engine, device):
    return choose_engine(make_settings({"prior": {"engine": engine}}), device=torch.device(device))


def test_choose_engine_takes_vllm_on_a_gpu_and_transformers_on_a_cpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", {"vllm": object()}.get)
    assert (choose("auto", "cpu"), choose("auto", "cuda")) == ("transformers", "vllm")
    assert (choose("vllm", "cpu"), choose("transformers", "cuda")) == ("vllm", "transformers")


def test_choose_engine_says_how_to_install_vllm(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", {}.get)
    assert choose("auto", "cpu") == "transformers"
    with pytest.raises(
        UserError, match=r"prior\.engine=auto: vLLM is not installed; type pip .*gpu\.txt, or use --engine"
    ):
        choose("auto", "cuda")
    with pytest.raises(UserError, match=r"type scripts/set_up\.sh test"):
        choose("vllm", "cpu")


@pytest.mark.parametrize(
    ("games", "unseen", "words"),
    [
        ([], [], "run.env_id is empty"),
        (["a", "b", "c"], [], "env.collector_env_num=2 must be a multiple of the 3 games"),
        (["a", "b"], ["b"], "eval.unseen contains games of run.env_id: b;"),
    ],
)
def test_check_games_refuses_games_that_do_not_fit(games, unseen, words):
    with pytest.raises(UserError, match=words):
        check_games(make_settings(), games=[toy_spec(n) for n in games], unseen=[toy_spec(n) for n in unseen])


def test_check_games_accepts_games_that_divide_the_environments():
    check_games(make_settings(), games=[toy_spec("a"), toy_spec("b")], unseen=[toy_spec("c")])
