"""Finds a game by its name: a story file, a TextWorld game, which is generated if necessary, or a registered game."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

from loguru import logger

from priorzero.envs import textworld_files
from priorzero.envs.action_cache import cache_dir
from priorzero.envs.names import did_you_mean, without_extension
from priorzero.envs.registry import GameRequest, check_request, parse_game_name, registered_games
from priorzero.envs.textworld_own import FILE_PREFIX, find_story, own_name
from priorzero.envs.zmachine import MAX_STORY_BYTES, check_story
from priorzero.runtime.paths import check_path_text, shown, user_path
from priorzero.types import GameArguments, TextGame, UserError

if TYPE_CHECKING:
    from priorzero.envs.story_game import StorySurvey

GAMES_VARIABLE = "PRIORZERO_GAMES"
_LIST_HINT = "To list all supported games, type: python scripts/fetch_games.py --list"
TEXTWORLD_PREFIX = "textworld:"
MAX_SCORE_HINT = "--set env.max_score=N"


@dataclass(frozen=True, slots=True)
class GameSpec:
    """A game that was found.

    Attributes:
        env_id: the name that was resolved.
        kind: how it is played: ``"jericho"`` (Jericho supports it), ``"textworld"``, ``"story"`` (another story file),
            or ``"registered"`` (see :mod:`~priorzero.envs.registry`).
        path: the story file, which exists; None for a registered game.
        md5: hexadecimal MD5 of the story file. Equal TextWorld parameters give equal files on every machine. For a
            registered game, that of :attr:`GameRequest.md5`.
        name: a short name that can be part of a folder's name: ``zork1``, ``textworld-simple-seed7``.
        request: what is passed to the factory of a registered game; None for other games.
    """

    env_id: str
    kind: Literal["jericho", "textworld", "story", "registered"]
    path: Path | None
    md5: str
    name: str
    request: GameRequest | None = None

    @property
    def story(self) -> Path:
        """The story file of a game that has one.

        Raises:
            UserError: it is a registered game.
        """
        if self.path is None:
            raise UserError(f"{shown(self.env_id)}: this game has no story file; give a Jericho or TextWorld game")
        return self.path


def supported_games() -> dict[str, str]:
    """The story files that Jericho fully supports, with their MD5: ``{"zork1.z5": "b732..."}``."""
    from jericho.defines import BINDINGS_DICT

    return {bindings["rom"]: md5 for md5, bindings in BINDINGS_DICT.items()}


def walkthrough_lengths() -> dict[str, int]:
    """The number of commands of each walkthrough that Jericho has, by story file: ``{"zork1.z5": 396}``."""
    from jericho.defines import BINDINGS_DICT

    return {
        bindings["rom"]: len(bindings["walkthrough"].split("/"))
        for bindings in BINDINGS_DICT.values()
        if bindings.get("walkthrough")
    }


def resolve_game(env_id: str | Path) -> GameSpec:
    """Find the story file ``env_id``, or generate the TextWorld game ``env_id``.

    If Jericho does not support the story file, a warning says once what is known of it.

    Args:
        env_id: the name of a story file, such as ``zork1.z5``, which is searched in the working folder,
            ``$PRIORZERO_GAMES`` and the cache folder; a path to a story file;
            ``textworld:<challenge>?<parameter>=<value>&...``; ``textworld:file=PATH``; ``babyai:LEVEL?seed=N``; or
            ``NAME:LEVEL?KEY=VALUE&...`` of a registered game.

    Raises:
        UserError: the name is unknown, the story file is missing, unreadable or cannot be played, a TextWorld
            parameter is not allowed, or the name of a registered game is ambiguous or malformed.
        ValueError: ``env_id`` is neither a text nor a path.
    """
    env_id = _text(env_id)
    if env_id.startswith(TEXTWORLD_PREFIX):
        return _textworld_spec(env_id)
    registered = parse_game_name(env_id)
    if registered is not None and not os.path.isfile(env_id):  # a file may contain a colon
        check_request(registered)
        return GameSpec(env_id, "registered", None, registered.md5, registered.name, registered)
    if re.match(r"[a-z][a-z0-9+.-]*://", env_id, re.IGNORECASE):
        raise UserError(
            f"{shown(env_id)!r} is a URL, which is not read. Download the story file yourself and give its path, or "
            f"download a game that Jericho supports. {_download_hint(env_id.rpartition('/')[2])}"
        )
    if re.match(r"[a-z][\w-]*:", env_id, re.IGNORECASE) and not os.path.isfile(env_id):
        raise _unknown(env_id)
    if "/" in env_id:
        path = user_path(env_id, what="The story file ")
        if not path.exists():
            raise UserError(
                f"There is no story file {shown(env_id)!r} ({shown(str(path.absolute()))} does not exist).\n"
                f"{_missing_extension(path.name, folders=[path.parent]) or _download_hint(path.name)}"
            )
    elif re.fullmatch(r".+\.z[1-8]", env_id, re.IGNORECASE):
        path = _find_story(env_id)
    else:
        raise _unknown(env_id)
    return _story_spec(env_id, path)


def _textworld_spec(env_id: str) -> GameSpec:
    if env_id.startswith(FILE_PREFIX):
        path = find_story(env_id, cache_dir() / "textworld")
        return GameSpec(env_id, "textworld", path, _md5(path), own_name(env_id))
    request = textworld_files.parse_request(env_id)
    path = textworld_files.get_or_make(request, cache_dir() / "textworld")
    return GameSpec(env_id, "textworld", path, _md5(path), request.name)


def _unknown(env_id: str) -> UserError:
    names = sorted({game.name for game in registered_games()})
    known = [*supported_games(), *(TEXTWORLD_PREFIX + challenge for challenge in textworld_files.CHALLENGES)]
    hint = (
        _missing_extension(env_id, folders=story_folders()[0])
        or _missing_colon(env_id, names)
        or did_you_mean(f"{env_id.partition(':')[0]}:", [f"{name}:" for name in names])
        or did_you_mean(env_id, known)
    )
    return UserError(
        f"Unknown game {shown(env_id)!r}.{hint and f' {hint.strip()}'}\n"
        "Allowed are: the name of a story file that Jericho supports, such as zork1.z5 (python "
        "scripts/fetch_games.py --list prints all names); a path to such a file; a TextWorld game, such as "
        f"'textworld:simple?seed=7'; or a registered game, NAME:LEVEL?KEY=VALUE. Registered are: "
        f"{', '.join(names) or 'none'}."
    )


def _missing_colon(env_id: str, names: Sequence[str]) -> str:
    """A sentence if ``env_id`` is a registered name without its colon; else ""."""
    if env_id.partition("?")[0] not in names:
        return ""
    name, mark, parameters = env_id.partition("?")
    return f"The registered game {name!r} needs a colon after its name: type {shown(f'{name}:{mark}{parameters}')!r}."


def is_z_machine_name(env_id: str) -> bool:
    """Whether the name means a story file that is played with Jericho, as far as the name alone shows this."""
    return not env_id.startswith(TEXTWORLD_PREFIX) and parse_game_name(env_id) is None


def resolve_games(env_ids: str) -> list[GameSpec]:
    """Resolve the games of a comma-separated list of names, which may be empty; see :func:`resolve_game`.

    Raises:
        UserError: a game cannot be resolved, or occurs twice.
    """
    games = [resolve_game(env_id) for env_id in _split(env_ids)]
    for n, game in enumerate(games):
        if game.md5 in {other.md5 for other in games[:n]}:
            raise _occurs_twice(game.env_id, env_ids)
        if game.name in {other.name for other in games[:n]}:  # they are told apart by it
            raise UserError(f"Two games in {shown(env_ids)!r} have the same file name. Rename one of the files.")
    return games


def check_names(env_ids: str) -> dict[str, str]:
    """As :func:`resolve_games`, but TextWorld games are not generated, which takes seconds.

    Returns:
        The name of each game in ``env_ids``, by an identifier that does not depend on how the name is written.

    Raises:
        UserError: a game is unknown or occurs twice, or its story file is missing or cannot be used.
    """
    names: dict[str, str] = {}
    for env_id in _split(env_ids):
        is_generated = env_id.startswith(TEXTWORLD_PREFIX) and not env_id.startswith(FILE_PREFIX)
        game = textworld_files.parse_request(env_id).name if is_generated else resolve_game(env_id).md5
        if game in names:
            raise _occurs_twice(env_id, env_ids)
        names[game] = env_id
    return names


def _occurs_twice(env_id: str, env_ids: str) -> UserError:
    return UserError(f"The game {env_id!r} occurs twice in {shown(env_ids)!r}. Name each game once.")


def _text(env_id: str | Path) -> str:
    """The name as a text.

    Raises:
        ValueError: it is neither a text nor a path.
    """
    if not isinstance(env_id, str | Path):
        raise ValueError(
            f"{env_id!r} is not the name of a game; give a text, such as 'zork1.z5', or the path of a story file"
        )
    return str(env_id)


def _split(env_ids: str) -> list[str]:
    """The names in a comma-separated list.

    Raises:
        UserError: a name is empty.
        ValueError: ``env_ids`` is not a text.
    """
    env_ids = _text(env_ids)
    if not env_ids.strip():
        return []
    path = env_ids.removeprefix(FILE_PREFIX)
    if os.path.isfile(os.path.expandvars(os.path.expanduser(path))):  # a path may contain a comma
        return [env_ids]
    names = [name.strip() for name in env_ids.split(",")]
    if "" in names:
        raise UserError(f"The list of games {shown(env_ids)!r} contains an empty name. Remove the superfluous comma.")
    return names


def make_game(spec: GameSpec, *, max_score: int = 0, **arguments: Unpack[GameArguments]) -> TextGame:
    """Open a game in this process. A game that hangs would block the process, so training uses ``make_worker``.

    Args:
        spec: the game.
        max_score: the maximum score of a game that does not state it, see :func:`check_max_score`; 0: not known.
        arguments: see :class:`GameArguments`.

    Raises:
        UserError: the story file was changed or deleted after its name was resolved, or the factory of a registered
            game failed.
    """
    if spec.kind not in ("jericho", "textworld", "story", "registered"):
        raise ValueError(f"{spec.env_id!r} is a game of the unknown kind {spec.kind!r}; add it to make_game")
    # Imported here, because a run may not need all libraries.
    if spec.request is not None:
        from priorzero.envs.registered_game import open_registered_game

        return open_registered_game(spec.request, **arguments)
    path = spec.story
    if not path.is_file() or _md5(path) != spec.md5:
        raise UserError(
            f"The story file {str(path)!r} was changed or deleted during the run. Restore it (MD5 {spec.md5}), "
            "then resume the run."
        )
    if spec.kind == "jericho":
        from priorzero.envs.jericho_game import JerichoGame

        return JerichoGame(path, **arguments)
    if spec.kind == "story":
        from priorzero.envs.story_game import StoryGame

        return StoryGame(path, max_score=max_score, **arguments)
    from priorzero.envs.textworld_game import TextWorldGame

    return TextWorldGame(path, **arguments)


def _find_story(name: str) -> Path:
    check_path_text(name, prefix=f"The story file {shown(name)}")
    folders, notes = story_folders()
    for folder in folders:
        if os.path.exists(folder / name):
            return folder / name
    places = "\n".join(f"  {folder / name}" for folder in folders)
    unsearched = f" ({'; '.join(notes)})" if notes else ""
    raise UserError(f"There is no story file {name!r}. Searched{unsearched}:\n{places}\n{_download_hint(name)}")


def story_folders() -> tuple[list[Path], list[str]]:
    """The folders in which story files are searched, in order, and why others are not searched."""
    folders, notes = [user_path(".", what="The working folder ").absolute()], []
    if os.environ.get(GAMES_VARIABLE):
        folders.append(user_path(os.environ[GAMES_VARIABLE], what=f"{GAMES_VARIABLE}="))
    else:
        notes.append(f"${GAMES_VARIABLE} is not set")
    try:
        folders.append(cache_dir())
    except UserError as error:  # the story may be in another folder
        notes.append(str(error))
    return folders, notes


def _missing_extension(name: str, *, folders: Iterable[Path]) -> str:
    """A sentence that suggests the story files with this name and an extension; "" if there are none."""
    supported = [rom for rom in supported_games() if without_extension(rom) == name.lower()]
    existing = [f"{name}.z{version}" for version in range(1, 9)]
    found = [file for file in existing for folder in folders if os.path.isfile(folder / file)]
    files = list(dict.fromkeys([*supported, *found]))
    return f"A story file is named with its extension. Did you mean {' or '.join(map(repr, files))}?" if files else ""


def _download_hint(name: str) -> str:
    supported = supported_games()
    if name not in supported:
        return f"{name!r} is not a story file that Jericho supports.{did_you_mean(name, supported)} {_LIST_HINT}"
    return f"To download {name} (MD5 {supported[name]}), type: python scripts/fetch_games.py {name}"


def _story_spec(env_id: str, path: Path) -> GameSpec:
    content = _read_story(path)
    md5 = _digest(content)
    supported = supported_games()
    rom = {known_md5: rom for rom, known_md5 in supported.items()}.get(md5)  # identified by contents, not by name
    if "." not in path.name:  # Jericho's emulator would crash
        raise UserError(
            f"The name of the story file {str(path)!r} has no extension. Rename it to {rom or f'{path.name}.z5'}."
        )
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"The path of the story file {str(path)!r} is not valid UTF-8, which Jericho needs. Rename it."
        ) from error
    if rom is not None:
        return GameSpec(env_id, "jericho", path.absolute(), md5, Path(rom).stem)
    try:
        check_story(content)
        _warn_of_unsupported(path, md5)
    except UserError as error:
        hint = _download_hint(path.name) if path.name in supported else _LIST_HINT
        raise UserError(f"The story file {str(path)!r} (MD5 {md5}) {error}. {hint}") from error
    # With the extension, since Jericho may support another release of the game: zork1.z3, zork1.z5.
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", path.name).strip("._-") or "story"
    return GameSpec(env_id, "story", path.absolute(), md5, name)


def _read_story(path: Path) -> bytes:
    """The contents of a file that may be a story file.

    Raises:
        UserError: it is not a file, it cannot be read, or its size is impossible.
    """
    if not path.is_file():
        example = path / "zork1.z5" if path.is_dir() else "./zork1.z5"
        raise UserError(f"{str(path)!r} is not a file. Give the path of a story file, such as {example}.")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"The story file {str(path)!r} is empty. Delete it. {_download_hint(path.name)}")
    if size > MAX_STORY_BYTES:
        raise UserError(
            f"{str(path)!r} is not a Z-machine story: it has {size} bytes, and a story has at most {MAX_STORY_BYTES}. "
            f"{_LIST_HINT}"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"Cannot read the story file {str(path)!r}: {error.strerror}. Check its permissions."
        ) from error


@functools.cache
def _survey(path: Path, md5: str) -> StorySurvey:
    from priorzero.envs.story_game import survey_story  # imports Jericho, which not every run needs

    return survey_story(path)


@functools.cache
def _warn_of_unsupported(path: Path, md5: str) -> None:
    """Say once in a process what it means that Jericho does not support a story file; raises as ``survey_story``."""
    survey = _survey(path, md5)
    supported = supported_games()
    stem = without_extension(path.name.lower())
    others = [rom for rom in supported if without_extension(rom) == stem]
    other = f" Jericho supports a game of this name: python scripts/fetch_games.py {others[0]}." if others else ""
    reward = f"Rewards: the {survey.score_source}" if survey.score_source else "Rewards: none, since it states no score"
    maximum = (
        f"the game states the maximum score {survey.max_score}"
        if survey.max_score
        else f"the game does not state the maximum score ({MAX_SCORE_HINT} sets it)"
    )
    logger.warning(
        f"Jericho does not support the story file {shown(str(path))!r} (MD5 {md5}). It is played with a general "
        f"grammar, which may lack commands that the game needs ({survey.num_templates} command templates, "
        f"{survey.num_words} words in its dictionary). {reward}; {maximum}.{other}"
    )


def check_max_score(max_score: int, *, games: Sequence[GameSpec], unseen: Sequence[GameSpec]) -> None:
    """Check the setting ``env.max_score``.

    Raises:
        UserError: it is given, but not for one game whose maximum score is not known.
    """
    if not max_score:
        return
    names = ", ".join(game.env_id for game in [*games, *unseen])
    if len(games) + len(unseen) != 1:
        raise UserError(
            f"env.max_score={max_score} is the maximum score of one game, but run.env_id and eval.unseen name several: "
            f"{shown(names)}. Leave it out, or train on one game"
        )
    (game,) = games
    stated = _survey(game.story, game.md5).max_score if game.kind == "story" else 0
    if game.kind != "story" or stated:
        known = f"the game states {stated}" if stated else "it is a supported game"
        if game.kind == "registered":
            known = "a registered game states it in its states"
        raise UserError(
            f"env.max_score={max_score}: the maximum score of {shown(names)} is known: {known}. Leave it out"
        )


def _digest(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _md5(path: Path) -> str:
    return _digest(path.read_bytes())
