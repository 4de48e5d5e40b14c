"""The LLM of an exported agent: a whole model, or a low-rank adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

from priorzero.llm.adapter_files import CONFIG, find_adapter, set_base_model, write_prompt_settings
from priorzero.llm.hub import is_hub_id
from priorzero.llm.model_card import CARD
from priorzero.llm.model_files import check_llm
from priorzero.runs.checkpoint import Checkpoint
from priorzero.runs.files import LLM_FOLDER
from priorzero.settings import LLMSettings
from priorzero.types import UserError


def choose_form(checkpoint: Checkpoint, wanted: str | None) -> str:
    """The form in which the LLM is exported: one of :data:`~priorzero.exporting.plan.LLM_FORMS`.

    Args:
        checkpoint: the agent's.
        wanted: the value of ``--llm``; None for the default: ``merged``, or ``none`` if the agent has no LLM.

    Raises:
        UserError: the agent has no LLM, or no adapter.
    """
    source = checkpoint.folder / LLM_FOLDER
    if wanted == "none" or (wanted is None and not source.is_dir()):
        return "none"
    if not source.is_dir():
        raise UserError(
            f"--llm {wanted}: the agent in {checkpoint.folder} has no LLM (prior.enabled=false); leave --llm out"
        )
    if wanted == "adapter" and not is_adapter(source):
        raise UserError(
            "--llm adapter: this run trained all parameters of the LLM, so it has no adapter (llm.use_lora=false); "
            "leave --llm out, or type --llm merged"
        )
    return wanted or "merged"


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint's LLM is an adapter without its base model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_model(cfg: LLMSettings) -> str:
    """What the LLM was before the run, without an adapter: a hub id, a folder, or ``package:NAME``."""
    adapter = None if cfg.adapter else find_adapter(cfg)
    return cfg.path if adapter is None else adapter.base


def published_base_model(name: str) -> str | None:
    """The base model for the metadata of the card: a hub id, or None."""
    return name if is_hub_id(name) and not Path(name).exists() else None


def llm_size(checkpoint: Checkpoint, *, form: str, trust_remote_code: bool = False) -> int:
    """About how many bytes the exported LLM needs.

    Raises:
        UserError: the adapter is to be merged, and its base model is missing or damaged.
    """
    if form == "none":
        return 0
    source = checkpoint.folder / LLM_FOLDER
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    if form == "merged" and is_adapter(source):
        files = check_llm(_merged_settings(checkpoint, trust_remote_code=trust_remote_code))
        size += 4 * files.num_parameters if files is not None else 0
    return size


def write_llm(checkpoint: Checkpoint, folder: Path, *, form: str, base: str, trust_remote_code: bool = False) -> None:
    """Write the LLM and its tokenizer in ``save_pretrained`` form, and the settings of its prompt.

    Args:
        checkpoint: the agent's.
        folder: is created.
        form: ``merged`` or ``adapter``.
        base: what an adapter names as its base model.
        trust_remote_code: code that comes with the base model may run when the adapter is merged.

    Raises:
        OSError: a file cannot be written.
        UserError: the adapter cannot be merged.
    """
    source = checkpoint.folder / LLM_FOLDER
    if form == "merged" and is_adapter(source):
        import torch

        from priorzero.llm.models import load_language_model

        folder.mkdir()
        cfg = _merged_settings(checkpoint, trust_remote_code=trust_remote_code)
        load_language_model(cfg, device=torch.device("cpu")).save(folder)
    else:
        # peft writes a card that names the base model by the folder where it was found.
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(CARD))
    if form == "adapter":
        set_base_model(folder, base)
    write_prompt_settings(folder, checkpoint.settings.llm)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read


def _merged_settings(checkpoint: Checkpoint, *, trust_remote_code: bool) -> LLMSettings:
    """The settings with which the adapter in a checkpoint is loaded and merged into its base model."""
    changes = {
        "path": str((checkpoint.folder / LLM_FOLDER).absolute()),
        "adapter": "",
        "use_lora": False,
        "kl_weight": 0.0,  # needs a copy of the model
        "trained_layers": 0,
        "trust_remote_code": trust_remote_code,
    }
    return checkpoint.settings.llm.model_copy(update=changes)
