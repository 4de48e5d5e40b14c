"""Finds all story files in the folders in which a game's name is searched."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from priorzero.envs.games import story_folders, supported_games
from priorzero.envs.zmachine import MAX_STORY_BYTES


@dataclass(frozen=True)
class FoundStory:
    """A file whose name is that of a story file.

    Attributes:
        path: the file.
        rom: the name by which Jericho knows its contents; "" if Jericho does not support them.
    """

    path: Path
    rom: str

    @property
    def is_supported(self) -> bool:
        """Whether Jericho supports it."""
        return bool(self.rom)


def find_stories() -> tuple[list[Path], list[str], list[FoundStory]]:
    """All story files in the folders of :func:`~priorzero.envs.games.story_folders`.

    Files that cannot be read are left out, and noted.

    Returns:
        The folders; why others are not searched; and the files, by folder and name.

    Raises:
        UserError: a folder that an environment variable names is not a usable path.
    """
    roms = {md5: rom for rom, md5 in supported_games().items()}
    folders, notes = story_folders()
    folders = list(dict.fromkeys(folders))
    stories = []
    for folder in folders:
        try:
            files = sorted(folder.iterdir())
        except FileNotFoundError:
            continue
        except OSError as error:
            notes.append(f"{folder} cannot be read ({error.strerror})")
            continue
        for path in files:
            if not re.fullmatch(r".+\.z[1-8]", path.name, re.IGNORECASE):
                continue
            try:
                if path.is_file() and 0 < path.stat().st_size <= MAX_STORY_BYTES:
                    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
                    stories.append(FoundStory(path, roms.get(md5, "")))
            except OSError as error:
                notes.append(f"{path} cannot be read ({error.strerror})")
    return folders, notes, stories
