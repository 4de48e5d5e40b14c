"""What a run on a Ray cluster takes: collection with 1, 2 and 4 collectors, and one turn of each learner.

    python scripts/bench_ray.py                  # measures on this machine, and applies the model of docs/scaling.md
    python scripts/bench_ray.py --model_only     # the model alone

Collection is timed from when every collector has come once to the last iteration, while nobody learns; the turns of
the learners come from a run with both. The model says where an iteration's time would go with more GPUs; none
of its GPU figures was measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from bench_tools import RESULTS

NEVER = 10**9

# What the model takes of one A100-class GPU; nothing here was measured by this project.
GPU = {
    "flops": 120e12,  # bfloat16, what a large matrix product reaches; training and scoring are taken to get 40%
    "efficiency": 0.4,
    "network_bytes_per_s": 12e9,  # between nodes, to each server
    "seconds_per_sync": 1.0,  # reload, reset of the prefix cache, parity
}
LLM = {"parameters": 0.5e9, "prompt_tokens": 600, "command_tokens": 64, "bytes_per_parameter": 2}
RUN = {"env_steps_per_iteration": 160, "decisions_per_ppo_step": 1024, "world_model_updates": 80}


def timeline(folder: Path, tag: str) -> list[tuple[float, float]]:
    """``(wall time, value)`` of a scalar in a run's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(e.wall_time, e.value) for e in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def run(folder: Path, name: str, **groups: dict[str, Any]) -> Path:
    from priorzero.cluster.train import run_on_cluster
    from priorzero.config import PRESETS, resolve_settings

    settings = resolve_settings(
        PRESETS["quick_test"],
        {
            "run": {"output_dir": str(folder), "exp_name": name, "num_threads": 1},
            "env": {"collector_env_num": 1},
            "prior": {"timeout_s": 300.0},
            "eval": {"every": NEVER, "modes": ["world_model"], "episodes": 1},
        },
        *({group: values} for group, values in groups.items()),
    )
    return run_on_cluster(settings).folder


def measure(iterations: int) -> dict[str, Any]:
    """Everything that is measured here."""
    measured: dict[str, Any] = {"collection": []}
    with tempfile.TemporaryDirectory() as scratch:
        for collectors in (1, 2, 4):
            folder = run(
                Path(scratch),
                f"collect{collectors}",
                run={"max_iter": iterations * collectors},
                cluster={"num_collectors": collectors},
                train={"update_every": NEVER},
                llm={"update_every": NEVER},
            )
            steps = timeline(folder, "collector_iter/env_steps")[collectors - 1 :]  # from when each has come once
            shares = {t: timeline(folder, f"time/{t}_s") for t in ("LLM_prior", "search", "games", "text_encoder")}
            spent = sum(value for _, value in timeline(folder, "time/iteration_s"))
            measured["collection"].append(
                {
                    "collectors": collectors,
                    "env_steps_per_s": (steps[-1][1] - steps[0][1]) / (steps[-1][0] - steps[0][0]),
                    "shares": {t: sum(value for _, value in values) / spent for t, values in shares.items()},
                }
            )
        folder = run(
            Path(scratch),
            "learn",
            run={"max_iter": 6},
            cluster={"num_collectors": 1},
            llm={"update_every": 2, "learning_rate": 1e-5},
            ppo={"critic_warmup_steps": 0},
        )
        for tag in ("cluster/world_model_turn_s", "cluster/ppo_step_s", "cluster/publish_s"):
            values = [value for _, value in timeline(folder, tag)]
            measured[tag.removeprefix("cluster/")] = sum(values) / len(values)
        measured["ppo_samples"] = timeline(folder, "ppo/samples")[-1][1]
    return measured


def model(gpus: int) -> dict[str, float]:
    """Seconds of an iteration's parts with so many GPUs, of which a quarter serve and the rest but one learn."""
    servers = max(1, gpus // 4)
    learners = max(1, gpus - servers - 1)
    share = 0.45 if gpus == 1 else 1.0  # one GPU: servers and learners have less than half each
    rate = GPU["flops"] * GPU["efficiency"] * share
    tokens = LLM["prompt_tokens"] + LLM["command_tokens"]
    scoring = RUN["env_steps_per_iteration"] * tokens * 2 * LLM["parameters"] / (rate * servers)
    # Actor and critic, forward and backward (6 operations a parameter and token), values before (2).
    learning = RUN["decisions_per_ppo_step"] * tokens * (2 * 6 + 2) * LLM["parameters"] / (rate * learners)
    exchange = 0.0 if learners == 1 else 2 * 2 * 4 * LLM["parameters"] / GPU["network_bytes_per_s"]  # ring, float32
    publish = GPU["seconds_per_sync"] + LLM["parameters"] * LLM["bytes_per_parameter"] / GPU["network_bytes_per_s"]
    return {"score": scoring, "PPO step": learning + exchange, "publish": publish}


def show(measured: dict[str, Any]) -> None:
    print("| collectors | env steps/s | LLM prior | search | games | text encoder |\n|---|---|---|---|---|---|")
    for row in measured["collection"]:
        shares = " | ".join(f"{row['shares'][t]:.0%}" for t in ("LLM_prior", "search", "games", "text_encoder"))
        print(f"| {row['collectors']} | {row['env_steps_per_s']:.2f} | {shares} |")
    print(
        f"\nworld model's turn {measured['world_model_turn_s']:.1f} s, PPO step of {measured['ppo_samples']:.0f} "
        f"decisions {measured['ppo_step_s']:.1f} s, publish {measured['publish_s']:.1f} s\n"
    )


def show_model() -> None:
    print("| GPUs | score an iteration, s | PPO step, s | publish, s | the longest |\n|---|---|---|---|---|")
    for gpus in (1, 8, 64):
        parts = model(gpus)
        longest = max(parts, key=parts.__getitem__)
        print(f"| {gpus} | {' | '.join(f'{value:.1f}' for value in parts.values())} | {longest} |")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model_only", action="store_true", help="do not measure")
    parser.add_argument("--iterations", type=int, default=6, help="of each collector (default: 6)")
    options = parser.parse_args(argv)
    if not options.model_only:
        measured = measure(options.iterations)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "ray.json").write_text(json.dumps(measured, indent=1), encoding="utf-8")
        show(measured)
    show_model()
    return 0


if __name__ == "__main__":
    sys.exit(main())
