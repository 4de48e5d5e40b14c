"""Parts of a model card (README.md), as the hub expects it. Imports no torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

CARD = "README.md"


def front_matter(*, results: Sequence[Mapping[str, Any]] = (), model_name: str = "", **metadata: Any) -> list[str]:
    """The lines of the metadata at the beginning of a card.

    Args:
        results: arguments of ``huggingface_hub.EvalResult``, one for each figure.
        model_name: whose figures they are.
        metadata: arguments of ``huggingface_hub.ModelCardData``; those that are None are left out.
    """
    from huggingface_hub import EvalResult, ModelCardData

    if results:
        metadata |= {"model_name": model_name, "eval_results": [EvalResult(**result) for result in results]}
    return ["---", *ModelCardData(**metadata).to_yaml().splitlines(), "---", ""]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """The lines of a table. ``|`` in a cell is escaped."""
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |"


def package_list(names: Iterable[str]) -> str:
    """Names and versions of installed packages: ``torch 2.13.0, peft 0.21.2``."""
    return ", ".join(f"{name} {package_version(name)}" for name in names)


def package_version(name: str) -> str:
    """The version of a package, or that it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return "not installed"
