"""Loading a trained agent: it plays as in its run's own evaluations, any games, and changes nothing in the run."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import shutil

import pytest
import torch

from priorzero.config import dump_settings
from priorzero.preflight import AgentPreparation, prepare_agent
from priorzero.runs.checkpoint import save_checkpoint
from priorzero.runs.loggers import check_loggers
from priorzero.runs.saved import find_agent, plays_with_llm
from priorzero.saved_agent import agent_errors, evaluate_agent, loaded_agent
from priorzero.settings import EVAL_MODES
from priorzero.types import EngineError, GameTimeoutError, GameWorkerError, UserError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.folders import contents
from tests.helpers.runs import NO_LLM, lines, restored_threads, short_settings, train
from tests.helpers.toy_game import toy_games

# The engine's prompt cache may change log-probabilities by 1e-6, and what it holds depends on the past.
WITH_LLM = {
    "run": {"env_id": "toy,coins", "max_iter": 4, "checkpoint_every": 2},
    "prior": {"prompt_cache_tokens": 0},
    "llm": {"memory_lines": 3, "learning_rate": 1e-2, "kl_weight": 0.1},
    "eval": {"every": 2, "episodes": 3, "modes": list(EVAL_MODES), "unseen": "other"},
}


def evaluate(where, **kwargs):
    """Evaluations of a saved agent, as the lines of ``evaluations.jsonl``."""
    with restored_threads():
        results = asyncio.run(evaluate_agent(prepare_agent(where, **kwargs)))
    return [
        {"game": game, "unseen": unseen, **evaluation.results()}
        for (_, unseen), of_games in results.items()
        for game, evaluation in of_games.items()
    ]


def reported(folder):
    """The evaluations of a run, by environment step."""
    found = {}
    for line in lines(folder, "evaluations.jsonl"):
        found.setdefault(line.pop("env_step"), []).append(line)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("use_lora", [False, True])
def test_loaded_agent_plays_as_in_its_runs_evaluations(tmp_path, tiny_llm_folder, use_lora):
    layer = {"llm": {"path": str(tiny_llm_folder), "use_lora": use_lora}}
    with toy_games():
        run = train(short_settings(tmp_path, WITH_LLM, layer))
        of_run, before = reported(run.folder), contents(run.folder)
        middle, last = (run.folder / "checkpoints" / f"iteration_{n}" for n in (2, 4))
        assert evaluate(run.folder) == evaluate(last) == of_run[max(of_run)]
        earlier = evaluate(middle)
        assert earlier == of_run[min(of_run)]
    assert earlier != of_run[max(of_run)], "the agent has not learned anything, so this test could not fail"
    assert contents(run.folder) == before


def test_loaded_agent_plays_other_games_without_the_games_of_training(tmp_path):
    with toy_games():
        run = train(short_settings(tmp_path, NO_LLM, {"run": {"env_id": "gone"}}))
        copy = shutil.copytree(run.folder / "checkpoints" / "iteration_6", tmp_path / "copy")
        shutil.rmtree(run.folder)
        (line,) = evaluate(copy, games="new", overrides=[{"eval": {"episodes": 5}, "search": {"num_simulations": 2}}])
    assert line["game"] == "new" and line["unseen"] and len(line["returns"]) == 5


def test_loaded_agent_of_a_run_on_a_cluster(tmp_path):
    """Such a checkpoint has no ``training.pt`` and no games in its manifest."""

    def write(folder):
        shutil.copytree(of_run, folder, dirs_exist_ok=True)
        (folder / "training.pt").unlink()
        (folder / "manifest.json").unlink()

    with toy_games():
        run = train(short_settings(tmp_path, NO_LLM))
        of_run = run.folder / "checkpoints" / "iteration_6"
        save_checkpoint(tmp_path / "ray" / "checkpoints" / "iteration_6", write=write, about={"counters": {}})
        found = evaluate(tmp_path / "ray")
        assert found == evaluate(run.folder) and not found[0]["unseen"]


def test_loaded_agent_takes_the_newest_intact_checkpoint(tmp_path):
    with toy_games():
        run = train(short_settings(tmp_path, NO_LLM))
        first, last = (run.folder / "checkpoints" / f"iteration_{n}" for n in (3, 6))
        with (last / "world_model.pt").open("ab") as file:
            file.write(b"x")
        assert prepare_agent(run.folder).checkpoint.folder == first
        with pytest.raises(UserError, match=r"evaluate .*iteration_6: world_model.pt has a wrong checksum; name a run"):
            prepare_agent(last, what="evaluate ")
        shutil.rmtree(first)
        with pytest.raises(UserError, match="none of its 1 checkpoints can be used"):
            prepare_agent(run.folder)


def test_loaded_agent_refuses_a_world_model_of_another_shape_and_keeps_the_log_of_vllm_after_its_errors_only(
    tmp_path, monkeypatch
):
    async def load(prepared, log_text):
        async with loaded_agent(prepared):
            [log] = (tmp_path / "logs").iterdir()
            log.write_text(log_text)
            raise EngineError("it crashed")

    (tmp_path / "logs").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "logs"))
    with toy_games():
        run = train(short_settings(tmp_path, NO_LLM))
        with pytest.raises(
            UserError, match=r"the architecture of a trained agent cannot change; world_model\.embed_dim is 64"
        ):
            evaluate(run.folder, overrides=[{"world_model": {"embed_dim": 32}}])
        other = prepare_agent(run.folder)
        other.settings.world_model.embed_dim = 32  # as if config.yaml had been edited
        with pytest.raises(UserError, match="its world model does not fit these settings"):
            asyncio.run(load(other, ""))
        prepared = prepare_agent(run.folder)
        with pytest.raises(EngineError, match=r"^it crashed$"):
            asyncio.run(load(prepared, ""))
        assert list((tmp_path / "logs").iterdir()) == []
        with pytest.raises(EngineError, match="it crashed; the log of vLLM is") as caught:
            asyncio.run(load(prepared, "CUDA error"))
    [log] = (tmp_path / "logs").iterdir()
    assert str(log) in str(caught.value) and log.read_text() == "CUDA error"


def test_prepare_agent_asks_before_it_runs_code_of_others(tmp_path):
    with toy_games():
        run = train(short_settings(tmp_path, NO_LLM, {"llm": {"trust_remote_code": True}}))
        with pytest.raises(UserError, match=r"if you trust it, type --set llm\.trust_remote_code=true"):
            prepare_agent(run.folder)
        assert prepare_agent(run.folder, overrides=[{"llm": {"trust_remote_code": False}}])


def write_agent(folder):
    """A checkpoint without models: its LLM is missing, its evaluations need none, and its run logged to W&B."""
    layer = {
        "run": {"loggers": ["tensorboard", "wandb"]},
        "llm": {"path": "/nowhere"},
        "eval": {"modes": ["world_model", "random"]},
    }
    config = dump_settings(short_settings(folder, layer))
    return find_agent(write_checkpoint(folder / "iteration_1", config=config))


def test_prepare_agent_needs_no_logger_and_no_llm_that_is_not_used(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else find_spec(name))
    checkpoint = write_agent(tmp_path)
    with pytest.raises(UserError, match="wandb is not installed"):
        check_loggers(checkpoint.settings.run)
    with toy_games():
        assert not prepare_agent(checkpoint).settings.prior.enabled
        for modes in (["random"], ["world_model"]):
            settings = prepare_agent(checkpoint, modes=modes).settings
            assert settings.eval.modes == modes and not settings.prior.enabled
        with pytest.raises(UserError, match="/nowhere"):
            prepare_agent(checkpoint, modes=["prior", "random"])
        without = [{"prior": {"enabled": False}}]
        assert not prepare_agent(checkpoint, modes=["random"], overrides=without).settings.prior.enabled
        with pytest.raises(
            UserError, match=r"the mode prior needs an LLM, .*\(prior.enabled=false\); the modes without"
        ):
            prepare_agent(checkpoint, modes=["prior"], overrides=without)


def test_plays_with_llm_takes_the_last_value(tmp_path):
    checkpoint = write_agent(tmp_path)
    off, on = ({"prior": {"enabled": value}} for value in (False, True))
    found = [plays_with_llm(checkpoint, layers) for layers in ([], [off], [off, on], [on, {"run": {}}, off])]
    assert found == [True, False, True, False]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            GameTimeoutError("it hangs"),
            r"^the game failed: it hangs. If it needs more time, type --set env.step_timeout_s=\d+$",
        ),
        (GameWorkerError("it crashed"), r"^the game failed: it crashed$"),
        (
            EngineError("it crashed"),
            r"the LLM engine failed: it crashed; to play without vLLM, type --set prior.engine=",
        ),
        (torch.OutOfMemoryError("20 GiB"), r"out of GPU memory \(20 GiB\)\. End .*, or type --set run.device=cpu"),
        (
            OSError(errno.EIO, "broken"),
            r"a file cannot be used \(.*broken\); check the disk.*, then type the command again",
        ),
    ],
)
def test_agent_errors_are_reported_without_the_advice_of_training(tmp_path, error, message):
    checkpoint = write_agent(tmp_path)
    prepared = AgentPreparation(checkpoint, checkpoint.settings, [], [])
    with pytest.raises(UserError, match=message) as caught, agent_errors(prepared):
        raise error
    assert "new run" not in str(caught.value) and "resume" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("a bug")])
def test_agent_errors_leave_other_errors(tmp_path, error):
    checkpoint = write_agent(tmp_path)
    with (
        pytest.raises(type(error), match=r"^a bug$"),
        agent_errors(AgentPreparation(checkpoint, checkpoint.settings, [], [])),
    ):
        raise error


@pytest.mark.parametrize(
    ("where", "message"),
    [("nothing", "there is no such folder"), ("file", "this is a file"), ("empty", "it has no checkpoint")],
)
def test_prepare_agent_says_what_is_wrong_with_the_folder(tmp_path, where, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        prepare_agent(tmp_path / where)
