"""Checks of what a checkpoint holds, saved on one device and loaded on another, and of messages about GPUs."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_tools import ROOT
from correctness_llm import make_records
from correctness_world_model import FEATURE_SIZE, NO_DROPOUT, random_batch
from gpu_context import SMALL_LLM, Context, Figures, Outcome, random_llm

from priorzero.llm.engine_choice import choose_engine
from priorzero.llm.models import LanguageModel, choose_device
from priorzero.policy import PriorZeroPolicy
from priorzero.runs.checkpoint import save_tensors
from priorzero.runtime.gpu import gpu_is_ruled_out
from priorzero.runtime.random_state import global_random_state, seed_globals, set_global_random_state
from priorzero.types import UserError
from priorzero.world_model.batch import SampledDecisions

FLOAT32 = 1e-4


# ---- checkpoints ----


@dataclasses.dataclass(frozen=True)
class Models:
    """A policy with a small LLM, on one device."""

    context: Context
    policy: PriorZeroPolicy
    llm: LanguageModel

    @classmethod
    def make(cls, context: Context, device: torch.device | str, **llm_settings: Any) -> Models:
        """The same models on every device, except for the noise of new adapters."""
        own = {"path": random_llm(**SMALL_LLM), "micro_batch_size": 4, "learning_rate": 1e-3, **llm_settings}
        llm = context.language_model(device, **own)
        layers = [NO_DROPOUT, {"world_model": {"embed_dim": 64}, "llm": own}]
        return cls(context, context.policy(device, *layers, llm=llm, feature_size=FEATURE_SIZE), llm)

    def learn(self) -> dict[str, float]:
        """One update of each model; returns all losses."""
        metrics = self.policy.learn_world_model(random_batch(self.policy), train_iter=0)
        del metrics["priorities"]
        records = make_records(dataclasses.replace(self.context, quick=True), self.llm, tokens=20)
        returns = np.random.default_rng(1).normal(size=len(records))
        return {**metrics, **self.policy.learn_llm(SampledDecisions(records, returns, np.ones(len(records))))}

    def save(self, folder: Path) -> None:
        """Write the files of a checkpoint that depend on a device, as :class:`~priorzero.run_state.RunState` does."""
        folder.mkdir()
        save_tensors(self.policy.world_model_state(), folder / "world_model.pt")
        self.llm.save(folder / "llm")
        save_tensors({"policy": self.policy.training_state(), "random": global_random_state()}, folder / "training.pt")

    def load(self, folder: Path) -> None:
        """Load what :meth:`save` wrote, as a resumed run does."""
        self.policy.load_world_model_state(_read(folder / "world_model.pt"))
        state = _read(folder / "training.pt")
        self.llm.load(folder / "llm")
        self.policy.load_training_state(state["policy"])
        set_global_random_state(state["random"])

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of both models."""
        assert self.policy.llm_learner is not None
        return [self.policy._optimizer_world_model, self.policy.llm_learner.optimizer]

    def tensors(self) -> list[torch.Tensor]:
        """All parameters, buffers and moments of AdamW."""
        found = list(self.policy.network.state_dict().values())
        found += list(self.policy.target_network.state_dict().values())
        found += [tensor for name, tensor in self.llm.model.state_dict().items()]
        for optimizer in self.optimizers():
            for group in optimizer.param_groups:
                found += [optimizer.state[p][key] for p in group["params"] for key in sorted(optimizer.state[p])]
        return found

    def misplaced(self) -> int:
        """How many tensors are on another device than the models. AdamW's step counters may stay on the CPU."""
        kind = self.policy.network.world_model.pos_emb.weight.device.type
        return sum(tensor.device.type != kind and tensor.dim() > 0 for tensor in self.tensors())


def _read(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def check_checkpoint(context: Context, **llm_settings: Any) -> Outcome:
    """An update on one device, saved, loaded on the other, saved there, and loaded on the first again."""
    figures: Figures = {}
    ok = True
    for source, target in (("cpu", context.device), (context.device, "cpu")):
        name = f"{torch.device(source).type}_to_{torch.device(target).type}"
        with tempfile.TemporaryDirectory() as folder:
            ours, other, again = (Models.make(context, device, **llm_settings) for device in (source, target, source))
            ours.learn()
            ours.save(Path(folder, "first"))
            other.load(Path(folder, "first"))
            other.save(Path(folder, "second"))
            again.load(Path(folder, "second"))
        different = _num_different(ours.tensors(), other.tensors()) + _num_different(ours.tensors(), again.tensors())
        misplaced = other.misplaced() + again.misplaced()
        expected = ours.learn()
        next_update = max(_differences(other.learn(), expected), _differences(again.learn(), expected))
        figures |= {
            f"{name}_tensors": len(ours.tensors()),
            f"{name}_different": different,
            f"{name}_misplaced": misplaced,
            f"{name}_next_losses": next_update,
        }
        ok = ok and different == 0 and misplaced == 0 and next_update < FLOAT32
    return Outcome(ok, figures, "the update after loading has the losses that it has without saving")


def check_checkpoint_of_adapters(context: Context) -> Outcome:
    """The same with low-rank adapters."""
    return check_checkpoint(context, use_lora=True)


def _num_different(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> int:
    return sum(not torch.equal(a.cpu(), b.cpu()) for a, b in zip(ones, others, strict=True))


def _differences(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    return max(abs(value - other[name]) / max(1e-2, abs(other[name])) for name, value in one.items())


# ---- random numbers ----


def check_random_state(context: Context) -> Outcome:
    """The generators of Python, numpy, torch and the device continue after their state was saved and loaded."""

    def draw() -> tuple[float, float, list[float], list[float]]:
        own = torch.rand(4, device=context.device).tolist()
        return random.random(), float(np.random.rand()), torch.rand(4).tolist(), own

    before = global_random_state()
    try:
        seed_globals(np.random.SeedSequence(0).spawn(3))
        first = draw()
        with tempfile.TemporaryDirectory() as folder:
            save_tensors(global_random_state(), Path(folder) / "state.pt")
            expected = draw()
            set_global_random_state(_read(Path(folder) / "state.pt"))
        continued = draw() == expected
        seed_globals(np.random.SeedSequence(0).spawn(3))
        seeded = draw() == first
        set_global_random_state({**global_random_state(), "cuda": []})  # a checkpoint that was written without a GPU
        figures: Figures = {
            "continued": continued,
            "seeded": seeded,
            "differ": first != expected,
            "gpu_generators": len(before["cuda"]),
        }
    finally:
        set_global_random_state(before)
    return Outcome(continued and seeded and first != expected, figures)


# ---- messages ----


def run_entry(*arguments: str, timeout_s: float = 60.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m priorzero.entry``; its output is in ``stdout`` and ``stderr``."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "priorzero.entry", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def check_no_gpu_message(context: Context) -> Outcome:
    """Whether there is a GPU is known, and ``run.device=cuda`` without one is an error that says what to type."""
    is_gpu = context.device.type == "cuda"
    found = not gpu_is_ruled_out() and choose_device("auto").type == "cuda" and choose_device("cuda").type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--quick_test", "--set", "run.device=cuda", "--set", f"run.output_dir={folder}"]
        hidden = run_entry(*arguments, CUDA_VISIBLE_DEVICES="")
        is_empty = not os.listdir(folder)
    message = hidden.stderr.strip().splitlines()[-1:]
    figures: Figures = {"gpu_found": found, "exit_code": hidden.returncode, "no_files": is_empty}
    ok = hidden.returncode == 2 and "--set run.device=cpu" in hidden.stderr and is_empty
    return Outcome(ok and (found or not is_gpu), figures, " ".join(message))


def check_no_vllm_message(context: Context) -> Outcome:
    """Without vLLM, ``--engine vllm`` and, on a GPU, ``auto`` are errors that say what to type."""
    if importlib.util.find_spec("vllm") is not None:
        return Outcome(None, note="skipped: vLLM is installed")
    messages = []
    for engine, device in (("vllm", "cpu"), ("vllm", "cuda"), ("auto", "cuda")):
        try:
            choose_engine(context.settings({"prior": {"engine": engine}}), device=device)
        except UserError as error:
            messages.append(str(error))
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--set", f"run.device={context.device.type}", "--set", f"run.output_dir={folder}"]
        entry = run_entry("--quick_test", "--engine", "vllm", *arguments)
    ok = len(messages) == 3 and all("--engine transformers" in message for message in [*messages, entry.stderr])
    note = " ".join(entry.stderr.strip().splitlines()[-1:])
    return Outcome(ok and entry.returncode == 2, {"errors": len(messages), "exit_code": entry.returncode}, note)


CHECKS: dict[str, Callable[[Context], Outcome]] = {
    "checkpoint": check_checkpoint,
    "checkpoint_of_adapters": check_checkpoint_of_adapters,
    "random_state": check_random_state,
    "no_gpu_message": check_no_gpu_message,
    "no_vllm_message": check_no_vllm_message,
}
