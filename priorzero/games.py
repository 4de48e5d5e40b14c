"""Lists games: ``python -m priorzero.games``."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence

from priorzero.envs.games import TEXTWORLD_PREFIX, supported_games
from priorzero.envs.registry import BUILT_IN, ENTRY_POINTS, SOURCE, RegisteredGame, level_names, registered_games
from priorzero.envs.story_files import FoundStory, find_stories
from priorzero.envs.textworld_files import CHALLENGES
from priorzero.envs.textworld_own import FILE_PREFIX
from priorzero.runtime.command import program_name, run_command
from priorzero.runtime.streams import print_output
from priorzero.types import UserError

WIDTH = 100  # characters of a line


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    return argparse.ArgumentParser(
        prog=program_name("priorzero.games"),
        description="List the games that --env_id accepts: story files that were found, story files that can be "
        "downloaded, TextWorld challenges, levels of BabyAI, and the games of installed packages.",
    )


def games_text() -> str:
    """All games that are found, and those that can be fetched.

    Raises:
        UserError: a folder of story files cannot be used.
    """
    folders, notes, stories = find_stories()
    lines = ["Story files that were found"]
    for folder in folders:
        lines.append(f"  in {folder}:")
        own = [story for story in stories if story.path.parent == folder]
        lines += _wrapped([story.path.name for story in own if story.is_supported]) if own else ["    none"]
        lines += [f"    {_other(story)}" for story in own if not story.is_supported]
    lines += [f"  {note}" for note in notes]
    found = {story.rom for story in stories if story.is_supported}
    missing = sorted(set(supported_games()) - found)
    lines += ["", "Story files that can be downloaded: python scripts/fetch_games.py NAME"]
    lines += _wrapped(missing) if missing else ["    none: all games that Jericho supports were found"]
    lines += ["", "TextWorld games, which are generated; each also has the parameter seed"]
    for challenge, parameters in CHALLENGES.items():
        lines.append(f"    {TEXTWORLD_PREFIX}{challenge}")
        lines += [f"        {name}: {p.describe()} (default {_default(p.default)})" for name, p in parameters.items()]
    lines.append(f"    {FILE_PREFIX}PATH: a game that you made with TextWorld, without parameters")
    how = f"a package adds games by the entry-point group {ENTRY_POINTS}"
    lines += ["", f"Registered games: --env_id NAME:LEVEL?KEY=VALUE ({how})"]
    for game in registered_games():
        lines += _registered(game)
    return "\n".join(lines)


def _registered(game: RegisteredGame) -> list[str]:
    """A registered game, and its levels if they are known."""
    if game.source != SOURCE:
        return [f"    {game.name}: of {game}"]
    package = BUILT_IN[game.name].package
    try:
        levels = level_names(game)
    except UserError as error:
        return [f"    {game.name}: built in, but {package} is missing", *_wrapped([str(error)], indent=8)]
    found = f"    {game.name}: built in, with {package} {game.version}"
    return [found, *_wrapped(levels, indent=8)]


def _wrapped(names: Sequence[str], *, indent: int = 4) -> list[str]:
    space = " " * indent
    return textwrap.wrap(", ".join(names), width=WIDTH, initial_indent=space, subsequent_indent=space)


def _other(story: FoundStory) -> str:
    """A story file that Jericho does not support."""
    supported = f"; Jericho supports another file of this name: python scripts/fetch_games.py {story.path.name}"
    hint = supported if story.path.name in supported_games() else ""
    return f"{story.path.name} (not supported by Jericho; played with a general grammar{hint})"


def _default(value: int | str | bool) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 2 after an error that the user can correct.
    """
    return run_command(build_parser(), argv, lambda _: print_output(games_text()))


if __name__ == "__main__":
    sys.exit(main())
