"""Makes a model with random weights from a configuration and a tokenizer: ``python random_model.py SHAPE OUT``.

Weights do not matter for speed and memory. ``SHAPE`` is a folder with ``config.json`` and the tokenizer, such as
``shapes/smollm2`` or ``shapes/minilm`` of the bundle. ``OUT`` is then a folder for ``llm.path`` or ``encoder.path``.
Further arguments ``KEY=VALUE`` change the configuration: the shape of Qwen2.5-0.5B with the tokenizer of SmolLM2 is::

    python random_model.py shapes/smollm2 qwen model_type=qwen2 hidden_size=896 intermediate_size=4864 \\
        num_hidden_layers=24 num_attention_heads=14 num_key_value_heads=2 head_dim=64 vocab_size=151936
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

SEED = 0


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit code."""
    if len(arguments) < 2 or not all("=" in change for change in arguments[2:]):
        print("usage: random_model.py SHAPE OUT [KEY=VALUE ...] (VALUE is a JSON value or a name)", file=sys.stderr)
        return 2
    shape, out = map(Path, arguments[:2])
    if not (shape / "config.json").is_file():
        print(
            f"error: {shape} contains no config.json; give shapes/smollm2 or shapes/minilm of the unpacked bundle",
            file=sys.stderr,
        )
        return 2
    changes = {key: parse(value) for key, _, value in (change.partition("=") for change in arguments[2:])}
    print(f"{out}: {make_random_model(shape, out, changes) / 1e6:.1f} million parameters")
    return 0


def parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def make_random_model(shape: Path, out: Path, changes: dict[str, Any] | None = None) -> int:
    """Write a float32 model to the folder ``out``, with the tokenizer of the folder ``shape``.

    Args:
        shape: a folder with ``config.json`` and a tokenizer.
        out: it is created.
        changes: entries of the configuration with another value.

    Returns:
        The number of parameters.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    entries = json.loads((shape / "config.json").read_text()) | (changes or {})
    is_encoder = entries["model_type"] == "bert"
    config = AutoConfig.for_model(**entries)
    torch.manual_seed(SEED)
    model = (AutoModel if is_encoder else AutoModelForCausalLM).from_config(config, dtype=torch.float32)
    shutil.copytree(shape, out, dirs_exist_ok=True)
    model.save_pretrained(out)
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
