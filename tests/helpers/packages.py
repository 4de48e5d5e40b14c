"""The example package of a game, installed into a folder without network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "example_game"
REPOSITORY = EXAMPLE.parent.parent


def install(source: Path, target: Path) -> Path:
    """Build the package in the folder ``source`` with setuptools, and install it into ``target``, as pip does.

    A wheel of pure Python is installed by unpacking it. pip itself is not needed, which a virtual environment may lack.
    """
    work = target.parent / f"{target.name}-build"
    shutil.copytree(source, work)  # setuptools writes into the source folder
    build = "import setuptools.build_meta as backend; print(backend.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(work / done.stdout.split()[-1]) as wheel:
        wheel.extractall(target)
    return target


def write_package(folder: Path, name: str, *, code: str, entry_points: dict[str, str], version: str = "1.0") -> None:
    """Write an installed package ``name`` with one module of this name into ``folder``."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{key} = {value}" for key, value in entry_points.items()]
    (info / "entry_points.txt").write_text("[priorzero.games]\n" + "\n".join(lines) + "\n")


def run_command(module: str, *arguments: str, packages: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``python -m MODULE ARGUMENTS`` in the folder ``cwd``, with the packages in the folder ``packages``."""
    path = os.pathsep.join([str(REPOSITORY), str(packages)])
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
