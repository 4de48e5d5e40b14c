"""Speed of a run on a Ray cluster: collection with 1, 2 and 4 collectors, and the updates of each learner.

    python scripts/bench_ray.py                  # measure on this machine, and estimate more GPUs
    python scripts/bench_ray.py --model_only     # only estimate

Collection is measured without learning, from the iteration in which the last collector returns its first result. The
updates are measured in a run with both learners. A model estimates the time of an iteration with more GPUs; its GPU
figures are assumptions and were not measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_tools import RESULTS, SMALL_SETTINGS, at_least, write_json

NEVER = 10**9  # iterations
ACTIVITIES = ("LLM_prior", "search", "games", "text_encoder")

# Assumptions of the model about one GPU of the A100 class.
GPU = {
    "flops": 120e12,  # of a large matrix product in bfloat16
    "efficiency": 0.4,  # share of it that training and scoring reach
    "network_bytes_per_s": 12e9,  # between nodes, to each server
    "seconds_per_sync": 1.0,  # loading the parameters, resetting the prefix cache, comparing with the training copy
}
LLM = {"parameters": 0.5e9, "prompt_tokens": 600, "command_tokens": 64, "bytes_per_parameter": 2}
RUN = {"env_steps_per_iteration": 160, "decisions_per_ppo_step": 1024}


def read_scalar(folder: Path, tag: str) -> list[tuple[float, float]]:
    """``(wall time, value)`` of a metric in a run's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(e.wall_time, e.value) for e in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def train(folder: Path, name: str, **groups: dict[str, Any]) -> Path:
    """Train with small models and changes in some groups. Returns the run's folder."""
    from priorzero.cluster.train import run_on_cluster
    from priorzero.config import resolve_settings

    settings = resolve_settings(
        SMALL_SETTINGS,
        {
            "run": {"output_dir": str(folder), "exp_name": name, "num_threads": 1},
            "env": {"collector_env_num": 1},
            "prior": {"timeout_s": 300.0},
            "eval": {"every": NEVER, "at_start": False, "modes": ["world_model"], "episodes": 1},
        },
        groups,
    )
    return run_on_cluster(settings).folder


def measure_collection(folder: Path, *, collectors: int, iterations: int) -> dict[str, Any]:
    """Environment steps a second with some collectors, and the share of the time of each activity."""
    run = train(
        folder,
        f"collect{collectors}",
        run={"max_iter": iterations * collectors},
        cluster={"num_collectors": collectors},
        train={"update_every": NEVER},
        llm={"update_every": NEVER},
    )
    # From the iteration in which the last collector returns its first result, if the collectors take turns.
    steps = read_scalar(run, "collector_iter/env_steps")[collectors - 1 :]
    total = sum(value for _, value in read_scalar(run, "time/iteration_s"))
    return {
        "collectors": collectors,
        "env_steps_per_s": (steps[-1][1] - steps[0][1]) / (steps[-1][0] - steps[0][0]),
        "shares": {name: sum(value for _, value in read_scalar(run, f"time/{name}_s")) / total for name in ACTIVITIES},
    }


def measure_learning(folder: Path) -> dict[str, float]:
    """Mean seconds of the learners' updates, and the decisions of a PPO step."""
    run = train(
        folder,
        "learn",
        run={"max_iter": 6},
        cluster={"num_collectors": 1},
        llm={"update_every": 2, "learning_rate": 1e-5},
        ppo={"critic_warmup_steps": 0},
    )
    measured = {}
    for name in ("world_model_turn_s", "ppo_step_s", "publish_s"):
        values = [value for _, value in read_scalar(run, f"cluster/{name}")]
        measured[name] = sum(values) / len(values)
    return measured | {"ppo_samples": read_scalar(run, "ppo/samples")[-1][1]}


def model_seconds(num_gpus: int) -> dict[str, float]:
    """Estimated seconds of the parts of an iteration.

    A quarter of the GPUs computes priors, one searches, and the others train the LLM.
    """
    servers = max(1, num_gpus // 4)
    learners = max(1, num_gpus - servers - 1)
    share = 0.45 if num_gpus == 1 else 1.0  # on one GPU, server and learner share it with the search
    rate = GPU["flops"] * GPU["efficiency"] * share
    tokens = LLM["prompt_tokens"] + LLM["command_tokens"]
    scoring = RUN["env_steps_per_iteration"] * tokens * 2 * LLM["parameters"] / (rate * servers)
    # Actor and critic: forward and backward take 6 operations a parameter and token, the values before the step 2.
    learning = RUN["decisions_per_ppo_step"] * tokens * (2 * 6 + 2) * LLM["parameters"] / (rate * learners)
    # Ring all-reduce of float32 gradients of actor and critic.
    exchange = 0.0 if learners == 1 else 2 * 2 * 4 * LLM["parameters"] / GPU["network_bytes_per_s"]
    publish = GPU["seconds_per_sync"] + LLM["parameters"] * LLM["bytes_per_parameter"] / GPU["network_bytes_per_s"]
    return {"score": scoring, "PPO step": learning + exchange, "publish": publish}


def print_measured(measured: dict[str, Any]) -> None:
    """Print the measurements."""
    print("| collectors | env steps/s | LLM prior | search | games | text encoder |\n|---|---|---|---|---|---|")
    for row in measured["collection"]:
        shares = " | ".join(f"{row['shares'][name]:.0%}" for name in ACTIVITIES)
        print(f"| {row['collectors']} | {row['env_steps_per_s']:.2f} | {shares} |")
    print(
        f"\nworld-model updates of an iteration {measured['world_model_turn_s']:.1f} s, PPO step of "
        f"{measured['ppo_samples']:.0f} decisions {measured['ppo_step_s']:.1f} s, publishing parameters "
        f"{measured['publish_s']:.1f} s\n"
    )


def print_model() -> None:
    """Print the model."""
    print("| GPUs | score an iteration, s | PPO step, s | publish, s | the longest |\n|---|---|---|---|---|")
    for num_gpus in (1, 8, 64):
        parts = model_seconds(num_gpus)
        longest = max(parts, key=parts.__getitem__)
        print(f"| {num_gpus} | {' | '.join(f'{value:.1f}' for value in parts.values())} | {longest} |")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model_only", action="store_true", help="print the model only")
    parser.add_argument("--iterations", type=at_least(2), default=6, help="iterations of each collector (default: 6)")
    options = parser.parse_args(argv)
    if not options.model_only:
        with tempfile.TemporaryDirectory() as folder:
            collection = [
                measure_collection(Path(folder), collectors=n, iterations=options.iterations) for n in (1, 2, 4)
            ]
            measured = {"collection": collection, **measure_learning(Path(folder))}
        write_json(RESULTS / "ray.json", measured)
        print_measured(measured)
    print_model()
    return 0


if __name__ == "__main__":
    sys.exit(main())
