"""Parts of a model card (README.md), as the hub expects it. Imports no torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

CARD = "README.md"


def front_matter(**metadata: Any) -> list[str]:
    """The lines of the metadata at the beginning of a card.

    Args:
        metadata: arguments of ``huggingface_hub.ModelCardData``; those that are None are left out.
    """
    from huggingface_hub import ModelCardData

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
