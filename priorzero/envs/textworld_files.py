"""TextWorld games by name: reads ``textworld:<challenge>?<parameters>`` and makes the story file once, in a cache.

A game is a folder with ``<name>.z8`` (the story), ``<name>.json`` (what TextWorld needs to know about it) and
``<name>.ni`` (its source). The folder appears by one rename, so whoever sees it sees all of it.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from priorzero.envs.child import python_command
from priorzero.types import UserError

MAKE_TIMEOUT_S = 600.0
Value = int | str | bool


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a challenge. Its type is the default's; ``allowed`` is not used for a bool."""

    default: Value
    allowed: range | tuple[Value, ...] = ()

    def parse(self, text: str) -> Value | None:
        """The value that ``text`` stands for, or None if it is not allowed."""
        if isinstance(self.default, bool):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(text.lower())
        if isinstance(self.default, int):
            return int(text) if text.isascii() and text.isdigit() and int(text) in self.allowed else None
        return text if text in self.allowed else None

    def describe(self) -> str:
        if isinstance(self.default, bool):
            return "1 or 0"
        if isinstance(self.allowed, range):
            return f"a whole number from {self.allowed[0]} to {self.allowed[-1]}"
        return ", ".join(str(value) for value in self.allowed)


# TextWorld's own challenges, with the names and the values that ``tw-make`` knows.
CHALLENGES: dict[str, dict[str, Parameter]] = {
    "simple": {
        "rewards": Parameter("dense", ("dense", "balanced", "sparse")),
        "goal": Parameter("detailed", ("detailed", "brief", "none")),
        "test": Parameter(False),
    },
    "coin-collector": {"level": Parameter(1, range(1, 301))},
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
        """``textworld-coin-collector-level5-seed1``: the challenge, what differs from the defaults, the seed."""
        parts = ["textworld", self.challenge]
        for key, value in self.settings.items():
            if value != CHALLENGES[self.challenge][key].default:
                is_flag = isinstance(value, bool)
                parts.append(key if is_flag else f"{key}{value}" if isinstance(value, int) else f"{key}-{value}")
        return "-".join([*parts, f"seed{self.seed}"])


def parse_request(env_id: str) -> TextWorldRequest:
    """Read ``textworld:<challenge>?<parameter>=<value>&...``; parameters that are not given take their defaults.

    Raises:
        UserError: unknown challenge or parameter, a value that is not allowed, a parameter given twice.
    """
    challenge, _, query = env_id.removeprefix("textworld:").partition("?")
    if challenge not in CHALLENGES:
        raise UserError(
            f"Unknown TextWorld challenge {challenge!r} in {env_id!r}.{_nearest(challenge, CHALLENGES)} "
            f"Allowed: {', '.join(CHALLENGES)}. Example: {_EXAMPLE!r}"
        )
    parameters = {**CHALLENGES[challenge], "seed": _SEED}
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise UserError(f"Cannot read the parameters of {env_id!r} ({error}). Write them like {_EXAMPLE!r}") from error
    values: dict[str, Value] = {}
    for written, text in given:
        key = written.replace("-", "_")  # tw-make spells recipe_seed as --recipe-seed
        if key not in parameters:
            raise UserError(
                f"Unknown parameter {written!r} in {env_id!r}.{_nearest(key, parameters)} "
                f"The challenge {challenge!r} takes: {', '.join(parameters)}."
            )
        if key in values:
            raise UserError(f"Parameter {written!r} is given twice in {env_id!r}. Give it once.")
        value = parameters[key].parse(text)
        if value is None:
            raise UserError(f"{written}={text!r} in {env_id!r} is not allowed. Allowed: {parameters[key].describe()}.")
        values[key] = value
    settings = {key: values.get(key, parameter.default) for key, parameter in CHALLENGES[challenge].items()}
    if challenge == "cooking" and int(settings["take"]) > int(settings["recipe"]):
        raise UserError(
            f"take={settings['take']} in {env_id!r} must be at most recipe={settings['recipe']}: only ingredients of "
            f"the recipe can be taken. Try recipe={settings['take']}."
        )
    return TextWorldRequest(challenge, int(values.get("seed", _SEED.default)), settings)


def get_or_make(request: TextWorldRequest, folder: Path) -> Path:
    """The story file of ``request`` below ``folder``; made (about 7 s) if it is not there yet.

    Safe when several processes ask at once: each makes its own copy, the first rename wins, the others use that one.

    Raises:
        UserError: TextWorld could not make the game (its output is in the message), or the folder cannot be written.
    """
    # Another version of the generator makes other games.
    home = folder / importlib.metadata.version("textworld") / request.name
    story = home / f"{request.name}.z8"
    if _is_complete(story):
        return story
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{request.name}-", dir=home.parent))
    except OSError as error:
        raise UserError(
            f"Cannot make the game in {str(home.parent)!r}: {error.strerror}. "
            "Set XDG_CACHE_HOME to a folder that you can write to."
        ) from error
    try:
        _run_generator(request, scratch / "new" / story.name)
        if home.exists() and not _is_complete(story):
            home.rename(scratch / "broken")  # files were deleted by hand
        try:
            (scratch / "new").rename(home)
        except OSError:
            if not _is_complete(story):  # else another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return story


def generate(request_json: str, output: str) -> None:
    """Make one game with TextWorld (runs in a process of its own, see ``_run_generator``)."""
    import textworld
    import textworld.challenges
    import textworld.generator

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


def _run_generator(request: TextWorldRequest, output: Path) -> None:
    output.parent.mkdir()
    request_json = json.dumps({"challenge": request.challenge, "seed": request.seed, "settings": request.settings})
    try:
        done = subprocess.run(
            python_command("priorzero.envs.textworld_files:generate", request_json, str(output)),
            # TextWorld iterates over sets: with another hash seed the same parameters give other files.
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
            f"TextWorld did not make {request.name} within {MAKE_TIMEOUT_S:.0f} s. Ask for less."
        ) from error
    if done.returncode != 0 or not _is_complete(output):
        raise UserError(
            f"TextWorld could not make {request.name} (exit code {done.returncode}). Change its parameters "
            f"({request_json}). TextWorld said:\n{done.stdout.strip()[-2000:]}"
        )


def _erase_date(story: Path) -> None:
    """Overwrite the date of compilation (bytes 18 to 23 of a Z-machine header), so equal games have equal bytes."""
    data = bytearray(story.read_bytes())
    data[18:24] = b"000000"
    story.write_bytes(data)


def _is_complete(story: Path) -> bool:
    return all(file.is_file() and file.stat().st_size > 0 for file in (story, story.with_suffix(".json")))


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
