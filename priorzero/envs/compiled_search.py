"""Tries commands of a Jericho game with the compiled Z-machine instead of Jericho's emulator."""

from __future__ import annotations

import ctypes
import fcntl
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from priorzero.envs import interpreter
from priorzero.envs.action_cache import cache_dir
from priorzero.types import UserError

SUPPORTED_VERSIONS = (3, 4, 5, 8)
NUM_ATTRIBUTES = 48
MAX_NARRATIVE = 4_000  # bytes; Jericho copies the text into a buffer of 8192 bytes
MAX_KNOWN_TEXTS = 1_000_000
# The threads take chunks of commands from a queue. Progress is reported after each chunk.
MAX_CHUNK_COMMANDS, CHUNKS_PER_THREAD = 200, 4
# Alphabets A0, A1 and A2 of the standard, section 3.5. The first two characters of A2 are not printed.
_ALPHABET = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ^0123456789.,!?_#'\"/\\-:()"

logger = logging.getLogger(__name__)


class Trial(NamedTuple):
    """The results of trying commands.

    Attributes:
        changes: for each command that changed the world: its index, and the change in Jericho's format.
        unknown: indices of commands that the compiled Z-machine cannot execute, in order.
    """

    changes: list[tuple[int, bytes]]
    unknown: list[int]


class CompiledSearch:
    """Tries commands from a saved state of a game, in several threads.

    It reads the constants of the game from Jericho's emulator, which it needs for two questions only: whether a moved
    object counts as a change, and whether a text ends the game. Their answers are kept.
    """

    def __init__(self, env: Any, story: bytes, *, num_threads: int) -> None:
        """``env`` is a ``FrotzEnv`` with the story ``story``."""
        self._num_threads = num_threads
        self._lib = ctypes.PyDLL("", handle=env.frotz_lib._handle)  # does not release Python's lock, so it is fast
        self._lib.get_score.restype = ctypes.c_short
        self._lib.set_narrative_text.argtypes = [ctypes.c_char_p]
        self._memory = np.zeros(interpreter.MEMORY_SIZE, np.uint8)
        self._memory[: len(story)] = np.frombuffer(story, np.uint8)
        self._story = interpreter.Story(
            version=story[0],
            size=len(story),
            dynamic_size=env.frotz_lib.getRAMSize(),
            global_table=self._header(0x0C),
            object_table=self._header(0x0A),
            dictionary=self._header(0x08),
            abbreviations=self._header(0x18),
        )
        own_alphabet = self._header(0x34) if story[0] >= 5 else 0
        alphabet = story[own_alphabet : own_alphabet + len(_ALPHABET)] if own_alphabet else _ALPHABET
        self._alphabet = np.frombuffer(alphabet, np.uint8).copy()
        self._watch = self._make_watch()
        # changes and number of movements -> changes without ignored movements, and whether there are others
        self._cleaned: dict[tuple[bytes, int], tuple[bytes, bool]] = {}
        self._ends: dict[int, bool] = {}  # hash of a text -> whether it ends the game
        with _lock():
            reason = interpreter.compile_functions()
        if reason is not None:
            logger.warning(
                "The compiled Z-machine cannot be kept on disk (%s), so each process compiles it, which takes half a "
                "minute. NUMBA_CACHE_DIR=FOLDER selects another folder.", reason,
            )  # fmt: skip

    @staticmethod
    def supports(story: bytes) -> bool:
        """Whether the compiled Z-machine knows the version of the story."""
        return story[0] in SUPPORTED_VERSIONS

    def try_commands(
        self, commands: Sequence[bytes], state: tuple[Any, ...], *, on_progress: Callable[[], None]
    ) -> Trial:
        """Try each command from ``state``, the result of ``get_state`` where the game waits for a line.

        ``on_progress`` is called in this thread after each of its chunks.
        """
        size = max(1, min(MAX_CHUNK_COMMANDS, len(commands) // (CHUNKS_PER_THREAD * self._num_threads)))
        starts = range(0, len(commands), size)
        chunks = deque((start, commands[start : start + size]) for start in starts)
        results: dict[int, interpreter.Results] = {}

        def work(after_chunk: Callable[[], None]) -> None:
            memory = self._memory.copy()
            while True:
                try:
                    start, chunk = chunks.popleft()
                except IndexError:
                    return
                results[start] = self._run(chunk, state, memory)
                after_chunk()

        num_threads = min(self._num_threads, len(starts))
        with ThreadPoolExecutor(max_workers=max(1, num_threads - 1)) as executor:
            others = [executor.submit(work, lambda: None) for _ in range(num_threads - 1)]
            try:
                work(on_progress)
            finally:
                chunks.clear()  # after an error the other threads stop
            for other in others:
                other.result()
        trial = Trial([], [])
        for start in sorted(results):
            self._collect(results[start], start, trial)
        return trial

    def _run(self, commands: Sequence[bytes], state: tuple[Any, ...], memory: np.ndarray) -> interpreter.Results:
        ram, stack, counter, stack_pointer, frame_pointer, frame_count, _, random, _ = state
        registers = interpreter.Registers(
            int(counter) - 1, int(stack_pointer), int(frame_pointer), int(frame_count), *map(int, random)
        )
        results: interpreter.Results = interpreter.run_commands(
            memory,
            ram,
            stack.view(np.uint16),
            self._story,
            self._alphabet,
            registers,
            self._watch,
            np.frombuffer(bytearray().join(commands), np.uint8),
            np.cumsum([len(command) for command in commands]),
        )
        return results

    def _collect(self, results: interpreter.Results, start: int, trial: Trial) -> None:
        """Add the results of a chunk to ``trial``; ``start`` is the index of its first command."""
        text_starts = np.concatenate([[0], results.text_ends[:-1]])
        trial.unknown.extend(start + n for n in np.flatnonzero(results.status == interpreter.UNKNOWN).tolist())
        ends = np.zeros(len(results.status), bool)
        for n, text_hash in enumerate(results.text_hashes.tolist()):
            if text_hash not in self._ends:
                text = results.text[text_starts[n] : results.text_ends[n]].tobytes()
                if len(self._ends) >= MAX_KNOWN_TEXTS:
                    self._ends.clear()
                self._ends[text_hash] = self._ends_game(text)
            ends[n] = self._ends[text_hash]
        # Jericho ignores commands that first take an object implicitly.
        candidates = (results.status != interpreter.UNKNOWN) & ~results.taken
        candidates &= ends | (results.status == interpreter.CHANGED)
        for n in np.flatnonzero(candidates).tolist():
            change, moved = self._clean(results.changes[n].tobytes(), int(results.num_moved[n]))
            if ends[n] or results.scored[n] or results.changed[n] or moved:
                trial.changes.append((start + n, change))

    def _ends_game(self, text: bytes) -> bool:
        # Jericho's functions search the text of the last command for sentences such as "You have died".
        self._lib.set_narrative_text(text[-MAX_NARRATIVE:].replace(b"\0", b""))
        return self._lib.game_over() > 0 or self._lib.victory() > 0

    def _clean(self, raw: bytes, num_moved: int) -> tuple[bytes, bool]:
        """The change without the movements that the game ignores, and whether any other is left."""
        if (raw, num_moved) not in self._cleaned:
            row = np.frombuffer(raw, np.uint16).copy()
            moves = [(int(row[n]), int(row[64 + n])) for n in range(num_moved)]
            kept = [move for move in moves if not self._lib.ignore_moved_obj(*move)]
            row[: interpreter.MAX_EVENTS] = row[64 : 64 + interpreter.MAX_EVENTS] = 0
            for n, (moved, destination) in enumerate(kept):
                row[n], row[64 + n] = moved, destination
            if len(self._cleaned) >= MAX_KNOWN_TEXTS:
                self._cleaned.clear()
            self._cleaned[raw, num_moved] = row.tobytes(), bool(kept)
        return self._cleaned[raw, num_moved]

    def _header(self, address: int) -> int:
        return int(self._memory[address]) << 8 | int(self._memory[address + 1])

    def _make_watch(self) -> interpreter.Watch:
        """What counts as a change of the world, as Jericho's functions for the game say."""
        # Some games have more objects than Jericho's get_num_world_objs says, and their attributes are ignored, too.
        shape = (interpreter.MAX_OBJECT + 1, NUM_ATTRIBUTES)
        ignored_set, ignored_cleared = np.zeros(shape, bool), np.zeros(shape, bool)
        for number, attribute in np.ndindex(shape):
            ignored_set[number, attribute] = self._lib.ignore_attr_diff(number, attribute)
            ignored_cleared[number, attribute] = self._lib.ignore_attr_clr(number, attribute)
        self._lib.get_ram_addrs.restype = ctypes.POINTER(ctypes.c_ushort)
        num_addresses = ctypes.c_int(0)
        addresses = self._lib.get_ram_addrs(ctypes.byref(num_addresses))
        watched = np.array([addresses[n] for n in range(num_addresses.value)], np.int64)
        return interpreter.Watch(ignored_set, ignored_cleared, watched, self._find_score())

    def _find_score(self) -> np.ndarray:
        """The addresses of the score: Jericho does not tell them, so each byte is changed in turn."""
        memory_address = ctypes.c_void_p.in_dll(self._lib, "zmp").value
        assert memory_address is not None
        memory = (ctypes.c_ubyte * self._story.dynamic_size).from_address(memory_address)
        score, found = self._lib.get_score(), []
        for address in range(self._story.dynamic_size):
            value = memory[address]
            memory[address] = value ^ 0xFF
            if self._lib.get_score() != score:
                found.append(address)
            memory[address] = value
        return np.array(found, np.int64)


@contextmanager
def _lock() -> Iterator[None]:
    """Let one process at a time compile, so that the others find the result in Numba's cache."""
    try:
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "compile.lock", "w")  # noqa: SIM115
    except (UserError, OSError):  # without a folder each process compiles
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
