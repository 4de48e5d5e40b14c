"""Generates TextWorld games by name, ``textworld:<challenge>?<parameters>``, and caches their files.

A game is a folder with ``<name>.z8`` (the story), ``<name>.json`` (TextWorld's data about the game), ``<name>.ni`` (the
source code) and ``md5sums.txt``. The folder is created by a single rename, so that no process sees an incomplete game.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from priorzero.envs.child import python_command
from priorzero.envs.names import did_you_mean
from priorzero.types import UserError

MAKE_TIMEOUT_S = 600.0
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)  # of the generator
CHECKSUMS = "md5sums.txt"
Value = int | str | bool


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a challenge. Its type is the type of the default value.

    Attributes:
        default: the default value.
        allowed: the allowed values; not used for a bool.
        allowed_text: how messages describe them; "": made from ``allowed``.
    """

    default: Value
    allowed: range | tuple[Value, ...] = ()
    allowed_text: str = ""

    def parse(self, text: str) -> Value | None:
        """Convert ``text`` to a value; None if it is not allowed."""
        if isinstance(self.default, bool):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(text.lower())
        if isinstance(self.default, int):
            return int(text) if text.isascii() and text.isdigit() and int(text) in self.allowed else None
        return text if text in self.allowed else None

    def describe(self) -> str:
        """The allowed values, for messages."""
        if self.allowed_text:
            return self.allowed_text
        if isinstance(self.default, bool):
            return "1 or 0"
        if isinstance(self.allowed, range):
            return f"a whole number from {self.allowed[0]} to {self.allowed[-1]}"
        return ", ".join(str(value) for value in self.allowed)


MAX_ROOMS = 100  # of coin-collector: TextWorld 1.7 makes Z-machine stories only, which cannot hold more
COIN_LEVELS = "1 to 100 (no dead ends), 101 to 150 (one dead end at each room), 201 to 233 (two)"

# The challenges of TextWorld, with the names and values of its command ``tw-make``.
CHALLENGES: dict[str, dict[str, Parameter]] = {
    "simple": {
        "rewards": Parameter("dense", ("dense", "balanced", "sparse")),
        "goal": Parameter("detailed", ("detailed", "brief", "none")),
        "test": Parameter(False),
    },
    "coin-collector": {"level": Parameter(1, range(1, 301), COIN_LEVELS)},
    "treasure-hunter": {"level": Parameter(1, range(1, 31))},
    "cooking": {
        "recipe": Parameter(1, range(1, 21)),
        "take": Parameter(0, range(21)),
        "go": Parameter(1, (1, 6, 9, 12)),
        "open": Parameter(False),
        "cook": Parameter(False),
        "cut": Parameter(False),
        "drop": Parameter(False),
        "recipe_seed": Parameter(0, range(2**32)),
        "split": Parameter("all", ("all", "train", "valid", "test")),
    },
}
_SEED = Parameter(0, range(2**32))
_EXAMPLE = "textworld:simple?seed=7&rewards=dense&goal=detailed"


@dataclass(frozen=True, slots=True)
class TextWorldRequest:
    """A challenge with a value for each of its parameters."""

    challenge: str
    seed: int
    settings: dict[str, Value]

    @property
    def name(self) -> str:
        """The challenge, the settings that are not the default, and the seed: ``textworld-cooking-recipe2-seed1``."""
        parts = ["textworld", self.challenge]
        for key, value in self.settings.items():
            if value != CHALLENGES[self.challenge][key].default:
                is_flag = isinstance(value, bool)
                parts.append(key if is_flag else f"{key}{value}" if isinstance(value, int) else f"{key}-{value}")
        return "-".join([*parts, f"seed{self.seed}"])


def parse_request(env_id: str) -> TextWorldRequest:
    """Parse ``textworld:<challenge>?<parameter>=<value>&...``. Omitted parameters have their default values.

    Raises:
        UserError: a challenge or a parameter is unknown, a value is not allowed, or a parameter is given twice.
    """
    challenge, _, query = env_id.removeprefix("textworld:").partition("?")
    if challenge not in CHALLENGES:
        raise UserError(
            f"Unknown TextWorld challenge {challenge!r} in {env_id!r}.{did_you_mean(challenge, CHALLENGES)} "
            f"Allowed are: {', '.join(CHALLENGES)}. Example: {_EXAMPLE!r}"
        )
    parameters = {**CHALLENGES[challenge], "seed": _SEED}
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise UserError(f"Cannot parse the parameters of {env_id!r} ({error}). Example: {_EXAMPLE!r}") from error
    values: dict[str, Value] = {}
    for name, text in given:
        key = name.replace("-", "_")  # in tw-make, recipe_seed is --recipe-seed
        if key not in parameters:
            raise UserError(
                f"Unknown parameter {name!r} in {env_id!r}.{did_you_mean(key, parameters)} "
                f"The parameters of {challenge!r} are: {', '.join(parameters)}."
            )
        if key in values:
            raise UserError(f"The parameter {name!r} is given twice in {env_id!r}. Give it once.")
        value = parameters[key].parse(text)
        if value is None:
            raise UserError(f"{name}={text!r} in {env_id!r} is not allowed. Allowed: {parameters[key].describe()}.")
        values[key] = value
    settings = {key: values.get(key, parameter.default) for key, parameter in CHALLENGES[challenge].items()}
    _check_settings(env_id, challenge, settings)
    return TextWorldRequest(challenge, int(values.get("seed", _SEED.default)), settings)


def _check_settings(env_id: str, challenge: str, settings: Mapping[str, Value]) -> None:
    """Raise a UserError if parameters that are allowed one by one contradict each other, or make too large a game."""
    if challenge == "cooking" and int(settings["take"]) > int(settings["recipe"]):
        raise UserError(
            f"take={settings['take']} in {env_id!r} must be at most recipe={settings['recipe']}, because only the "
            f"recipe's ingredients can be taken. Try recipe={settings['take']}."
        )
    if challenge == "coin-collector":
        level = int(settings["level"])
        rooms = ((level - 1) // 100 + 1) * ((level - 1) % 100 + 1)
        if rooms > MAX_ROOMS:
            raise UserError(
                f"level={level} in {env_id!r} has {rooms} rooms, but TextWorld 1.7 generates at most {MAX_ROOMS}. "
                f"Allowed: {COIN_LEVELS}."
            )


def get_or_make(request: TextWorldRequest, folder: Path) -> Path:
    """Return the story file of ``request`` below ``folder``. If it does not exist, generate the game in a few seconds.

    Several processes can do this at once. Each generates its own copy; the first one that renames its folder wins, and
    the others use that folder.

    Raises:
        UserError: TextWorld failed (the message contains its output), or the folder is not writable.
    """
    # Another version of the generator may generate another game.
    home = folder / importlib.metadata.version("textworld") / request.name
    return get_or_write(home / f"{request.name}.z8", lambda story: _run_generator(request, story))


def get_or_write(story: Path, write: Callable[[Path], None]) -> Path:
    """Return ``story``. If it does not exist, its folder is created by a single rename.

    Args:
        story: the story file; its folder contains nothing else than the game.
        write: writes a story file with this name, and TextWorld's data, into a new folder, which it creates.

    Raises:
        UserError: ``write`` raised it, or the folder is not writable.
    """
    try:
        if not _is_complete(story):
            _make(story, write)
    except OSError as error:
        raise UserError(
            f"Cannot generate the game in {str(story.parent.parent)!r}: {error.strerror}. "
            "Set XDG_CACHE_HOME to a writable folder on a disk with free space."
        ) from error
    return story


def _make(story: Path, write: Callable[[Path], None]) -> None:
    """Generate ``story`` and its folder."""
    home = story.parent
    home.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
    try:
        new = scratch / "new" / story.name
        write(new)
        (new.parent / CHECKSUMS).write_text(_checksums(new))
        if home.exists() and not _is_complete(story):
            home.rename(scratch / "broken")  # files of the game were deleted or damaged
        try:
            (scratch / "new").rename(home)
        except OSError:
            if not _is_complete(story):  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def generate(request_json: str, output: str) -> None:
    """Generate one game with TextWorld. ``_run_generator`` calls this in a new process."""
    import textworld
    import textworld.challenges
    import textworld.generator

    # Inform writes a folder of its own into the home folder, or into the working folder if there is none.
    os.environ["HOME"] = str(Path(output).parent.parent)
    request = json.loads(request_json)
    settings = {**request["settings"], "seed": request["seed"]}
    if settings.get("split") == "all":
        settings["split"] = None
    options = textworld.GameOptions()
    options.seeds = request["seed"]
    options.path = output
    _, make, _ = textworld.challenges.CHALLENGES["tw-" + request["challenge"].replace("-", "_")]
    textworld.generator.compile_game(make(settings, options), options)
    _erase_date(Path(output))


def compile_story(data: str, output: str) -> None:
    """Compile the game that TextWorld's ``.json`` file ``data`` describes. ``run_compiler`` calls this in a process."""
    import textworld
    import textworld.generator

    os.environ["HOME"] = str(Path(output).parent.parent)
    options = textworld.GameOptions()
    options.path = output
    textworld.generator.compile_game(textworld.Game.load(data), options)
    _erase_date(Path(output))


def _run_generator(request: TextWorldRequest, output: Path) -> None:
    request_json = json.dumps({"challenge": request.challenge, "seed": request.seed, "settings": request.settings})
    _run_textworld(
        "generate", request_json, output, what=request.name, advice=f"Change its parameters ({request_json})."
    )


def run_compiler(data: Path, output: Path) -> None:
    """Write the story file ``output`` of the game that TextWorld's ``.json`` file ``data`` describes.

    Raises:
        UserError: TextWorld failed. The message contains its output.
        OSError: the disk is full, or the folder is not writable.
    """
    advice = f"Generate the game again with tw-make of TextWorld {importlib.metadata.version('textworld')}."
    _run_textworld("compile_story", str(data), output, what=str(data), advice=advice)


def _run_textworld(function: str, argument: str, output: Path, *, what: str, advice: str) -> None:
    """Call a function of this module in a new process. It writes the story file ``output`` into a new folder."""
    output.parent.mkdir()
    try:
        done = subprocess.run(
            python_command(f"priorzero.envs.textworld_files:{function}", argument, str(output)),
            # TextWorld iterates over sets, so the files depend on the hash seed.
            env={**os.environ, "PYTHONHASHSEED": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=MAKE_TIMEOUT_S,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"TextWorld did not generate {what} within {MAKE_TIMEOUT_S:.0f} s. Choose a smaller game."
        ) from error
    if done.returncode != 0 or not _is_complete(output):
        for number in DISK_ERRORS:
            if f"[Errno {number}]" in done.stdout:
                raise OSError(number, os.strerror(number))
        raise UserError(
            f"TextWorld failed to generate {what} (exit code {done.returncode}). {advice} The output of TextWorld:\n"
            f"{done.stdout.strip()[-2000:]}"
        )


def _erase_date(story: Path) -> None:
    """Overwrite the compilation date, bytes 18 to 23 of a Z-machine header, so that equal games have equal files."""
    data = bytearray(story.read_bytes())
    data[18:24] = b"000000"
    story.write_bytes(data)


def _is_complete(story: Path) -> bool:
    """Whether the files of a game exist and have the checksums that were stored when it was generated."""
    files = (story, story.with_suffix(".json"))
    if not all(file.is_file() and file.stat().st_size > 0 for file in files):
        return False
    stored = story.parent / CHECKSUMS
    return not stored.is_file() or stored.read_text() == _checksums(story)


def _checksums(story: Path) -> str:
    """The MD5 of the files that are needed to play, in the format of ``md5sum``."""
    files = (story, story.with_suffix(".json"))
    return "".join(
        f"{hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()}  {file.name}\n" for file in files
    )
