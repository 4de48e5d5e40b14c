"""Finds and checks the files of a low-rank adapter (LoRA) that was saved without its base model. Imports no torch.

An adapter is a folder in ``llm.adapter`` or ``llm.path``, or one of those in ``priorzero/adapters/``, which ship with
the package. The pretraining writes the settings of the prompt beside it, in the form of a ``--config`` file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priorzero.llm.weight_files import read_json, tensor_shapes
from priorzero.runtime.paths import user_path
from priorzero.settings import LLMSettings
from priorzero.types import UserError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PROMPT_FILE = "prompt.json"
SHIPPED = Path(__file__).parent.parent / "adapters"  # contains a folder for each adapter that ships
# The settings that make the prompt. An agent should use the same as the pretraining.
PROMPT_SETTINGS = (
    "prompt_layout", "history", "history_length", "history_chars", "show_observation", "observation_chars",
    "list_commands", "prompt_max_len", "memory_lines",
)  # fmt: skip
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
        setting: ``llm.path`` or ``llm.adapter``.
        path: its value.
        folder: contains the adapter.
        config: the contents of adapter_config.json.
    """

    setting: str
    path: str
    folder: Path
    config: dict[str, Any]

    @property
    def base(self) -> str:
        """The base model that the adapter names: a folder, a hub id, or ``package:NAME``."""
        return str(self.config["base_model_name_or_path"])

    @property
    def what(self) -> str:
        """How a message about the adapter begins."""
        return f"{self.setting}={self.path}"


def shipped_adapters() -> list[str]:
    """The names of the adapters that ship with the package."""
    return sorted(file.parent.name for file in SHIPPED.glob(f"*/{CONFIG}"))


def find_adapter(cfg: LLMSettings) -> AdapterFiles | None:
    """The adapter of ``llm.adapter``, or the one in the folder ``llm.path``; None if there is none.

    A folder in ``llm.path`` that also contains a model is a model.

    Raises:
        UserError: there are two adapters; or there is none of this name, it is not a LoRA adapter, does not name its
            base model, or has an entry of another type.
    """
    folder = user_path(cfg.path, what="llm.path=")
    is_adapter = (folder / CONFIG).is_file() and not (folder / "config.json").is_file()
    if not cfg.adapter:
        return _read_adapter(folder, setting="llm.path", path=cfg.path) if is_adapter else None
    if is_adapter:
        raise UserError(
            f"llm.adapter={cfg.adapter}: llm.path={cfg.path} is an adapter, too, but only one can be used; leave "
            "llm.adapter out, or give the base model as llm.path"
        )
    return _read_adapter(_adapter_folder(cfg.adapter), setting="llm.adapter", path=cfg.adapter)


def _adapter_folder(value: str) -> Path:
    """The folder of ``llm.adapter``. A name that ships wins over a folder of the same name; ``./NAME`` is the folder.

    Raises:
        UserError: there is no such adapter.
    """
    names = shipped_adapters()
    if value in names:
        return SHIPPED / value
    folder = user_path(value, what="llm.adapter=")
    if (folder / CONFIG).is_file():
        return folder
    problem = "no adapter of this name ships with PriorZero, and there is no such folder"
    if folder.exists():
        problem = f"the folder contains no {CONFIG}" if folder.is_dir() else "this is a file"
    raise UserError(
        f"llm.adapter={value}: {problem}; give one of the names that ship ({', '.join(names) or 'none in this version'}"
        "), or a folder with an adapter, as python -m priorzero.pretrain --out FOLDER writes it"
    )


def _read_adapter(folder: Path, *, setting: str, path: str) -> AdapterFiles:
    """Read and check adapter_config.json in a folder; ``path`` is the value of ``setting``."""
    adapter = AdapterFiles(setting, path, folder.absolute(), read_json(folder / CONFIG, what=f"{setting}={path}"))
    kind = adapter.config.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{adapter.what}: the folder contains an adapter of type {kind}; only LoRA adapters can be loaded. If "
            "peft can merge it, give the merged model: merge_and_unload(), then save_pretrained(FOLDER)"
        )
    if not adapter.config.get("base_model_name_or_path"):
        raise UserError(
            f"{adapter.what}: {folder / CONFIG} does not name the adapter's base model; set base_model_name_or_path "
            "in this file to a folder, a hub id, or package:NAME"
        )
    _check_entries(adapter)
    return adapter


def check_adapter(adapter: AdapterFiles, cfg: LLMSettings) -> dict[str, tuple[int, ...]]:
    """Check an adapter's weights and prompt file, and that the settings can continue to train it.

    Returns:
        The shapes of its tensors; empty if they are not in safetensors format.

    Raises:
        UserError: a file is missing or damaged, or ``llm.use_lora=true`` does not fit the adapter.
    """
    files = [adapter.folder / name for name in WEIGHTS if (adapter.folder / name).is_file()]
    if not files:
        raise UserError(
            f"{adapter.what}: the folder does not contain {WEIGHTS[0]}, the adapter's weights; copy the adapter again"
        )
    if cfg.use_lora:
        _check_lora_settings(adapter, cfg)
    _prompt_settings(adapter)
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


def _check_entries(adapter: AdapterFiles) -> None:
    """Raise UserError if an entry that we read has another type than peft writes."""
    for name, (types, allowed) in ENTRIES.items():
        value = adapter.config.get(name)
        is_bool = isinstance(value, bool) and bool not in types  # bool is a subclass of int
        if value is not None and (is_bool or not isinstance(value, types)):
            raise UserError(
                f"{adapter.what}: {adapter.folder / CONFIG} has {name}={value!r}, but {name} must be {allowed}; "
                "correct this file, or copy the adapter again"
            )


def set_base_model(folder: Path, name: str) -> None:
    """Let the adapter in ``folder`` name another base model, such as a hub id in place of a folder of this machine.

    Raises:
        OSError: the file cannot be written.
        UserError: it cannot be read.
    """
    config = read_json(folder / CONFIG, what=str(folder))
    config["base_model_name_or_path"] = name
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- the prompt ----


def write_prompt_settings(folder: Path, cfg: LLMSettings) -> None:
    """Write the settings of the prompt that an LLM is trained with into its folder."""
    prompt = {"llm": {name: getattr(cfg, name) for name in PROMPT_SETTINGS}}
    (folder / PROMPT_FILE).write_text(json.dumps(prompt, indent=2) + "\n", encoding="utf-8")


def other_prompt_settings(adapter: AdapterFiles, cfg: LLMSettings) -> dict[str, Any]:
    """The settings of an adapter's prompt that differ from ``cfg``; empty if its folder does not contain its prompt.

    The largest number of tokens is left out, since it changes long prompts only.
    """
    prompt = _prompt_settings(adapter)
    names = [name for name in PROMPT_SETTINGS if name in prompt and name != "prompt_max_len"]
    return {name: prompt[name] for name in names if prompt[name] != getattr(cfg, name)}


def _prompt_settings(adapter: AdapterFiles) -> dict[str, Any]:
    """What :func:`write_prompt_settings` wrote; empty if the file does not exist."""
    file = adapter.folder / PROMPT_FILE
    if not file.exists():
        return {}
    prompt = read_json(file, what=adapter.what).get("llm")
    if not isinstance(prompt, dict):
        raise UserError(
            f'{adapter.what}: {file} is not of the form {{"llm": {{"history_length": 20, ...}}}}; copy the adapter '
            "again, or remove this file"
        )
    return prompt
