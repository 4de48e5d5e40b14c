"""A run under faults of every kind ends well, and nothing is lost on the way."""

from __future__ import annotations

import pytest
import torch

from priorzero.runs.checkpoint import newest_checkpoint
from priorzero.train import run_training
from priorzero.types import UserError
from tests.helpers.faults import RATES, FaultPlan
from tests.helpers.models import make_settings, make_tiny_llm
from tests.helpers.runs import lines, read_events


def settings_for(folder, llm, **run):
    return make_settings(
        {
            "run": {
                "max_iter": 200,
                "checkpoint_every": 10,
                "num_threads": 1,
                "log_every": 50,
                "exp_name": "run",
                **run,
            },
            "env": {"max_episode_steps": 10},
            "world_model": {"embed_dim": 64, "num_heads": 2},
            "search": {"num_simulations": 4},
            "train": {"collect_env_steps": 4, "batch_size": 8, "update_per_collect": 1, "max_nonfinite_updates": 5},
            "prior": {"timeout_s": 0.5, "backoff_s": 0.01, "attempts": 2},
            "llm": {"path": str(llm), "batch_size": 2, "micro_batch_size": 1},
            "replay": {"segment_length": 5, "buffer_size": 200},
            "eval": {"every": 1000, "modes": ["world_model"]},
        },
        {"run": {"output_dir": str(folder)}},
    )


@pytest.fixture
def tiny_llm_folder(tmp_path, smollm2):
    folder = tmp_path / "llm"
    llm = make_tiny_llm(smollm2.tokenizer)
    llm.save(folder)
    return folder


@pytest.mark.slow
def test_two_hundred_iterations_under_faults_lose_nothing(tmp_path, tiny_llm_folder, monkeypatch):
    plan = FaultPlan(7, RATES, delay_s=0.7)
    with plan.at_work(monkeypatch):
        try:
            run_training(settings_for(tmp_path, tiny_llm_folder, max_iter=100))
        except UserError as error:  # the disk was full at the very end: it is said, and an older checkpoint is there
            assert "No space left on device" in str(error)
    # Without faults from here on: what a faulty run leaves behind is fit to go on from.
    checkpoint = newest_checkpoint(tmp_path / "run")
    begun = checkpoint.manifest["counters"]["iteration"]
    assert begun >= 50
    with plan.at_work(monkeypatch), pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan._rates, "disk full", 0.0)
        summary = run_training(settings_for(tmp_path, tiny_llm_folder), checkpoint=checkpoint)
    assert summary.rows["iterations"] == 200
    assert all(plan.done[name] > 0 for name in RATES), plan.done

    state = torch.load(newest_checkpoint(summary.folder).folder / "training.pt", weights_only=True)
    collector, buffer = state["collector"], state["buffer"]
    stored = sum(len(segment["records"]) for segment in buffer["segments"])
    pending = sum(map(len, collector["pending"]))
    # In = in the buffer, evicted from it, not complete yet, or lost with the game that was killed.
    assert collector["env_steps"] == stored + buffer["num_evicted"] + pending + collector["num_steps_lost"] == 800
    assert 0 < collector["num_steps_lost"] <= collector["num_game_failures"] <= plan.done["game killed"]

    # Every fault is told of: in the metrics, and in the log.
    log = (summary.folder / "log" / "run.log").read_text()
    scalars = read_events(summary.folder)
    assert scalars["collector_iter/game_failures"][-1] == collector["num_game_failures"]
    gave_up = log.count("searches use a uniform prior")
    assert sum(scalars["prior/retries"]) + gave_up > 0 and (sum(scalars["prior/fallbacks"]) > 0) == (gave_up > 0)
    assert log.count("update left out: the world model") > 0 and log.count("update left out: the LLM") > 0
    assert len(list((summary.folder / "not_finite").iterdir())) == 5
    assert log.count("could not be written") > 0
    episodes = lines(summary.folder, "episodes.jsonl")
    assert len(episodes) == collector["num_episodes"] == summary.rows["episodes finished"]
    # The parameters are sound, and both models have gone on learning.
    assert state["counters"]["train_iter"] > 150 and state["counters"]["llm_version"] > 100


@pytest.mark.slow
def test_updates_that_are_never_finite_end_the_run_with_a_message(tmp_path, tiny_llm_folder, monkeypatch):
    plan = FaultPlan(0, {**dict.fromkeys(RATES, 0.0), "batch poisoned": 1.0}, delay_s=0.0)
    message = r"5 updates in a row were left out \(train\.max_nonfinite_updates\): the world model's rewards are not finite"
    with plan.at_work(monkeypatch), pytest.raises(UserError, match=message):
        run_training(settings_for(tmp_path, tiny_llm_folder))
    assert plan.done["batch poisoned"] == 5
    kept = torch.load(tmp_path / "run" / "not_finite" / "batch_1.pt", weights_only=True)
    assert kept["error"].startswith("the world model's rewards are not finite in update 0")
    assert len(kept["records"]["states"]) > 0 and kept["arrays"]["target"][0].isnan().sum() == 1


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, tiny_llm_folder, monkeypatch):
    settings = settings_for(tmp_path, tiny_llm_folder, max_iter=12, checkpoint_every=5)
    first = run_training(settings_for(tmp_path, tiny_llm_folder, max_iter=6, checkpoint_every=5))
    assert [path.name for path in sorted((first.folder / "checkpoints").iterdir())] == ["iteration_5", "iteration_6"]
    plan = FaultPlan(0, {**dict.fromkeys(RATES, 0.0), "disk full": 1.0}, delay_s=0.0)
    message = r"the run has ended, but iteration_12 could not be written \(.*No space left.*iteration_6"
    with plan.at_work(monkeypatch), pytest.raises(UserError, match=message):
        run_training(settings, checkpoint=newest_checkpoint(first.folder))
    assert plan.done["disk full"] == 2
    assert [path.name for path in sorted((first.folder / "checkpoints").iterdir())] == ["iteration_5", "iteration_6"]
