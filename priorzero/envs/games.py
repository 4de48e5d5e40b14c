"""From the name of a game to its story file: Jericho's games are looked up, TextWorld's are made on the spot."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from priorzero.envs import textworld_files
from priorzero.envs.cache import cache_dir
from priorzero.types import TextGame, UserError

GAMES_VARIABLE = "PRIORZERO_GAMES"
TEXTWORLD_PREFIX = "textworld:"


@dataclass(frozen=True, slots=True)
class GameSpec:
    """A game that is ready to be played.

    Attributes:
        env_id: the name that was asked for.
        kind: which system plays it.
        path: the story file.
        md5: of the story file's bytes, in hexadecimal. Equal for equal TextWorld parameters, on every machine.
        name: short, and usable in the names of folders: ``zork1``, ``textworld-simple-seed7``.
    """

    env_id: str
    kind: Literal["jericho", "textworld"]
    path: Path
    md5: str
    name: str


def supported_games() -> dict[str, str]:
    """md5 of the one file of each name that Jericho supports fully: ``{"zork1.z5": "b732..."}``."""
    from jericho.defines import BINDINGS_DICT

    return {bindings["rom"]: md5 for md5, bindings in BINDINGS_DICT.items()}


def resolve_game(env_id: str) -> GameSpec:
    """Find (Jericho) or make (TextWorld) the game called ``env_id``.

    Args:
        env_id: ``zork1.z5`` (looked up in the working folder, ``$PRIORZERO_GAMES`` and the cache folder), a path to a
            story file, or ``textworld:<challenge>?<parameter>=<value>&...``.

    Raises:
        UserError: unknown name, missing, unreadable or unsupported story file, bad TextWorld parameter.
    """
    if env_id.startswith(TEXTWORLD_PREFIX):
        request = textworld_files.parse_request(env_id)
        path = textworld_files.get_or_make(request, cache_dir() / "textworld")
        return GameSpec(env_id, "textworld", path, _md5(path), request.name)
    if "/" in env_id or os.sep in env_id:
        path = Path(env_id).expanduser()
        if not path.exists():
            raise UserError(
                f"No story file at {env_id!r} ({path.absolute()} does not exist).\n{_how_to_get(path.name)}"
            )
    elif re.fullmatch(r".+\.z[1-8]", env_id, re.IGNORECASE):
        path = _look_up(env_id)
    else:
        known = [*supported_games(), *(TEXTWORLD_PREFIX + challenge for challenge in textworld_files.CHALLENGES)]
        raise UserError(
            f"Unknown game {env_id!r}.{_nearest(env_id, known)}\n"
            "Allowed: the name of a story file that Jericho supports (such as zork1.z5; all names: python "
            "scripts/fetch_games.py --list), a path to such a file, or a TextWorld game (such as "
            "'textworld:simple?seed=7')."
        )
    return _jericho_spec(env_id, path)


def resolve_games(env_ids: str) -> list[GameSpec]:
    """What :func:`resolve_game` finds for each of some names separated by commas; none for an empty text.

    Raises:
        UserError: as :func:`resolve_game`, and for a game that is named twice.
    """
    if Path(env_ids).is_file():  # a path may hold a comma
        return [resolve_game(env_ids)]
    games = [resolve_game(env_id.strip()) for env_id in env_ids.split(",")] if env_ids.strip() else []
    for n, game in enumerate(games):
        if game.md5 in {other.md5 for other in games[:n]}:
            raise UserError(f"The game {game.env_id!r} is named twice in {env_ids!r}. Name it once.")
    return games


def make_game(
    spec: GameSpec, *, seed: int, max_episode_steps: int, look_and_inventory: bool, drop_inert_commands: bool
) -> TextGame:
    """Open a game in this process. A game that hangs takes the process with it: training uses ``make_worker``.

    Args:
        spec: from ``resolve_game``.
        seed: of the game's own random numbers, 0 or more.
        max_episode_steps: commands after which an episode is cut.
        look_and_inventory: fill ``GameState.look`` and ``GameState.inventory``.
        drop_inert_commands: leave out commands that cannot change the world.
    """
    # Imported here because each game's module stands for a system that a run may not need.
    from priorzero.envs.jericho_game import JerichoGame
    from priorzero.envs.textworld_game import TextWorldGame

    game_class = JerichoGame if spec.kind == "jericho" else TextWorldGame
    return game_class(
        spec.path,
        seed=seed,
        max_episode_steps=max_episode_steps,
        look_and_inventory=look_and_inventory,
        drop_inert_commands=drop_inert_commands,
    )


def _look_up(name: str) -> Path:
    folders = [Path.cwd()]
    if os.environ.get(GAMES_VARIABLE):
        folders.append(Path(os.environ[GAMES_VARIABLE]).expanduser())
    folders.append(cache_dir())
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    places = "\n".join(f"  {folder / name}" for folder in folders)
    unset = "" if os.environ.get(GAMES_VARIABLE) else f" (${GAMES_VARIABLE} is not set)"
    raise UserError(f"No story file {name!r}. Looked at{unset}:\n{places}\n{_how_to_get(name)}")


def _how_to_get(name: str) -> str:
    supported = supported_games()
    if name not in supported:
        return f"{name!r} is not a story file that Jericho supports.{_nearest(name, list(supported))}"
    return f"Jericho supports the {name} with md5 {supported[name]}. Get it: python scripts/fetch_games.py {name}"


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def _jericho_spec(env_id: str, path: Path) -> GameSpec:
    if not path.is_file():
        raise UserError(f"{str(path)!r} is not a file. Give the path of a story file, such as {path / 'zork1.z5'}.")
    try:
        md5 = _md5(path)
        is_empty = path.stat().st_size == 0
    except OSError as error:
        raise UserError(
            f"Cannot read the story file {str(path)!r}: {error.strerror}. Check its permissions."
        ) from error
    if is_empty:
        raise UserError(f"The story file {str(path)!r} is empty; delete it. {_how_to_get(path.name)}")
    supported = supported_games()
    roms = {known_md5: rom for rom, known_md5 in supported.items()}
    if md5 in roms:  # the contents count, whatever the file is called
        return GameSpec(env_id, "jericho", path.absolute(), md5, Path(roms[md5]).stem)
    if path.name in supported:
        raise UserError(
            f"{str(path)!r} has md5 {md5}; Jericho supports only the {path.name} with md5 {supported[path.name]} "
            f"(another release of the game?). Move this file away, then: python scripts/fetch_games.py {path.name}"
        )
    raise UserError(
        f"Jericho does not support the story file {str(path)!r} (md5 {md5}): scores and valid actions come only with "
        f"supported files.{_nearest(path.name, list(supported))} All of them: python scripts/fetch_games.py --list"
    )


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
