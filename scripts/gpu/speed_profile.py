"""Where the time of a search, a prior and the updates goes: operators, kernels, Python functions."""

from __future__ import annotations

import cProfile
import io
import itertools
import json
import pstats
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_prior import request_of_length
from bench_search import make_roots
from bench_world_model import make_batch
from gpu_context import Context, Outcome
from speed_llm import SMOLLM2, Figures, llm_settings, make_learner, make_llm, make_samples
from speed_tools import BFLOAT16, FLOAT32, median_seconds, synchronize
from speed_world_model import FEATURE_SIZE, NUM_LEGAL, make_search_policy
from torch.profiler import ProfilerActivity, profile

from priorzero.llm.engines import PriorBuilder
from priorzero.llm.packing import split_completions
from priorzero.llm.prompts import prompt_style

ROWS = 12  # of a table
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of events in a trace
CALLS = ("cuda_runtime", "cuda_driver")
NUM_ACTIONS = 256
Work = Callable[[], Any]
Event = Mapping[str, Any]  # of a trace in Chrome's format; times are in microseconds


# ---- what is profiled ----


def search_work(context: Context) -> Work:
    """A search over four roots."""
    policy = make_search_policy(context, num_actions=NUM_ACTIONS)
    roots = make_roots(4, num_actions=NUM_ACTIONS, num_legal=NUM_LEGAL)
    return lambda: policy.search(roots, num_actions=NUM_ACTIONS)


def prior_work(context: Context) -> Work:
    """The prior of one decision with 16 actions, in this thread, because a profiler sees only one."""
    llm = make_llm(context, shape=SMOLLM2, dtype=default_dtype(context))
    builder = PriorBuilder(llm, prompt_style(llm_settings(context)))
    request = request_of_length(llm, tokens=60 if context.quick else 600, actions=16)

    @torch.inference_mode()
    def work() -> Any:
        token_logprobs, completion_mask = llm.token_logprobs([builder.row(request)])
        return builder.from_logprobs(split_completions(token_logprobs, completion_mask), version=0)

    return work


def llm_update_work(context: Context) -> Work:
    """An update of all parameters on 16 decisions, 8 in a forward pass: half a default batch keeps the trace small."""
    sizes = {"batch_size": 8, "micro_batch_size": 4} if context.quick else {"batch_size": 16}
    settings = llm_settings(context, **sizes)
    learner = make_learner(make_llm(context, shape=SMOLLM2, dtype=default_dtype(context)), settings)
    samples = make_samples(learner, settings)
    return lambda: learner.learn(samples)


def world_model_work(context: Context) -> Work:
    """An update of the world model with the default settings."""
    settings = context.settings()
    shape = (settings.train.batch_size, settings.world_model.num_unroll_steps + 1, FEATURE_SIZE)
    features = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    batch = make_batch(features, num_actions=settings.env.num_actions)
    policy = context.policy(context.device, feature_size=FEATURE_SIZE)
    numbers = itertools.count()
    return lambda: policy.learn_world_model(batch, train_iter=next(numbers))


def default_dtype(context: Context) -> str:
    """What ``llm.dtype=auto`` gives on the device."""
    return BFLOAT16 if context.device.type == "cuda" else FLOAT32


# ---- profiles ----


def check_profile(context: Context, name: str, make_work: Callable[[Context], Work]) -> Outcome:
    """Profile one call, and write the tables to ``profile_NAME.txt`` in the folder of the results."""
    work = make_work(context)
    work()  # warm-up, twice: a call may record CUDA graphs
    seconds, _ = median_seconds(work, context.device, budget_s=0.5)
    events = trace_events(work, context.device)
    figures: Figures = {"seconds": seconds, **trace_figures(events, seconds=seconds)}
    text = [
        f"{name}: {seconds:.6f} s without a profiler; device: {context.device}",
        "  ".join(f"{key}={value:.6g}" for key, value in figures.items()),
        times_table("Operators by time on the device", operator_device_times(events)),
        times_table("Operators by own time on the CPU (larger under the profiler)", operator_cpu_times(events)),
        times_table("Kernels and copies by time", kernel_times(events)),
        f"Functions of Python by own time (larger under this profiler)\n{profile_python(work)}",
    ]
    context.out.mkdir(parents=True, exist_ok=True)
    file = context.out / f"profile_{name}.txt"
    file.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    note = f"{file.name}; device_busy: share of the seconds without a profiler"
    if context.device.type == "cuda" and "kernels" not in figures:
        note = "the profiler recorded nothing on the GPU; it may lack the permission"
    return Outcome(None, figures, note)


def trace_events(work: Work, device: torch.device) -> list[dict[str, Any]]:
    """The events of one call, in Chrome's trace format."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        work()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return events


def trace_figures(events: Sequence[Event], *, seconds: float) -> Figures:
    """What the device did in one call.

    Args:
        events: of its trace.
        seconds: of the call without a profiler.

    Returns:
        The number of ``kernels``, of ``copies`` (and fills of memory), of ``launches`` of a kernel or a CUDA graph and
        of ``synchronisations``; ``device_s``, in which the device did something, and ``device_busy``, its share of
        ``seconds``. Empty if nothing ran on a GPU.
    """
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in DEVICE_WORK)
    if not spans:
        return {}
    busy_us, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy_us += max(0.0, stop - max(start, end))
        end = max(end, stop)
    calls = [e["name"] for e in events if e.get("cat") in CALLS]
    kernels = sum(e.get("cat") == "kernel" for e in events)
    return {
        "kernels": kernels,
        "copies": len(spans) - kernels,
        "launches": sum("LaunchKernel" in name or "GraphLaunch" in name for name in calls),
        "synchronisations": sum("Synchronize" in name for name in calls),
        "device_s": busy_us / 1e6,
        "device_busy": busy_us / 1e6 / seconds,
    }


def kernel_times(events: Sequence[Event]) -> dict[str, list[float]]:
    """The times of the kernels and copies by name, in microseconds."""
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in DEVICE_WORK:
            times.setdefault(event["name"], []).append(event["dur"])
    return times


def operator_device_times(events: Sequence[Event]) -> dict[str, list[float]]:
    """The times of the kernels and copies by the operator that started them, in microseconds."""
    operators = {e.get("args", {}).get("External id"): e["name"] for e in events if e.get("cat") == "cpu_op"}
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in DEVICE_WORK:
            name = operators.get(event.get("args", {}).get("External id"), "(a CUDA graph, or no operator)")
            times.setdefault(name, []).append(event["dur"])
    return times


def operator_cpu_times(events: Sequence[Event]) -> dict[str, list[float]]:
    """The own times of the operators on the CPU by name, without the operators that they call, in microseconds."""
    operators = sorted(
        (e for e in events if e.get("cat") == "cpu_op"), key=lambda e: (e["pid"], e["tid"], e["ts"], -e["dur"])
    )
    own_us = [float(event["dur"]) for event in operators]
    callers: list[int] = []  # the operators around the present one, outermost first
    for i, event in enumerate(operators):
        while callers and not _contains(operators[callers[-1]], event):
            callers.pop()
        if callers:
            own_us[callers[-1]] -= event["dur"]
        callers.append(i)
    times: dict[str, list[float]] = {}
    for event, own in zip(operators, own_us, strict=True):
        times.setdefault(event["name"], []).append(own)
    return times


def _contains(outer: Event, inner: Event) -> bool:
    """Whether an operator runs within another one, of the same thread."""
    same_thread = (outer["pid"], outer["tid"]) == (inner["pid"], inner["tid"])
    return same_thread and inner["ts"] < outer["ts"] + outer["dur"]


def times_table(title: str, times: Mapping[str, Sequence[float]]) -> str:
    """The names with the largest sums of times, which are in microseconds."""
    total = sum(map(sum, times.values()))
    ranked = sorted(times.items(), key=lambda entry: -sum(entry[1]))[:ROWS]
    lines = [
        f"{sum(own):12.1f} us {sum(own) / total:6.1%} {len(own):7} x {sum(own) / len(own):9.2f} us  {name[:120]}"
        for name, own in ranked
    ]
    return "\n".join([f"{title}: {total:.1f} us in all", *lines])


def profile_python(work: Work) -> str:
    """The functions of Python with the largest own times in one call."""
    profiler = cProfile.Profile()
    profiler.runcall(work)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(ROWS)
    return "\n".join(line for line in text.getvalue().splitlines() if line.strip())


# ---- the checks ----

WORK: dict[str, Callable[[Context], Work]] = {
    "search": search_work,
    "prior": prior_work,
    "llm_update": llm_update_work,
    "world_model": world_model_work,
}


def _make_check(name: str, make_work: Callable[[Context], Work]) -> Callable[[Context], Outcome]:
    return lambda context: check_profile(context, name, make_work)


CHECKS: dict[str, Callable[[Context], Outcome]] = {
    f"profile_{name}": _make_check(name, make_work) for name, make_work in WORK.items()
}
