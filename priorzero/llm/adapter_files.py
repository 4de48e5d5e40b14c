"""Finds and checks the files of a low-rank adapter (LoRA) that was saved without its base model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priorzero.llm.weight_files import read_json, tensor_shapes
from priorzero.runtime.paths import user_path
from priorzero.settings import LLMSettings
from priorzero.types import UserError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter whose files are on this machine.

    Attributes:
        path: as the user gave it.
        folder: contains the adapter.
        config: the contents of adapter_config.json.
    """

    path: str
    folder: Path
    config: dict[str, Any]

    @property
    def base(self) -> str:
        """The base model: a folder, a hub id, or ``package:NAME``."""
        return str(self.config["base_model_name_or_path"])

    @property
    def what(self) -> str:
        """How a message about the adapter begins."""
        return f"llm.path={self.path}"


def find_adapter(path: str) -> AdapterFiles | None:
    """The adapter in a folder; None if ``path`` is not a folder with an adapter and without a model.

    Raises:
        UserError: the adapter is not a LoRA adapter, or does not name its base model.
    """
    folder = user_path(path, what="llm.path=")
    if not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    config = read_json(folder / CONFIG, what=f"llm.path={path}")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"llm.path={path}: the folder contains an adapter of type {kind}; only LoRA adapters can be loaded. If "
            "peft can merge it, give the merged model: merge_and_unload(), then save_pretrained(FOLDER)"
        )
    if not config.get("base_model_name_or_path"):
        raise UserError(
            f"llm.path={path}: {folder / CONFIG} does not name the adapter's base model; set base_model_name_or_path "
            "in this file to a folder, a hub id, or package:NAME"
        )
    return AdapterFiles(path, folder.absolute(), config)


def check_adapter(adapter: AdapterFiles, cfg: LLMSettings) -> dict[str, tuple[int, ...]]:
    """Check an adapter's weights and that the settings can continue to train it.

    Returns:
        The shapes of its tensors; empty if they are not in safetensors format.

    Raises:
        UserError: the weights are missing or damaged, or ``llm.use_lora=true`` does not fit the adapter.
    """
    files = [adapter.folder / name for name in WEIGHTS if (adapter.folder / name).is_file()]
    if not files:
        raise UserError(
            f"{adapter.what}: the folder does not contain {WEIGHTS[0]}, the adapter's weights; copy the adapter again"
        )
    if cfg.use_lora:
        _check_lora_settings(adapter, cfg)
    is_readable = files[0].name == WEIGHTS[0]
    return tensor_shapes(files[0], what=adapter.what) if is_readable else {}


def _check_lora_settings(adapter: AdapterFiles, cfg: LLMSettings) -> None:
    config = adapter.config
    r, alpha = config.get("r"), config.get("lora_alpha")
    if (r, alpha) != (cfg.lora_r, cfg.lora_alpha):
        raise UserError(
            f"{adapter.what}: the adapter has the rank {r} and alpha {alpha}, but llm.lora_r={cfg.lora_r} and "
            f"llm.lora_alpha={cfg.lora_alpha}; type --set llm.lora_r={r} --set llm.lora_alpha={alpha} to continue "
            "training it, or --set llm.use_lora=false to merge it into its base model and train all parameters"
        )
    used = [name for name in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise UserError(
            f"{adapter.what}: the training of an adapter with {', '.join(used)} cannot be continued; type --set "
            "llm.use_lora=false to merge it into its base model and train all parameters"
        )
