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
NUM_ITERATIONS = 80


def run(folder, llm, *, checkpoint=None, max_iter=NUM_ITERATIONS):
    """Toy games in worker processes, which can be killed, with a tiny language model."""
    settings = short_settings(
        folder,
        {
            "run": {"max_iter": max_iter, "checkpoint_every": 10, "log_every": 50},
            "env": {"max_episode_steps": 10},
            "train": {"collect_env_steps": 4, "update_per_collect": 1, "max_nonfinite_updates": 5},
            "prior": {"timeout_s": 0.5, "backoff_s": 0.01, "attempts": 2},
            "llm": {"path": str(llm)},
            "replay": {"buffer_size": 100},
            "eval": {"every": 1000, "modes": ["world_model"]},
        },
    )
    with toy_games(in_process=False):
        return train(settings, checkpoint=checkpoint)


@pytest.mark.slow
def test_run_with_faults_loses_no_step(tmp_path, tiny_llm_folder, monkeypatch):
    """Half of the run, then the rest, resumed from the last checkpoint that could be written."""
    plan = FaultPlan(7, MANY, delay_s=0.7)
    with plan.inject(monkeypatch):
        try:
            run(tmp_path, tiny_llm_folder, max_iter=NUM_ITERATIONS // 2)
        except UserError as error:  # the last checkpoint may be the one that cannot be written
            assert "No space left on device" in str(error)
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint.manifest["counters"]["iteration"] >= NUM_ITERATIONS // 4
    with plan.inject(monkeypatch), pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan._rates, "disk full", 0.0)
        summary = run(tmp_path, tiny_llm_folder, checkpoint=checkpoint)
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
