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

# The first that matches a frame of the stack decides, from the outermost frame on.
PARTS = (
    ("search tree", r"priorzero/tree\.py"),
    ("backward and optimiser", r"torch/autograd|torch/optim|torch/_tensor\.py|clip_grad"),
    ("model forward", r"torch/nn/modules|transformers/models|transformers/modeling|lzero/model|lzero/policy|_compile"),
    ("log-probabilities, losses", r"priorzero/(completions|losses)\.py:(?!.*pack)"),
)


def part_of(stack: str) -> str:
    frames = stack.split(";")
    for name, pattern in PARTS[:1]:
        if re.search(pattern, frames[-1]):
            return name
    for name, pattern in PARTS[1:]:
        if any(re.search(pattern, frame) for frame in frames):
            return name
    ours = [frame for frame in frames if "priorzero/" in frame]
    return f"other: {re.sub(r':[0-9]+', '', ours[-1].split('/')[-1])}" if ours else "other: the rest"


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
                    return 1
                time.sleep(0.05)
            record = [spy, "record", "--pid", str(run.pid), "--format", "raw", "--duration", "60", "--rate", "50"]
            subprocess.run([*record, "--threads", "--output", str(samples)], check=True, stdout=subprocess.DEVNULL)
        finally:
            run.kill()
            run.wait()
        counts: collections.Counter[str] = collections.Counter()
        for line in samples.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            counts[part_of(stack)] += int(count)
    total = counts.total()
    shares = {name: count / total for name, count in counts.most_common()}
    for name, share in shares.items():
        if share >= 0.001:
            print(f"{share:7.1%}  {name}")
    outside = sum(share for name, share in shares.items() if name.startswith("other"))
    print(f"{outside:7.1%}  outside models and search tree, of {total} samples (goal: less than 10%)")
    print(f"{first_s:7.1f}  seconds until the first command (goal: less than 20)")
    RESULTS.mkdir(exist_ok=True)
    found = {"shares": shares, "outside": outside, "samples": total, "first_command_s": first_s}
    (RESULTS / "profile.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
