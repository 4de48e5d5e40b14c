"""Games that a user made with TextWorld: ``textworld:file=PATH`` names a story file with TextWorld's data beside it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from pathlib import Path

from priorzero.envs.textworld_files import get_or_write, run_compiler
from priorzero.envs.zmachine import check_story
from priorzero.runtime.paths import shown, user_path
from priorzero.types import UserError

FILE_PREFIX = "textworld:file="
EXTENSIONS = (".z8", ".ulx")
# Parts of the data that TextWorld writes. A JSON file without them is something else.
_PARTS = ("world", "quests", "infos", "KB")


def find_story(env_id: str, folder: Path) -> Path:
    """The story file of ``textworld:file=PATH``.

    TextWorld 1.7 cannot play Glulx stories (``.ulx``). Such a game is compiled again from its data, as a Z-machine
    story below ``folder``, which takes seconds; later runs use it.

    Raises:
        UserError: a file is missing, cannot be read, is no story or no data of TextWorld, or cannot be compiled.
    """
    if env_id == FILE_PREFIX:
        raise UserError(f"The TextWorld game {env_id!r} names no file; type {FILE_PREFIX}PATH")
    path = user_path(env_id.removeprefix(FILE_PREFIX), what="The TextWorld game ")
    where = f"The TextWorld game {shown(str(path))!r}"
    if path.suffix.lower() not in EXTENSIONS:
        raise UserError(
            f"{where} is named neither .z8 nor .ulx. Give the story file that tw-make wrote, such as "
            f"{FILE_PREFIX}games/my_game.z8"
        )
    story = _read(path, what=where)
    data = path.with_suffix(".json")
    content = _read(
        data,
        what=f"The data of {where[0].lower()}{where[1:]}, {shown(str(data))!r},",
        advice="TextWorld writes it beside the story file and needs it to play. Put it there, or generate the game "
        "again: tw-make custom --output my_game.z8",
    )
    _check_data(content, data)
    if path.suffix.lower() == ".ulx":
        # Another version of the compiler may write another story.
        home = folder / importlib.metadata.version("textworld") / f"file-{_digest(content)}"
        return get_or_write(home / f"{path.stem}.z8", lambda output: run_compiler(data, output))
    try:
        check_story(story)
    except UserError as error:
        raise UserError(f"{where} {error}. Generate the game again: tw-make custom --output my_game.z8") from error
    return path.absolute()


def own_name(env_id: str) -> str:
    """A short name of the game that can be part of a folder's name: ``textworld-my_game``."""
    stem = Path(env_id.removeprefix(FILE_PREFIX)).stem
    return f"textworld-{re.sub(r'[^A-Za-z0-9.-]+', '_', stem).strip('._-') or 'game'}"


def _read(path: Path, *, what: str, advice: str = "Correct the path, or generate a game: tw-make --help") -> bytes:
    if not path.exists():
        raise UserError(f"{what} does not exist ({shown(str(path.absolute()))}). {advice}")
    if not path.is_file():
        raise UserError(f"{what} is not a file. {advice}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}. Check its permissions.") from error


def _check_data(content: bytes, path: Path) -> None:
    try:
        data = json.loads(content)
    except ValueError as error:
        raise UserError(
            f"{shown(str(path))!r} is not JSON ({error}). It must be the file that TextWorld wrote beside the story."
        ) from error
    missing = [part for part in _PARTS if not isinstance(data, dict) or part not in data]
    if missing:
        raise UserError(
            f"{shown(str(path))!r} is not a game's data: it has no {' and no '.join(map(repr, missing))}. It must be "
            "the file that TextWorld wrote beside the story."
        )


def _digest(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
