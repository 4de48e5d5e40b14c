"""Functions that Numba compiles and keeps on disk, if it can."""

from __future__ import annotations

import pytest

from priorzero.runtime import compiling
from priorzero.runtime.compiling import cached_njit, compile_now
from priorzero.search import tree


def add_one(x):
    return x + 1


@pytest.fixture
def no_folder(monkeypatch):
    """Numba finds no folder for its cache."""
    njit = compiling.njit

    def without_cache(*, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(compiling, "njit", without_cache)


def test_compile_now_finds_the_result_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    function = cached_njit(add_one)
    assert compile_now(function, 2) is None
    assert function(2) == 3 and list(tmp_path.rglob("*.nbi"))


def test_compile_now_says_that_no_folder_is_writable(no_folder):
    function = cached_njit(add_one)
    assert compile_now(function, 2) == "no folder is writable"
    assert function(2) == 3


def test_compile_now_says_that_the_disk_is_full():
    def full(x):
        raise OSError("No space left on device")

    assert compile_now(full, 2) == "No space left on device"


def test_compile_functions_of_the_search_warns_once(monkeypatch):
    warnings = []
    monkeypatch.setattr(tree.logger, "warning", warnings.append)
    tree.compile_functions()
    assert not warnings
    monkeypatch.setattr(tree, "compile_now", lambda *_: "No space left on device")
    tree.compile_functions()
    assert len(warnings) == 1 and "cannot be kept on disk (No space left on device)" in warnings[0]
