"""Runs with injected faults end as they should, and no step is lost."""

from __future__ import annotations

import pytest
import torch

from priorzero.runs.resume import newest_checkpoint
from priorzero.types import UserError
from tests.helpers.faults import RATES, FaultPlan
from tests.helpers.runs import lines, read_events, short_settings, train
from tests.helpers.toy_game import toy_games

# More faults in fewer iterations than with the helper's own rates.
MANY = {name: rate if name == "disk full" else 2 * rate for name, rate in RATES.items()}
NONE = dict.fromkeys(RATES, 0.0)
NUM_ITERATIONS = 80


def run(folder, llm, *, checkpoint=None, max_iter=NUM_ITERATIONS, checkpoint_every=10, in_process=True):
    """Toy games in worker processes, which can be killed, with a tiny language model."""
    settings = short_settings(
        folder,
        {
            "run": {"max_iter": max_iter, "checkpoint_every": checkpoint_every, "log_every": 50},
            "env": {"max_episode_steps": 10},
            "train": {"collect_env_steps": 4, "update_per_collect": 1, "max_nonfinite_updates": 5},
            "prior": {"timeout_s": 0.5, "backoff_s": 0.01, "attempts": 2},
            "llm": {"path": str(llm)},
            "replay": {"buffer_size": 100},
            "eval": {"every": 1000, "modes": ["world_model"]},
        },
    )
    with toy_games(in_process=in_process):
        return train(settings, checkpoint=checkpoint)


@pytest.mark.slow
def test_run_with_faults_loses_no_step(tmp_path, tiny_llm_folder, monkeypatch):
    """Half of the run, then the rest, resumed from the last checkpoint that could be written."""
    plan = FaultPlan(7, MANY, delay_s=0.7)
    with plan.inject(monkeypatch):
        try:
            run(tmp_path, tiny_llm_folder, max_iter=NUM_ITERATIONS // 2, in_process=False)
        except UserError as error:  # the last checkpoint may be the one that cannot be written
            assert "No space left on device" in str(error)
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint.manifest["counters"]["iteration"] >= NUM_ITERATIONS // 4
    with plan.inject(monkeypatch), pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan._rates, "disk full", 0.0)
        summary = run(tmp_path, tiny_llm_folder, checkpoint=checkpoint, in_process=False)
    assert summary.rows["iterations"] == NUM_ITERATIONS
    assert all(plan.counts[name] > 0 for name in RATES), plan.counts

    state = torch.load(newest_checkpoint(summary.folder).folder / "training.pt", weights_only=True)
    collector, buffer = state["collector"], state["buffer"]
    stored = sum(len(segment["records"]) for segment in buffer["segments"])
    pending = sum(map(len, collector["pending"]))
    # Every step is in the buffer, evicted from it, in a segment that is not complete, or lost with a killed game.
    steps = stored + buffer["num_evicted"] + pending + collector["num_steps_lost"]
    assert collector["env_steps"] == steps == 4 * NUM_ITERATIONS
    assert 0 < collector["num_steps_lost"] <= collector["num_game_failures"] <= plan.counts["game killed"]

    # Every fault is in the metrics and in the log.
    log = (summary.folder / "log" / "run.log").read_text()
    scalars = read_events(summary.folder)
    assert scalars["collector_iter/game_failures"][-1] == collector["num_game_failures"]
    assert sum(scalars["prior/retries"]) > 0 and (sum(scalars["prior/fallbacks"]) > 0) == ("uniform prior" in log)
    assert "skipped a non-finite update: the world model" in log and "skipped a non-finite update: the LLM" in log
    assert scalars["train/updates_left_out"][-1] > 1
    assert len(list((summary.folder / "not_finite").iterdir())) == 5
    assert "could not be written" in log
    assert (
        len(lines(summary.folder, "episodes.jsonl")) == collector["num_episodes"] == summary.rows["episodes finished"]
    )
    # Both models have continued to learn.
    counters = state["loop"]["counters"]
    assert counters["train_iter"] > 0.6 * NUM_ITERATIONS and counters["llm_version"] > 0.5 * NUM_ITERATIONS


def test_run_ends_when_no_update_is_finite(tmp_path, tiny_llm_folder, monkeypatch):
    plan = FaultPlan(0, {**NONE, "batch poisoned": 1.0}, delay_s=0.0)
    message = (
        r"5 non-finite updates in a row were skipped \(train\.max_nonfinite_updates\): "
        "the world model's rewards are not finite"
    )
    with plan.inject(monkeypatch), pytest.raises(UserError, match=message):
        run(tmp_path, tiny_llm_folder)
    assert plan.counts["batch poisoned"] == 5
    saved = torch.load(tmp_path / "run" / "not_finite" / "batch_1.pt", weights_only=True)
    assert saved["error"].startswith("the world model's rewards are not finite in update 0")
    assert len(saved["records"]["states"]) > 0 and saved["arrays"]["target"][0].isnan().sum() == 1


def test_run_with_a_full_disk_keeps_the_last_checkpoint(tmp_path, tiny_llm_folder, monkeypatch):
    first = run(tmp_path, tiny_llm_folder, max_iter=6, checkpoint_every=5)
    assert [path.name for path in sorted((first.folder / "checkpoints").iterdir())] == ["iteration_5", "iteration_6"]
    plan = FaultPlan(0, {**NONE, "disk full": 1.0}, delay_s=0.0)
    message = r"the run has ended, but iteration_12 could not be written \(.*No space left.*iteration_6"
    with plan.inject(monkeypatch), pytest.raises(UserError, match=message):
        checkpoint = newest_checkpoint(first.folder)
        run(tmp_path, tiny_llm_folder, max_iter=12, checkpoint_every=5, checkpoint=checkpoint)
    assert plan.counts["disk full"] == 2
    assert [path.name for path in sorted((first.folder / "checkpoints").iterdir())] == ["iteration_5", "iteration_6"]
