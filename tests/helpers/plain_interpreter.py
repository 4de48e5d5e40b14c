"""The functions of ``priorzero.envs.interpreter`` as plain Python, which tests can call without compiling them."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from priorzero.envs import compiled_search, interpreter

ALPHABET = np.frombuffer(compiled_search._ALPHABET, np.uint8)


@functools.cache
def plain_interpreter() -> ModuleType:
    """A second copy of the module, in which ``njit`` has no effect."""
    spec = importlib.util.spec_from_file_location("plain_interpreter", Path(interpreter.__file__))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    def njit(**options: Any) -> Callable[[Any], Any]:
        return lambda function: function

    with mock.patch("numba.njit", njit), mock.patch("priorzero.runtime.compiling.njit", njit):
        spec.loader.exec_module(module)
    module.MAX_INSTRUCTIONS = 1_000_000  # type: ignore[attr-defined]  # some seconds
    return module


def execute(
    story: interpreter.Story,
    memory: np.ndarray,
    state: tuple[Any, ...],
    command: str,
    *,
    alphabet: np.ndarray = ALPHABET,
) -> SimpleNamespace:
    """Execute one command from ``state``, the result of ``FrotzEnv.get_state``.

    Returns:
        The dynamic memory ``ram``, the whole ``stack``, the ``registers``, whether all instructions are ``known``, and
        the ``text``.
    """
    plain = plain_interpreter()
    ram, stack, counter, stack_pointer, frame_pointer, frame_count, _, random, _ = state
    memory = memory.copy()
    memory[: story.dynamic_size] = ram
    own_stack = np.zeros(plain.STACK_MASK + 1, np.uint16)
    own_stack[: plain.STACK_WORDS] = stack.view(np.uint16)
    registers = plain.Registers(
        np.int64(counter - 1), *(np.int64(value) for value in (stack_pointer, frame_pointer, frame_count, *random))
    )
    events, count, io = np.zeros((3, plain.MAX_EVENTS, 2), np.int64), np.zeros(3, np.int64), np.array([0, -1, 1, 0])
    out, line = np.zeros(plain.MAX_TEXT, np.uint8), np.frombuffer(command.encode(), np.uint8)
    with np.errstate(over="ignore"):  # the random numbers overflow
        after, known = plain._run(memory, own_stack, story, alphabet, registers, line, events, count, out, io)
    return SimpleNamespace(
        ram=memory[: story.dynamic_size],
        stack=own_stack[: plain.STACK_WORDS],
        registers=plain.Registers(*map(int, after)),
        known=bool(known),
        text=out[: io[0]].tobytes().decode("latin-1"),
    )
