"""Keeps Jericho's emulator from reading and writing files: saved games, transcripts and recorded commands."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import jericho

_SAVED_GAME = b"/dev/null"  # saving succeeds and leaves nothing; restoring finds an empty file and fails
_FOLDER = b"/dev/null"  # of all other files. It is not a folder, so they cannot be opened.
_NAME_SIZE = 512  # bytes; the emulator copies names of up to 80 bytes, preceded by the folder, into a buffer

# The pointers are passed on as they are, because the emulator frees them.
_libc = ctypes.CDLL(None)
_libc.calloc.argtypes, _libc.calloc.restype = [ctypes.c_size_t, ctypes.c_size_t], ctypes.c_void_p
_libc.free.argtypes, _libc.free.restype = [ctypes.c_void_p], None


class Setup(ctypes.Structure):
    """The emulator's settings, ``f_setup``. Names are addresses of zero-terminated texts."""

    _fields_ = (
        ("options", ctypes.c_int * 15),
        ("story_file", ctypes.c_void_p),
        ("story_name", ctypes.c_void_p),
        ("story_base", ctypes.c_void_p),
        ("script_name", ctypes.c_void_p),
        ("command_name", ctypes.c_void_p),
        ("save_name", ctypes.c_void_p),
        ("tmp_save_name", ctypes.c_void_p),
        ("aux_name", ctypes.c_void_p),
        ("story_path", ctypes.c_void_p),
        ("zcode_path", ctypes.c_void_p),
        ("story_rom", ctypes.c_void_p),
        ("story_rom_size", ctypes.c_size_t),
        ("restricted_path", ctypes.c_void_p),
    )


class FilelessFrotzEnv(jericho.FrotzEnv):
    """A ``FrotzEnv`` whose games neither read nor write files.

    In Jericho, the commands "save", "restore" and "script", and synonyms such as "pause" in seastalker.z3, use files in
    the working folder. All processes share them, so the files of the user would be overwritten, and a game could
    continue from the saved state of another one.

    Here a game that saves gets the reply that it was saved, as in Jericho, but nothing is kept. It cannot restore.
    """

    def load(self, story_file: str, seed: int | None = None) -> None:
        """Load a story file; ``__init__`` calls it.

        Raises:
            RuntimeError: the emulator's settings are not those of the version of Jericho that is known here.
        """
        super().load(story_file, seed)
        setup = Setup.in_dll(self.frotz_lib, "f_setup")
        names = [setup.story_name, setup.script_name, setup.save_name]
        stem = Path(story_file).stem.encode()
        if [ctypes.string_at(name) if name else None for name in names] != [stem, stem + b".scr", stem + b".qzl"]:
            raise RuntimeError(f"Jericho {jericho.__version__} has other settings than Jericho 3.3.1")
        self._replace_names()

    def reset(self) -> tuple[str, dict[str, Any]]:
        """Begin a new episode."""
        text, info = super().reset()
        self._replace_names()  # Jericho has set its own again
        return text, info

    def _replace_names(self) -> None:
        setup = Setup.in_dll(self.frotz_lib, "f_setup")
        # In Jericho, aux_name has no buffer, and the others are too short for a name with a folder.
        for field, text in {
            "save_name": _SAVED_GAME,
            "restricted_path": _FOLDER,
            "script_name": b"script",
            "command_name": b"commands",
            "aux_name": b"data",
        }.items():
            _libc.free(getattr(setup, field))
            address = _libc.calloc(_NAME_SIZE, 1)
            ctypes.memmove(address, text, len(text))
            setattr(setup, field, address)
