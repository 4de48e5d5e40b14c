"""Versions of installed packages."""

from __future__ import annotations

import importlib.metadata


def installed_version(package: str) -> str:
    """The version of a package; "" if it is not installed. The package is not imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
