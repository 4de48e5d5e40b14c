"""Games that are registered under a name: ``NAME:LEVEL?KEY=VALUE&...`` is passed to the factory of ``NAME``.

A package registers a game by an entry point in the group ``priorzero.games``, a program by :func:`register_game`. The
games of :data:`BUILT_IN` are registered by PriorZero itself.

A game runs in a worker process, which imports its factory by name. So a factory is represented by the text
``"module:function"`` everywhere, and this process does not import the module of an entry point.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

from loguru import logger

from priorzero.envs.names import did_you_mean
from priorzero.runtime.paths import shown
from priorzero.runtime.versions import installed_version
from priorzero.types import TextGame, UserError

ENTRY_POINTS = "priorzero.games"
SOURCE = "priorzero"  # of the games in BUILT_IN
REGISTERED = "register_game"  # source of the games of register_game
RESERVED = ("textworld", "jericho", "file", "http", "https", "ftp")  # have another meaning in --env_id
EXAMPLE = "example:small?coins=3"
MAX_NAME = 60  # characters of a short name
_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_ENV_ID = re.compile(rf"({_NAME.pattern}):(?!//)")
_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

MAX_DIGITS = 100  # characters of a number
_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

GameFactory = Callable[..., TextGame]
Value = TypeVar("Value", int, float, bool, str)


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A game of this package that is opened by a factory. Functions are given as ``"module:function"``.

    Attributes:
        factory: opens the game.
        package: the package with the levels. Its version is part of the game's identity.
        check: is called as ``check(level, parameters)`` when the name is resolved, and raises UserError; "" if only the
            factory checks them.
        max_moves: is called as ``max_moves(level, parameters)``: the number of moves after which the level itself
            truncates an episode; "" if this is not known.
        levels: is called without arguments: the names of all levels, or a UserError if ``package`` is not installed; ""
            if they are not known.
    """

    factory: str
    package: str
    check: str = ""
    max_moves: str = ""
    levels: str = ""


BUILT_IN = {
    "babyai": BuiltIn(
        "priorzero.envs.babyai_levels:make_babyai",
        "minigrid",
        check="priorzero.envs.babyai_levels:check_level",
        max_moves="priorzero.envs.babyai_levels:max_moves",
        levels="priorzero.envs.babyai_levels:level_ids",
    ),
    "gymnasium": BuiltIn("priorzero.envs.gymnasium_game:make_gymnasium_game", "gymnasium"),
}


@dataclass(frozen=True, slots=True)
class RegisteredGame:
    """A name and its factory.

    Attributes:
        name: the part of ``--env_id`` before the colon.
        factory: the factory as ``"module:function"``.
        source: the package whose entry point registers the game; ``"register_game"``; or ``"priorzero"`` for a game of
            :data:`BUILT_IN`.
        version: the version of this package, or the one that was given to :func:`register_game`. For a game of
            :data:`BUILT_IN`, that of the package with its levels; "" if it is not installed.
    """

    name: str
    factory: str
    source: str
    version: str

    def __str__(self) -> str:
        """For messages: ``mazes 1.2 (mazes.games:make)``."""
        if self.source == SOURCE:
            return f"PriorZero itself ({self.factory})"
        return f"{self.source}{self.version and f' {self.version}'} ({self.factory})"


@dataclass(frozen=True, slots=True)
class GameRequest:
    """A parsed name: ``NAME:LEVEL?KEY=VALUE&...``.

    Attributes:
        env_id: the name as it was given.
        game: the registered game.
        level: the text between colon and question mark; may be empty.
        parameters: the parameters, sorted by key. Values are texts.
    """

    env_id: str
    game: RegisteredGame
    level: str
    parameters: tuple[tuple[str, str], ...]

    @property
    def md5(self) -> str:
        """Identifies the game: its name, level and parameters, and the package that registers it with its version."""
        parts = [self.game.name, self.game.source, self.game.version, self.level, *map("=".join, self.parameters)]
        return hashlib.md5("\0".join(parts).encode(), usedforsecurity=False).hexdigest()

    @property
    def name(self) -> str:
        """A short name that can be part of a folder's name: ``example-small-coins3``."""
        parts = [f"{key}{value if value.isdecimal() else f'-{value}'}" for key, value in self.parameters]
        plain = "-".join([self.game.name, *filter(None, [self.level]), *parts])
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", plain)
        if name == plain and len(name) <= MAX_NAME:
            return name
        return f"{name[: MAX_NAME - 9]}-{hashlib.md5(plain.encode(), usedforsecurity=False).hexdigest()[:8]}"


_registered: dict[str, RegisteredGame] = {}  # by register_game


def register_game(name: str, factory: GameFactory | str, *, version: str = "") -> None:
    """Register a game for this process: ``run.env_id=NAME:LEVEL?KEY=VALUE`` opens it with ``factory``.

    The factory is imported, so that a missing function is reported here. To register the same name again with the same
    factory and version changes nothing.

    The registration holds for runs that this process starts, such as with ``priorzero.train.run_training``. A command
    line and a Ray cluster find only games that an entry point of an installed package registers.

    Args:
        name: the part of ``env_id`` before the colon: lower-case letters, digits, ``-`` and ``_``.
        factory: is called in a worker process as ``factory(level, parameters, **arguments)``. ``level`` is the text
            after the colon, ``parameters`` a dict of texts, ``arguments`` are :class:`~priorzero.types.GameArguments`.
            It returns a :class:`~priorzero.types.TextGame`. It is a function or a class at the top level of a module
            that can be imported, or such a function's name: ``"module:function"``.
        version: identifies the rules of the game in checkpoints. A run can be resumed with the same version only.

    Raises:
        UserError: the name is not allowed or belongs to another factory, or a worker process could not import the
            factory.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"register_game({name!r}): a name consists of lower-case letters, digits, '-' and '_', and begins with a "
            "letter, such as 'maze'"
        )
    if name in RESERVED or name in BUILT_IN:
        raise UserError(f"register_game({name!r}): this name has a meaning in PriorZero. Choose another name.")
    reference = factory if isinstance(factory, str) else _reference(name, factory)
    if not _REFERENCE.fullmatch(reference):
        raise UserError(
            f"register_game({name!r}, {factory!r}): give a function, or its name as 'module:function', such as "
            "'my_package.maze:make'"
        )
    _check_importable(name, reference)
    game = RegisteredGame(name, reference, REGISTERED, version)
    load_factory(game)
    if _registered.setdefault(name, game) != game:
        raise UserError(
            f"register_game({name!r}, {reference!r}): this name is already registered for "
            f"{_registered[name].factory!r}{_registered[name].version and f' {_registered[name].version}'}. Choose "
            "another name."
        )


def registered_games() -> list[RegisteredGame]:
    """All registered games, sorted by name. A name that two packages register occurs twice; it cannot be used."""
    own = [
        RegisteredGame(name, game.factory, SOURCE, installed_version(game.package)) for name, game in BUILT_IN.items()
    ]
    found = [*own, *_registered.values(), *_entry_points(tuple(sys.path))]
    return sorted(found, key=lambda game: (game.name, game.source))


def parse_game_name(env_id: str) -> GameRequest | None:
    """Parse ``NAME:LEVEL?KEY=VALUE&...`` of a registered game. Special characters are percent-encoded, as in a URL.

    Returns:
        None if ``env_id`` does not begin with a registered name and a colon.

    Raises:
        UserError: two packages register the name, or the parameters are malformed.
    """
    match = _ENV_ID.match(env_id)
    candidates = [game for game in registered_games() if match is not None and game.name == match[1]]
    if match is None or not candidates:
        return None
    if len(candidates) > 1:
        packages = [game.source for game in candidates if game.source not in (SOURCE, REGISTERED)]
        hint = f"uninstall one of them: pip uninstall {packages[-1]}" if packages else "choose another name"
        raise UserError(
            f"The game name {match[1]!r} in {shown(env_id)!r} is registered twice: by "
            f"{' and by '.join(map(str, candidates))}. To use one, {hint}"
        )
    level, _, query = env_id[match.end() :].partition("?")
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise UserError(
            f"Cannot parse the parameters of {shown(env_id)!r} ({error}). A registered game is named "
            f"NAME:LEVEL?KEY=VALUE&KEY=VALUE, such as {EXAMPLE!r}"
        ) from error
    for key in (keys := [key for key, _ in given]):
        if keys.count(key) > 1:
            raise UserError(f"The parameter {key!r} is given twice in {shown(env_id)!r}. Give it once.")
    return GameRequest(env_id, candidates[0], unquote(level), tuple(sorted(given)))


def check_request(request: GameRequest) -> None:
    """Check the level and the parameters of a game of :data:`BUILT_IN`; others are checked by their factories only.

    Raises:
        UserError: the level is unknown, a parameter is not allowed, or a package is not installed.
    """
    check = _function(request.game, "check")
    if check is None:
        return
    try:
        check(request.level, dict(request.parameters))
    except UserError as error:
        raise UserError(f"The game {shown(request.env_id)!r}: {error}") from error


def own_max_moves(request: GameRequest) -> int | None:
    """The number of moves after which the level itself truncates an episode; None if this is not known."""
    max_moves = _function(request.game, "max_moves")
    return None if max_moves is None else max_moves(request.level, dict(request.parameters))


def level_names(game: RegisteredGame) -> list[str]:
    """The levels of a game; empty if they are not known.

    Raises:
        UserError: the package with the levels is not installed.
    """
    levels = _function(game, "levels")
    return [] if levels is None else list(levels())


def _function(game: RegisteredGame, name: str) -> Callable[..., Any] | None:
    """One of the functions of :class:`BuiltIn`; None if the game has none."""
    reference = getattr(BUILT_IN[game.name], name) if game.source == SOURCE else ""
    return _import_object(reference) if reference else None


def _import_object(reference: str) -> Any:
    """The object that ``"module:function"`` names."""
    module, _, qualname = reference.partition(":")
    return functools.reduce(getattr, qualname.split("."), importlib.import_module(module))


def load_factory(game: RegisteredGame) -> GameFactory:
    """Import the factory of a game.

    Raises:
        UserError: its module cannot be imported, or has no such function.
    """
    try:
        factory = _import_object(game.factory)
    except (Exception, SystemExit) as error:  # the module may raise anything when it is imported
        raise UserError(
            f"The game {game.name!r} of {game.source}: its factory {game.factory!r} cannot be imported "
            f"({type(error).__name__}: {error}). "
            + ("Correct the name or the module." if game.source == REGISTERED else "Correct or reinstall the package.")
        ) from error
    if not callable(factory):
        raise UserError(
            f"The game {game.name!r} of {game.source}: its factory {game.factory!r} is not a function but "
            f"{shown(repr(factory))}"
        )
    result: GameFactory = factory
    return result


def read_parameter(parameters: Mapping[str, str], key: str, default: Value) -> Value:
    """The value of a parameter, converted to the type of ``default``: int, float, bool or str.

    Raises:
        UserError: the value cannot be converted.
    """
    if key not in parameters:
        return default
    text = parameters[key]
    if isinstance(default, bool):
        flags = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() not in flags:
            raise UserError(f"{key}={text!r} is not allowed. Allowed: 1 or 0.")
        return flags[text.lower()]
    if isinstance(default, str):
        return text
    number = parse_number(text)
    if number is None or (isinstance(default, int) and not isinstance(number, int)):
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise UserError(f"{key}={text!r} is not allowed. Allowed: {kind}, such as {default}.")
    return type(default)(number)


def parse_number(text: str) -> int | float | None:
    """The finite number that a text is, such as ``7``, ``-0.5`` or ``1e-3``; None for other texts.

    ``nan``, ``inf`` and ``1_000``, which Python accepts, are other texts.
    """
    if len(text) > MAX_DIGITS or not _NUMBER.fullmatch(text):
        return None
    number = int(text) if _WHOLE.fullmatch(text) else float(text)
    return number if math.isfinite(number) else None


def check_parameters(parameters: Mapping[str, str], allowed: Iterable[str]) -> None:
    """Raise a UserError if ``parameters`` has a key that is not ``allowed``."""
    allowed = list(allowed)
    for key in parameters:
        if key not in allowed:
            known = f"The parameters are: {', '.join(allowed)}." if allowed else "There are no parameters."
            raise UserError(f"Unknown parameter {key!r}.{did_you_mean(key, allowed)} {known}")


@functools.cache
def _entry_points(path: tuple[str, ...]) -> list[RegisteredGame]:
    """The games of the packages on the import path. Names that cannot be used are left out, with a warning."""
    games = []
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        source, version = (point.dist.name, point.dist.version) if point.dist is not None else ("unknown package", "")
        if not _NAME.fullmatch(point.name) or point.name in RESERVED:
            logger.warning(
                f"the package {source} registers a game under the name {point.name!r}, which cannot be used. Allowed "
                "are names of lower-case letters, digits, '-' and '_' that have no other meaning"
            )
            continue
        games.append(RegisteredGame(point.name, point.value, source, version))
    return games


def _reference(name: str, factory: GameFactory) -> str:
    """The factory as ``"module:function"``.

    Raises:
        UserError: it has no such name, or another process cannot import it.
    """
    module, qualname = getattr(factory, "__module__", None), getattr(factory, "__qualname__", None)
    where = f"register_game({name!r}, {shown(repr(factory))})"
    rule = "The game runs in a worker process, which imports the factory by its name."
    if not callable(factory):
        raise UserError(f"{where}: give a function, or its name as 'module:function'")
    if not module or not qualname or "<" in qualname:
        raise UserError(
            f"{where}: {rule} Define a function or a class at the top level of a module, not a lambda, a nested "
            "function or an object"
        )
    if module == "__main__":
        raise UserError(
            f"{where}: {rule} A worker process does not run your script or notebook. Move {qualname} into a file of "
            f"its own, such as my_game.py next to it, and type: from my_game import {qualname}"
        )
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if found is not factory:
        raise UserError(
            f"{where}: {rule} But {module}:{qualname} is another object. Register the function that has this name"
        )
    return f"{module}:{qualname}"


def _check_importable(name: str, reference: str) -> None:
    module = reference.partition(":")[0]
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package does not exist; the module was made by a program
        found = False
    if not found:
        raise UserError(
            f"register_game({name!r}, {reference!r}): a worker process cannot import the module {module!r}. Put its "
            "file into a folder on Python's import path (PYTHONPATH), or install its package"
        )
