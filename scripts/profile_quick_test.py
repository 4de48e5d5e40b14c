"""Where the quick test's processor time goes, by py-spy's samples of whole iterations. Takes about two minutes.

    python scripts/profile_quick_test.py

Samples are taken of threads that are running, from the second iteration on (loading and starting are over then). The
game runs in a process of its own and is not among them. Also says how long it took until the first command was given.
"""

from __future__ import annotations

import collections
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_tools import RESULTS

# What frames of a stack say about it, such as `forward (torch/nn/modules/linear.py:134)`; the first that fits counts.
PARTS = (
    ("search tree", r"\(priorzero/tree\.py"),
    ("backward and optimiser", r"\(torch/(autograd|optim|_tensor\.py)|clip_grad"),
    ("model forward", r"\(torch/nn/modules|\(transformers/(models|modeling)|\(lzero/model"),
    ("log-probabilities, losses", r"^(completion_logprobs|sft_loss|rft_loss|compute_loss\w*) \("),
)

# Threads that wait for one another, which py-spy takes for running ones now and then; they do not count.
WAITING = r"\((threading|selectors|queue|concurrent/futures/thread|multiprocessing/connection)\.py"


def part_of(stack: str) -> str:
    """What a stack of py-spy's (frames from the outermost on, with semicolons between them) was busy with."""
    frames = [re.sub(r"\((\S*/site-packages/|\S*/(?=priorzero/))", "(", frame) for frame in stack.split(";")]
    if re.search(WAITING, frames[-1]):
        return "waiting"
    for name, pattern in PARTS:
        if any(re.search(pattern, frame) for frame in frames):
            return name
    ours = [frame for frame in frames if "(priorzero/" in frame]
    return "other: " + re.sub(r":\d+\)", ")", (ours or frames)[-1])


def main() -> int:
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if spy is None:
        print("error: py-spy is not installed; type: pip install py-spy", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        log, samples = Path(folder) / "run/log/run.log", Path(folder) / "samples"
        command = [sys.executable, "-m", "priorzero.entry", "--quick_test", "--exp_name", "run", "--max_iter", "100"]
        started = time.monotonic()
        run = subprocess.Popen([*command, "--set", f"run.output_dir={folder}"], cwd=RESULTS.parent)
        try:
            first_s = None
            while not (log.exists() and re.search(r"iteration 2,", log.read_text())):
                if first_s is None and log.exists() and "first commands" in log.read_text():
                    first_s = time.monotonic() - started
                if run.poll() is not None:
                    print(f"error: the run ended with exit code {run.returncode}, see above", file=sys.stderr)
                    return 1
                time.sleep(0.05)
            record = [spy, "record", "--pid", str(run.pid), "--format", "raw", "--duration", "60", "--rate", "50"]
            spied = subprocess.run([*record, "--threads", "--output", str(samples)], stdout=subprocess.DEVNULL)
            if spied.returncode:
                hint = "where the system forbids it, run as root or set kernel.yama.ptrace_scope=0"
                print(f"error: py-spy could not look into the run (its message is above); {hint}", file=sys.stderr)
                return 2
        finally:
            run.kill()
            run.wait()
        counts: collections.Counter[str] = collections.Counter()
        for line in samples.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            counts[part_of(stack)] += int(count)
    counts.pop("waiting", None)
    total = counts.total()
    shares = {name: count / total for name, count in counts.most_common()}
    for name, share in shares.items():
        if share >= 0.001:
            print(f"{share:7.1%}  {name}")
    outside = sum(share for name, share in shares.items() if name.startswith("other"))
    print(f"{outside:7.1%}  outside models and search tree, of {total} samples (goal: less than 10%)")
    assert first_s is not None, "the second iteration comes after the first command"
    print(f"{first_s:7.1f}  seconds until the first command (goal: less than 20)")
    RESULTS.mkdir(exist_ok=True)
    found = {"shares": shares, "outside": outside, "samples": total, "first_command_s": first_s}
    (RESULTS / "profile.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
