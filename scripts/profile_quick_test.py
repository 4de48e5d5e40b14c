"""Where the quick test spends its CPU time, sampled with py-spy. Takes about two minutes.

    python scripts/profile_quick_test.py

Running threads are sampled from the second iteration on, when loading and starting are over. The game runs in another
process and is not sampled. The script also measures the time until the first action.
"""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bench_tools import RESULTS, ROOT, write_json

# Parts of the program, and patterns of the stack frames that belong to them, such as
# `forward (torch/nn/modules/linear.py:134)`. The first part with a matching frame counts.
PARTS = (
    ("search tree", r"\(priorzero/search/tree\.py"),
    ("backward and optimiser", r"\(torch/(autograd|optim|_tensor\.py)|clip_grad"),
    ("model forward", r"\(torch/nn/modules|\(transformers/(models|modeling)|\(lzero/model"),
    ("log-probabilities, losses", r"^(completion_logprobs|sft_loss|rft_loss|compute_loss\w*) \("),
)

# Frames of threads that wait. py-spy sometimes counts such threads as running.
WAITING = r"\((threading|selectors|queue|concurrent/futures/thread|multiprocessing/connection)\.py"


class ProfileError(Exception):
    """The quick test could not be profiled. The message says why."""


def part_of(stack: str) -> str:
    """The part of the program that a stack belongs to.

    Args:
        stack: frames from the outermost to the innermost, separated by semicolons.
    """
    frames = [re.sub(r"\((\S*/site-packages/|\S*/(?=priorzero/))", "(", frame) for frame in stack.split(";")]
    if re.search(WAITING, frames[-1]):
        return "waiting"
    for name, pattern in PARTS:
        if any(re.search(pattern, frame) for frame in frames):
            return name
    own = [frame for frame in frames if "(priorzero/" in frame]
    return "other: " + re.sub(r":\d+\)", ")", (own or frames)[-1])


def wait_for_second_iteration(run: subprocess.Popen[bytes], log: Path, *, started: float) -> float:
    """Wait until the second iteration is logged. Returns the seconds until the first action.

    Raises:
        ProfileError: the run has ended.
    """
    first_s = None
    while True:
        text = log.read_text(encoding="utf-8") if log.exists() else ""
        if first_s is None and "the first actions are taken" in text:
            first_s = time.monotonic() - started
        if first_s is not None and "iteration 2," in text:
            return first_s
        if run.poll() is not None:
            raise ProfileError(f"the run ended with exit code {run.returncode} (see above)")
        time.sleep(0.05)


def sample_stacks(spy: str, pid: int, file: Path) -> collections.Counter[str]:
    """Sample a process for a minute. Returns the number of samples of each part.

    Raises:
        ProfileError: py-spy failed.
    """
    command = [spy, "record", "--pid", str(pid), "--format", "raw", "--duration", "60", "--rate", "50"]
    done = subprocess.run([*command, "--threads", "--output", str(file)], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise ProfileError(
            "py-spy cannot read the process (see above); if the system does not permit it, run as root or set "
            "kernel.yama.ptrace_scope=0"
        )
    counts: collections.Counter[str] = collections.Counter()
    for line in file.read_text(encoding="utf-8").splitlines():
        stack, _, count = line.rpartition(" ")
        counts[part_of(stack)] += int(count)
    counts.pop("waiting", None)
    return counts


def profile(spy: str) -> tuple[collections.Counter[str], float]:
    """Run the quick test. Returns the samples of each part, and the seconds until the first action."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "priorzero.entry", "--quick_test", "--exp_name", "run", "--max_iter", "100"]
        started = time.monotonic()
        changes = ["--set", f"run.output_dir={folder}", "--set", "eval.at_start=false"]
        run = subprocess.Popen([*command, *changes], cwd=ROOT)
        try:
            first_s = wait_for_second_iteration(run, Path(folder) / "run/log/run.log", started=started)
            return sample_stacks(spy, run.pid, Path(folder) / "samples"), first_s
        finally:
            run.kill()
            run.wait()


def print_shares(shares: Mapping[str, float], *, other: float, total: int) -> None:
    """Print the shares of all parts that have at least 0.1%."""
    for name, share in shares.items():
        if share >= 0.001:
            print(f"{share:7.1%}  {name}")
    print(f"{other:7.1%}  outside of models and search tree, of {total} samples (goal: less than 10%)")


def main() -> int:
    """Returns the exit code: 0, or 2 if the quick test could not be profiled."""
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if spy is None:
        print("error: py-spy is not installed; type: pip install py-spy", file=sys.stderr)
        return 2
    try:
        counts, first_s = profile(spy)
    except ProfileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    total = counts.total()
    shares = {name: count / total for name, count in counts.most_common()}
    other = sum(share for name, share in shares.items() if name.startswith("other"))
    print_shares(shares, other=other, total=total)
    print(f"{first_s:7.1f}  seconds until the first action (goal: less than 12)")
    write_json(
        RESULTS / "profile.json", {"shares": shares, "other": other, "samples": total, "first_action_s": first_s}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
