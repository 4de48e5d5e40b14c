"""Unpacks parts of a bundle that ``bundle.py`` made: ``python unpack.py PART... TARGET``. Imports no other package.

A part is a tar file. It contains ``base.tar.xz``, or pieces of large files, whose names end with ``.1of3``. A file is
joined as soon as all its pieces are there.
"""

from __future__ import annotations

import compileall
import re
import shlex
import shutil
import sys
import tarfile
import time
from pathlib import Path

BASE = "base.tar.xz"
PYTHON_VERSION = (3, 12)  # bundle.py packs packages for it
PIECE = re.compile(r"(?P<file>.+)\.(?P<number>\d+)of(?P<count>\d+)")


def main(arguments: list[str]) -> int:
    """Unpack the parts, write ``TARGET/env.sh`` and print its lines; returns the exit code."""
    if len(arguments) < 2 or arguments[0].startswith("-"):
        print("usage: unpack.sh PART... TARGET (the parts that bundle.sh made, and a folder)", file=sys.stderr)
        return 2
    *parts, target = map(Path, arguments)
    missing = [str(part) for part in parts if not part.is_file()]
    if missing:
        print(f"error: no such file: {', '.join(missing)}; give the parts that bundle.sh made", file=sys.stderr)
        return 2
    if sys.version_info[:2] != PYTHON_VERSION:
        have, need = (".".join(map(str, version)) for version in (sys.version_info[:2], PYTHON_VERSION))
        print(f"error: the packages are for Python {need}, this is {have}; type PYTHON=python{need}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    target = target.absolute()
    try:
        target.mkdir(parents=True, exist_ok=True)
        for part in parts:
            unpack(part, target)
    except (OSError, EOFError, tarfile.TarError) as error:
        print(f"error: {error}; give a folder, and parts that were copied completely", file=sys.stderr)
        return 2
    waiting = sorted(str(file.relative_to(target)) for file in target.rglob("*") if PIECE.fullmatch(file.name))
    print(f"unpacked to {target} in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    if waiting:
        print(f"pieces that wait for other parts: {', '.join(waiting)}", file=sys.stderr)
    variables = write_variables(target)
    print(variables, end="")
    return 0


def unpack(part: Path, target: Path) -> None:
    """Unpack one part into the folder ``target``, and join the files that are complete."""
    with tarfile.open(part, "r:") as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None, member.name
            if member.name == BASE:
                with tarfile.open(fileobj=content, mode="r|xz") as base:
                    base.extractall(target, filter="tar")
                # Otherwise the first import of each module compiles it, which takes half a minute in all.
                compileall.compile_dir(target / "site", quiet=2, workers=0)
                continue
            piece = target / member.name
            if piece.with_suffix("").is_file():  # the part was unpacked before
                continue
            piece.parent.mkdir(parents=True, exist_ok=True)
            with piece.open("wb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
            join(piece)


def join(piece: Path) -> None:
    """Join the file that ``piece`` belongs to, if all its pieces are there, and remove these."""
    match = PIECE.fullmatch(piece.name)
    assert match is not None, piece
    pieces = [piece.with_name(f"{match['file']}.{n}of{match['count']}") for n in range(1, int(match["count"]) + 1)]
    if not all(other.is_file() for other in pieces):
        return
    with pieces[0].open("ab") as file:
        for other in pieces[1:]:
            with other.open("rb") as rest:
                shutil.copyfileobj(rest, file, 1 << 20)
    pieces[0].rename(piece.with_name(match["file"]))
    for other in pieces[1:]:
        other.unlink()


def write_variables(target: Path) -> str:
    """Write ``env.sh``, which sets the variables that PriorZero and its packages need; returns its text."""
    repository = Path(__file__).resolve().parents[2]
    values = {
        "PYTHONPATH": f"{repository}:{target / 'site'}",
        "PRIORZERO_GAMES": str(target / "games"),
        "XDG_CACHE_HOME": str(target / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())
    (target / "env.sh").write_text(text)
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
