"""Imports of LightZero and DI-engine: without their output, and without packages that are not used here."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator, MutableSequence
from typing import Any

import torch

from priorzero.runtime.quiet import quiet

# Packages that LightZero, DI-engine and transformers import for plots, loggers, servers and assisted generation.
LEFT_OUT = ("flask", "matplotlib", "redis", "scipy.stats", "sklearn", "wandb")


class Unavailable:
    """Stands for an attribute of a package that was left out."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Unavailable:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unavailable(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(f"{self._name} was left out when LightZero was imported (priorzero/world_model/imports.py)")


class _EmptyModule(types.ModuleType):
    __path__: MutableSequence[str] = []  # noqa: RUF012 (a package; it has no files)

    def __getattr__(self, name: str) -> Unavailable:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unavailable(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty module for each package of :data:`LEFT_OUT` and its submodules."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if is_left_out(fullname):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def is_left_out(module: str) -> bool:
    """Whether a module belongs to :data:`LEFT_OUT`."""
    return any(module == name or module.startswith(f"{name}.") for name in LEFT_OUT)


@contextlib.contextmanager
def lightzero_imports() -> Iterator[None]:
    """Import LightZero quietly. Packages of :data:`LEFT_OUT` that are not imported yet are left out.

    Their import takes two seconds. After the block they can be imported as usual; only the modules that were imported
    in it do without them.
    """
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        with quiet():
            yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _EmptyModule)]:
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if parent in sys.modules:
                vars(sys.modules[parent]).pop(child, None)


@contextlib.contextmanager
def without_compile() -> Iterator[None]:
    """``torch.compile`` returns the module as it is. LightZero calls it, which would import torch's compiler (1 s)."""
    original = torch.compile
    torch.compile = lambda module, *args, **kwargs: module  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original
