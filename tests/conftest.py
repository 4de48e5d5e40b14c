"""Fixtures that several test files share."""

from __future__ import annotations

import asyncio
import inspect
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ["PRIORZERO_ACTION_CACHE"] = "off"  # no test may find what another one, or a run, has left

import pytest
import torch

torch.set_num_threads(1)  # the models of most tests are too small to profit from threads

from priorzero.llm.models import LanguageModel, load_language_model, load_tokenizer  # noqa: E402
from tests.helpers.models import make_settings, make_tiny_llm  # noqa: E402


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """SmolLM2-135M from its package, float32 on the CPU. Tests must leave its parameters as they are."""
    return load_language_model(make_settings().llm, device=torch.device("cpu"))


@pytest.fixture
def tiny_llm(smollm2: LanguageModel) -> LanguageModel:
    return make_tiny_llm(smollm2.tokenizer)


@pytest.fixture(scope="session")
def tiny_llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random language model for ``llm.path``."""
    folder = tmp_path_factory.mktemp("tiny_llm") / "llm"
    make_tiny_llm(load_tokenizer(make_settings().llm)).save(folder)
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run tests that are coroutine functions in an event loop of their own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
