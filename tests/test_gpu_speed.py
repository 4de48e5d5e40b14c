"""scripts/gpu/speed.py: its figures are finite, differences are detected, and times and traces are read correctly."""

from __future__ import annotations

import math

import pytest
import speed
import speed_llm
import speed_profile
import speed_tools
import speed_world_model
import torch
from bench_prior import RecordingEngine
from gpu_context import Context

from priorzero.llm.packing import PromptRow, pack

CPU = torch.device("cpu")


@pytest.fixture
def context(tmp_path):
    return Context(CPU, "random", "random", quick=True, out=tmp_path / "out")


# ---- the checks ----

# One of each kind.
MEASURED = {
    "ceilings": {"copy_gb_per_s", "bfloat16_tflops", "tf32_tflops", "float32_tflops", "launch_s"},
    "world_model_update_quick_test": {"seconds", "floor_s", "cpu_s", "ratio_cpu"},
    "search_2048_actions": {"e4_s", "e4_model_s", "e4_rest_s", "e4_ratio_one_root", "e4_goal_met", "floor_s"},
    "encoder": {"n4_s", "n4_ratio_padded_batch"},
}
COMPARED = {
    "prior_decision_qwen_bfloat16": {"k4_s", "k4_floor_s", "k4_ratio_one_prompt_per_action", "k4_ratio_padded_batch"},
    "prior_episode_smollm2_float32": {"cached_s", "uncached_s", "floor_s", "cached_ratio_one_prompt_per_action"},
    "prior_states_smollm2_bfloat16": {"rows1_s", "rows4_s", "rows4_floor_s", "rows4_ratio_one_row"},
    "llm_update_qwen_lora": {"seconds", "floor_s", "utilisation", "ratio_one_decision"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MEASURED, *COMPARED])
def test_checks_give_finite_figures(context, name):
    outcome = speed.CHECKS[name](context)
    assert outcome.ok is (True if name in COMPARED else None)
    assert outcome.figures.keys() >= {**MEASURED, **COMPARED}[name]
    numbers = [value for value in outcome.figures.values() if not isinstance(value, (str, bool))]
    assert all(math.isfinite(value) and value >= 0 for value in numbers)


def test_there_is_a_check_for_each_row_of_the_table():
    parts = {"ceilings": 1, "prior": 8, "llm": 4, "world": 2, "search": 2, "encoder": 1, "profile": 4}
    found = [name.partition("_")[0] for name in speed.CHECKS]
    assert {part: found.count(part) for part in dict.fromkeys(found)} == parts


def test_decision_check_fails_if_a_log_probability_differs(context, monkeypatch):
    right = speed_llm.logprobs_padded_batch
    monkeypatch.setattr(speed_llm, "logprobs_padded_batch", lambda *args: [a + 2e-4 for a in right(*args)])
    outcome = speed.CHECKS["prior_decision_smollm2_float32"](context)
    assert outcome.ok is False and outcome.figures["largest_difference"] == pytest.approx(2e-4, rel=0.1)


def test_states_check_fails_if_results_depend_on_the_rows_of_a_forward_pass(context, monkeypatch):
    right = RecordingEngine.compute_together

    def wrong(self, requests):
        shift = 1.0 * (self._engine.rows_per_forward > 1)
        return [[logprobs + shift for logprobs in own] for own in right(self, requests)]

    monkeypatch.setattr(RecordingEngine, "compute_together", wrong)
    assert speed.CHECKS["prior_states_smollm2_bfloat16"](context).ok is False


@pytest.mark.slow
def test_update_check_fails_if_the_loss_depends_on_the_micro_batch(context, monkeypatch):
    right = speed_llm.LLMLearner._losses

    def wrong(self, micro_batch):
        return {name: (1 + 1e-3 * (len(micro_batch) > 1)) * loss for name, loss in right(self, micro_batch).items()}

    monkeypatch.setattr(speed_llm.LLMLearner, "_losses", wrong)
    assert speed.CHECKS["llm_update_smollm2_full"](context).ok is False


def test_qwen_has_the_number_of_parameters_of_the_published_model():
    from transformers import AutoModelForCausalLM, Qwen2Config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**speed_llm.QWEN_SHAPE))
    assert sum(p.numel() for p in model.parameters()) == 494_032_768


# ---- times and lower bounds ----


def test_tree_counts():
    """Hand-counted: the last token of a completion is not computed, and a common prefix is computed once in a pass."""
    first = PromptRow([1, 2, 3, 4], [[5, 6], [5, 7, 8]])  # 4 + the nodes 5 and 7; 4, 5 and 7 predict
    second = PromptRow([1, 2, 9], [[5], [6, 6]])  # 3 + the node 6; it shares two tokens with the first
    assert speed_llm.tree_counts([first, second], rows_per_pass=1) == (6 + 4, 3 + 2, 2)
    assert speed_llm.tree_counts([first, second], rows_per_pass=2) == (8, 5, 1)
    for rows in ([first], [first, second]):
        batch = pack(rows, dtype=torch.float32, device="cpu")
        expected = (batch.input_ids.numel(), len(batch.predictors), 1)
        assert speed_llm.tree_counts(rows, rows_per_pass=2) == expected


def test_median_seconds_is_the_median_within_the_budget(monkeypatch):
    durations = iter([9.0, 1.0, 5.0, 2.0, 7.0])  # the first one is the warm-up
    now = 0.0

    def work():
        nonlocal now
        now += next(durations)
        return now

    monkeypatch.setattr(speed_tools.time, "perf_counter", lambda: now)
    spent, last = speed_tools.median_seconds(work, CPU, budget_s=7.5)
    assert (spent, last) == (2.0, 17.0)  # 1, 5 and 2; their sum exceeds the budget
    assert speed_tools.median_seconds(work, CPU, budget_s=0.0, warm_up=False)[0] == 7.0  # at least one call


def test_forward_floor_is_the_larger_of_reading_and_computing(context, monkeypatch):
    llm = speed_llm.make_llm(context, shape="smollm2", dtype="bfloat16")
    num_bytes = 2 * sum(p.numel() for p in llm.model.parameters())
    operations = speed_tools.forward_operations(llm, tokens=1000, predictors=10)

    def floor(*, bandwidth: float, rate: float) -> float:
        ceilings = speed_tools.Ceilings(bandwidth, {"bfloat16": rate, "float32": 1.0})
        monkeypatch.setattr(speed_tools, "measure_ceilings", lambda *args, **kwargs: ceilings)
        return speed_tools.forward_floor(llm, context, tokens=1000, predictors=10, passes=3)

    assert floor(bandwidth=1e3, rate=1e30) == pytest.approx(3 * num_bytes / 1e3)
    assert floor(bandwidth=1e30, rate=1e3) == pytest.approx(operations / 1e3)


def test_product_parameters_are_those_of_the_matrix_products(context):
    """Two layers of width 64: query, key, value and output, and two matrices of an MLP that is four times as wide."""
    policy = context.policy(CPU, feature_size=1280)
    transformer, others = speed_world_model.product_parameters(policy)
    assert transformer == 2 * (4 * 64 * 64 + 2 * 4 * 64 * 64)
    tables = 256 * 64  # of the actions; there are few other parameters
    total = sum(p.numel() for _, p in policy.trained_world_model_parameters())
    assert 0.95 * total < transformer + others + tables < total


def test_matmul_precision_is_restored():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError), speed_tools.matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before


def test_timed_calls_count_a_call_within_a_call_once(monkeypatch):
    now = 0.0

    class Model:
        size = 3

        def outer(self):
            nonlocal now
            now += 1.0
            return timed.inner(2.0)

        def inner(self, duration):
            nonlocal now
            now += duration
            return "result"

    timed = speed_world_model.TimedCalls(Model())
    monkeypatch.setattr(speed_world_model.time, "perf_counter", lambda: now)
    assert (timed.outer(), timed.seconds) == ("result", 3.0)
    assert (timed.inner(duration=0.5), timed.seconds, timed.size) == ("result", 3.5, 3)


# ---- profiles ----


def event(category, name, start, duration, *, thread=1, external=None):
    return {
        "cat": category,
        "name": name,
        "ts": start,
        "dur": duration,
        "pid": 1,
        "tid": thread,
        "args": {} if external is None else {"External id": external},
    }


# An operator that calls two others, one of which calls an operator of its own name; two kernels overlap.
EVENTS = [
    {"ph": "M", "name": "process_name", "pid": 1, "args": {}},
    event("cpu_op", "linear", 0.0, 100.0, external=1),
    event("cpu_op", "copy", 10.0, 20.0, external=2),
    event("cpu_op", "mm", 40.0, 50.0, external=3),
    event("cpu_op", "mm", 50.0, 5.0, external=4),
    event("cpu_op", "copy", 5.0, 7.0, thread=2, external=5),
    event("cuda_runtime", "cudaLaunchKernel", 45.0, 2.0),
    event("cuda_driver", "cuLaunchKernelEx", 47.0, 2.0),
    event("cuda_runtime", "cudaGraphLaunch", 50.0, 2.0),
    event("cuda_runtime", "cudaStreamSynchronize", 60.0, 2.0),
    event("kernel", "gemm", 100.0, 30.0, external=3),
    event("kernel", "gemm", 120.0, 20.0, external=4),  # 10 of it overlap with the other one
    event("gpu_memcpy", "Memcpy HtoD", 200.0, 10.0, external=2),
    event("kernel", "replayed", 300.0, 50.0),
    event("gpu_user_annotation", "Optimizer.step", 0.0, 1000.0),
]


def test_trace_figures():
    assert speed_profile.trace_figures(EVENTS, seconds=0.001) == {
        "kernels": 3,
        "copies": 1,
        "launches": 3,
        "synchronisations": 1,
        "device_s": pytest.approx(100e-6),  # 40 + 10 + 50
        "device_busy": pytest.approx(0.1),
    }
    assert speed_profile.trace_figures(EVENTS[:6], seconds=0.001) == {}


def test_operator_times():
    assert speed_profile.operator_cpu_times(EVENTS) == {"linear": [30.0], "copy": [20.0, 7.0], "mm": [45.0, 5.0]}
    by_operator = speed_profile.operator_device_times(EVENTS)
    assert by_operator == {"mm": [30.0, 20.0], "copy": [10.0], "(a CUDA graph, or no operator)": [50.0]}
    assert speed_profile.kernel_times(EVENTS) == {"gemm": [30.0, 20.0], "Memcpy HtoD": [10.0], "replayed": [50.0]}


@pytest.mark.slow
def test_profile_writes_the_operators_and_the_functions(context):
    outcome = speed.CHECKS["profile_search"](context)
    text = (context.out / "profile_search.txt").read_text(encoding="utf-8")
    assert outcome.ok is None and outcome.figures["seconds"] > 0
    assert "aten::addmm" in text and "mcts.py" in text and len(text) < 20_000
