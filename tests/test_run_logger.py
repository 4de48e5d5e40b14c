"""What a run logs: metrics, episodes, evaluations; fingerprints and counters."""

from __future__ import annotations

import json
import math

import pytest
import torch
from loguru import logger

from priorzero.play.episode import EpisodeResult
from priorzero.play.evaluator import Evaluation
from priorzero.runs.counters import Counters
from priorzero.runs.logger import RunLogger, log_start
from priorzero.runs.loggers import MetricsWriter
from priorzero.runs.loggers.tensorboard import TensorBoardLogger
from priorzero.runs.summary import count_moved, fingerprint
from priorzero.runtime.timeline import Timeline
from priorzero.settings import RunSettings
from tests.helpers.models import make_settings
from tests.helpers.runs import lines, read_events


def test_metrics_writer_counts_values_that_are_not_finite_and_does_not_write_them(tmp_path):
    writer = MetricsWriter([TensorBoardLogger(tmp_path)])
    writer.write({"a": 1.0, "b": math.nan, "c": math.inf}, step=1, axis="iteration")
    writer.close()
    assert writer.num_not_finite == 2 and writer.last == {"a": 1.0}
    assert read_events(tmp_path) == {"a": [1.0]}


@pytest.mark.parametrize(
    ("llm", "text"),
    [
        ({"path": "x"}, "LLM: x, llm.adapter: none"),
        ({"path": "x", "adapter": "y"}, "LLM: x, llm.adapter: y, merged (llm.use_lora=false)"),
        ({"path": "x", "adapter": "y", "use_lora": True}, "LLM: x, llm.adapter: y"),
    ],
)
def test_log_start_names_the_adapter_of_the_llm(tmp_path, llm, text):
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]))
    log_start(make_settings({"prior": {"enabled": True}, "llm": llm}), games="toy", where="cpu", folder=tmp_path)
    logger.remove(sink)
    assert text in messages


def test_run_logger_writes_iterations(tmp_path):
    run_logger = RunLogger(tmp_path, make_settings({"run": {"log_every": 1}}))
    episodes = [EpisodeResult(total_reward=2.0, score=3.0, steps=5, won=False, env_step=20, game="toy")]
    for iteration in (1, 2):
        run_logger.log_iteration(
            Counters(iteration=iteration, env_step=20 * iteration),
            scalars={"collector_iter/reward_mean": 2.0 * iteration},
            prior={"prior/retries": 1.0},
            time_usage=Timeline().finish_interval(),
            episodes=episodes,
        )
    run_logger.close()
    events = read_events(tmp_path)
    assert events["collector_iter/reward_mean"] == [2.0, 4.0] and events["prior/retries"] == [1.0, 1.0]
    assert "memory/peak_mb" in events and "time/iteration_s" in events
    assert lines(tmp_path, "episodes.jsonl") == 2 * [
        {"total_reward": 2.0, "score": 3.0, "steps": 5, "won": False, "env_step": 20, "game": "toy"}
    ]


def evaluation(mode, score, *, episodes=1):
    return Evaluation(mode, [score - 1] * episodes, [score] * episodes, wins=0, max_score=10.0)


def test_run_logger_merges_the_evaluations_of_several_games(tmp_path):
    run_logger = RunLogger(tmp_path, make_settings())
    results = {
        ("random", False): {"a": evaluation("random", 1.0), "b": evaluation("random", 3.0)},
        ("world_model", False): {"a": evaluation("world_model", 5.0), "b": evaluation("world_model", 7.0)},
        ("random", True): {"c": evaluation("random", 4.0)},
    }
    merged = run_logger.log_evaluations(results, env_step=48, prior_fallbacks=2.0)
    run_logger.close()
    assert {name: e.scores for name, e in merged.items()} == {
        "random": [1.0, 3.0],
        "world_model": [5.0, 7.0],
        "unseen_random": [4.0],
    }
    events = read_events(tmp_path)
    assert events["evaluator_step/random_score_mean"] == [2.0]
    assert events["evaluator_step/unseen_random_score_mean"] == [4.0]
    assert events["evaluator_step/reward_mean"] == events["evaluator_step/world_model_reward_mean"] == [5.0]
    assert events["evaluator_step/prior_fallbacks"] == [2.0]
    written = lines(tmp_path, "evaluations.jsonl")
    assert [(line["game"], line["mode"], line["unseen"], line["env_step"]) for line in written] == [
        ("a", "random", False, 48),
        ("b", "random", False, 48),
        ("a", "world_model", False, 48),
        ("b", "world_model", False, 48),
        ("c", "random", True, 48),
    ]


def test_run_logger_state_dict_holds_sizes_time_and_last_metrics(tmp_path):
    first = RunLogger(tmp_path, make_settings())
    first.writer.write({"a": 1.0}, step=1, axis="iteration")
    first.log_evaluations({("random", False): {"a": evaluation("random", 1.0)}}, env_step=1)
    state = first.state_dict()
    assert state["sizes"] == {
        path.name: path.stat().st_size for path in [*tmp_path.glob("*.jsonl"), *tmp_path.glob("events*")]
    }
    assert json.dumps(state) and state["last"]["a"] == 1.0
    first.close()
    again = RunLogger(tmp_path, make_settings(), state={**state, "seconds": 1000.0})
    assert again.seconds >= 1000 and again.writer.last == state["last"]
    again.writer.write({"a": 2.0}, step=2, axis="iteration")
    again.close()
    assert len(list(tmp_path.glob("events*"))) == 2  # one for each process, so that none is overwritten
    assert read_events(tmp_path)["a"] == [1.0, 2.0]


def test_fingerprint_detects_a_change_anywhere():
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(3)}
    before = fingerprint(tensors)
    assert count_moved(before, fingerprint(tensors)) == 0
    swapped = {"w": tensors["w"].flip(0), "v": tensors["v"]}
    assert count_moved(before, fingerprint(swapped)) == 1


@pytest.mark.parametrize(("counters", "finished"), [((10, 0), True), ((9, 99), False), ((0, 100), True)])
def test_counters_say_when_a_run_is_finished(counters, finished):
    run = RunSettings(max_iter=10, max_env_step=100)
    assert Counters(*counters).is_finished(run) == finished
