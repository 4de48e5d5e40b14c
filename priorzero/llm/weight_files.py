"""Reads JSON files and the headers of safetensors files of a model. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from priorzero.types import UserError


def read_json(file: Path, *, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file cannot be read; the message begins with ``what``.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {file} cannot be read ({error}); copy or download the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{what}: {file} is not a JSON object; copy or download the model again")
    return content


def tensor_shapes(file: Path, *, what: str) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a safetensors file by name, from its header.

    Raises:
        UserError: the file cannot be read; the message begins with ``what``.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{what}: {file} cannot be read ({error}); it is incomplete, or a Git LFS pointer. Copy or download the "
            "model again"
        ) from error
