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
# The types of the entries that are read here, or that peft uses without a check.
ENTRIES: dict[str, tuple[tuple[type, ...], str]] = {
    "base_model_name_or_path": ((str,), "a text"),
    "r": ((int,), "a whole number"),
    "lora_alpha": ((int, float), "a number"),
    "lora_dropout": ((int, float), "a number"),
    "bias": ((str,), "a text"),
    "target_modules": ((list, str), "a list of names or a text"),
    "modules_to_save": ((list,), "a list of names"),
    "rank_pattern": ((dict,), "an object"),
    "alpha_pattern": ((dict,), "an object"),
    "layer_replication": ((list,), "a list of pairs"),
    "trainable_token_indices": ((list, dict), "a list of numbers or an object"),
    "use_dora": ((bool,), "true or false"),
    "use_rslora": ((bool,), "true or false"),
    "lora_bias": ((bool,), "true or false"),
}


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
        UserError: the adapter is not a LoRA adapter, does not name its base model, or has an entry of another type.
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
    _check_entries(config, file=folder / CONFIG, path=path)
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


def training_settings(adapter: AdapterFiles) -> str | None:
    """The command-line settings with which the training of an adapter can be continued; None if it cannot be."""
    if _fixed_parts(adapter):
        return None
    r, alpha = adapter.config.get("r"), adapter.config.get("lora_alpha")
    return f"--set llm.use_lora=true --set llm.lora_r={r} --set llm.lora_alpha={alpha}"


def _fixed_parts(adapter: AdapterFiles) -> list[str]:
    """What the adapter uses and a new adapter of ours does not have."""
    config = adapter.config
    used = [name for name in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(name)]
    return [*used, "bias"] if config.get("bias", "none") != "none" else used


def _check_lora_settings(adapter: AdapterFiles, cfg: LLMSettings) -> None:
    r, alpha = adapter.config.get("r"), adapter.config.get("lora_alpha")
    if (r, alpha) != (cfg.lora_r, cfg.lora_alpha):
        raise UserError(
            f"{adapter.what}: the adapter has the rank {r} and alpha {alpha}, but llm.lora_r={cfg.lora_r} and "
            f"llm.lora_alpha={cfg.lora_alpha}; type --set llm.lora_r={r} --set llm.lora_alpha={alpha} to continue "
            "training it, or --set llm.use_lora=false to merge it into its base model and train all parameters"
        )
    used = _fixed_parts(adapter)
    if used:
        raise UserError(
            f"{adapter.what}: the training of an adapter with {', '.join(used)} cannot be continued; type --set "
            "llm.use_lora=false to merge it into its base model and train all parameters"
        )


def _check_entries(config: dict[str, Any], *, file: Path, path: str) -> None:
    """Raise UserError if an entry that we read has another type than peft writes."""
    for name, (types, allowed) in ENTRIES.items():
        value = config.get(name)
        is_bool = isinstance(value, bool) and bool not in types  # bool is a subclass of int
        if value is not None and (is_bool or not isinstance(value, types)):
            raise UserError(
                f"llm.path={path}: {file} has {name}={value!r}, but {name} must be {allowed}; correct this file, or "
                "copy the adapter again"
            )
