"""How vLLM is started: its arguments, its environment, and the cause of a failed start."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from priorzero.llm.engines.vllm_worker import OWNER_VARIABLE, WorkerExtension
from priorzero.llm.models import LanguageModel
from priorzero.runtime import file_logging
from priorzero.runtime.signals import children_ignore_stop_signals
from priorzero.settings import VLLMSettings

IMPORT_FOLDER = Path(__file__).parents[3]  # contains the package
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the ranks that vLLM supports


def cores_for_training() -> int:
    """Number of cores that this process uses on a machine without a GPU. vLLM gets the other half."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores - cores // 2)


def engine_arguments(
    llm: LanguageModel, cfg: VLLMSettings, *, tokenizer: str, trust_remote_code: bool
) -> dict[str, Any]:
    """Arguments of vLLM's ``AsyncEngineArgs`` besides the model. ``tokenizer`` is a folder or a hub id."""
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer,
        "dtype": str(llm.compute_dtype).removeprefix("torch."),
        "max_model_len": cfg.max_model_len,
        "tensor_parallel_size": cfg.tensor_parallel_size,
        "gpu_memory_utilization": cfg.gpu_memory_utilization,
        "enable_prefix_caching": True,
        "enable_sleep_mode": cfg.sleep,
        "generation_config": "vllm",  # ignore the sampling defaults of the model
        "use_tqdm_on_load": False,
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        "trust_remote_code": trust_remote_code,
        "seed": 0,
    }
    if llm.device.type == "cpu":
        arguments |= {
            # A fixed cache size and no compilation reduce the start from 80 to 20 seconds.
            "kv_cache_memory_bytes": int(cfg.cpu_kv_cache_gib * 2**30),
            "enforce_eager": True,
            "block_size": 32,  # the smallest that the CPU build supports
        }
    if hasattr(llm.model, "peft_config"):
        adapter = next(iter(llm.model.peft_config.values()))
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": next((rank for rank in LORA_RANKS if rank >= adapter.r), adapter.r),
            "max_loras": 1,
            # By default vLLM also wraps the output layer, and then it cannot return prompt log-probabilities.
            "lora_target_modules": adapted_layer_names(llm.model),
        }
    return arguments


def adapted_layer_names(model: Any) -> list[str]:
    """The last parts of the names of all layers with adapters of a peft model, such as ``q_proj``.

    vLLM applies adapters in its fused layers (``qkv_proj``) only if it is given these names. peft's ``target_modules``
    can hold full names (``model.layers.0.self_attn.q_proj``); vLLM then ignores the adapters of fused layers silently.
    """
    return sorted({name.rpartition(".")[2] for name in model.targeted_module_names})


def unsupported_adapter_parts(model: Any) -> list[str]:
    """What a peft model has that vLLM (0.32.0) cannot serve, or ignores silently; empty if it can serve the adapter.

    These are adapters on the input embedding and the output layer, and parts that change more than linear layers.
    """
    config = next(iter(model.peft_config.values()))
    base = model.get_base_model()
    ends = [layer for layer in (base.get_input_embeddings(), base.get_output_embeddings()) if layer is not None]
    layers = [name for name in model.targeted_module_names if any(base.get_submodule(name) is end for end in ends)]
    names = ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices")
    return [*layers, *(name for name in names if getattr(config, name, None))]


def _logging_config(log_file: Path) -> dict[str, Any]:
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"}},
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(log_file), "formatter": "plain"}},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }


def _environment_variables(log_file: Path, scratch: Path) -> dict[str, str]:
    config_file = scratch / "logging.json"
    config_file.write_text(json.dumps(_logging_config(log_file)), encoding="utf-8")
    variables = {
        "VLLM_LOGGING_CONFIG_PATH": str(config_file),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with threads can hang
        "VLLM_CPU_NUM_OF_RESERVED_CPU": str(cores_for_training()),
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        OWNER_VARIABLE: f"{os.getpid()} {scratch}",
        # vLLM's workers import WorkerExtension, also if this package is not installed.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(IMPORT_FOLDER), os.environ.get("PYTHONPATH")])),
    }
    if len(str(scratch)) < 60:  # the path of a socket has at most 107 characters
        # Each start of vLLM leaves a file in the folder for temporary files. torch's compiled code is worth keeping.
        compiled = Path(tempfile.gettempdir()) / f"torchinductor_uid_{os.getuid()}"
        variables |= {
            "VLLM_RPC_BASE_PATH": str(scratch),
            "TMPDIR": str(scratch),
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled)),
        }
    return variables


@contextmanager
def process_environment(*, log_file: Path, scratch: Path) -> Iterator[None]:
    """Set the environment that vLLM's processes inherit when they are started inside the block.

    They write their log to ``log_file``, and delete the folder ``scratch`` if this process is killed. They do not react
    to stop signals, also not to SIGTERM when they are shut down.
    """
    variables = _environment_variables(log_file, scratch)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    # A spawned process imports the main script again, by its spec or its file. It does not need the script, and
    # importing it would also import flask, whose proxy objects break vLLM when it inspects all modules. It runs the
    # module that configures logging instead.
    main = sys.modules["__main__"]
    file, spec = vars(main).pop("__file__", None), main.__spec__
    main.__spec__ = importlib.util.find_spec(file_logging.__name__)
    file_logging.configure(variables["VLLM_LOGGING_CONFIG_PATH"])
    with children_ignore_stop_signals():
        resource_tracker.ensure_running()  # when it starts, it unblocks SIGINT and SIGTERM in this thread
    try:
        with children_ignore_stop_signals():
            yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def first_logged_error(log_file: Path, *, start: int) -> str | None:
    """The first error in vLLM's log after position ``start``; vLLM rarely passes the cause of a failed start on."""
    text = log_file.read_text(encoding="utf-8", errors="replace") if log_file.is_file() else ""
    match = re.search(r"^(?:[\w.]*Error|Exception): .+", text[start:], flags=re.MULTILINE)
    return match[0] if match else None
