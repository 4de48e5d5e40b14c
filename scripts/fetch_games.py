"""Fetch story files of the Jericho suite: ``python scripts/fetch_games.py zork1.z5 detective.z5``.

A file is kept only if its md5 is the one that Jericho supports. Exit codes: 0 all files are there, 2 a wrong name, a
wrong checksum or a failure of the network.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import http.client
import os
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from priorzero.envs.cache import cache_dir
from priorzero.envs.games import supported_games
from priorzero.types import UserError

BASE_URL = "https://raw.githubusercontent.com/BYU-PCCL/z-machine-games/master/jericho-game-suite/"
MAX_BYTES = 1 << 20  # no Z-machine story is larger than 512 KiB


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parse(arguments)
    supported = supported_games()
    if options.list:
        print("\n".join(sorted(supported)))
        return 0
    names = sorted(supported) if options.all else options.names
    failures = 0
    for name in names:
        try:
            print(fetch(name, options.to, base_url=options.base_url, timeout_s=options.timeout, tries=options.tries))
        except UserError as error:
            failures += 1
            print(f"error: {error}", file=sys.stderr)
    return 2 if failures else 0


def fetch(name: str, folder: Path, *, base_url: str, timeout_s: float, tries: int) -> str:
    """Make sure that ``folder`` holds the supported story file ``name``.

    Args:
        name: a supported name, such as ``zork1.z5``.
        folder: made if it is missing. A file with the right checksum is left alone; a wrong one is replaced, but only
            by a right one.
        base_url: the address of the folder with the story files.
        timeout_s: for one try, from its start to the last byte.
        tries: how often to try when the network fails; a wrong checksum is not tried again.

    Returns:
        One line that says what happened.

    Raises:
        UserError: unknown name, wrong checksum, network failure, unwritable folder.
    """
    supported = supported_games()
    if name not in supported:
        nearest = difflib.get_close_matches(name.lower(), supported, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"Jericho does not support a game called {name!r}.{hint} All names: --list")
    target = folder / name
    if target.is_file() and _md5(target.read_bytes()) == supported[name]:
        return f"{name}: already there, {target}"
    url = base_url.rstrip("/") + "/" + urllib.parse.quote(name)
    content = _download(url, timeout_s=timeout_s, tries=tries)
    if _md5(content) != supported[name]:
        raise UserError(
            f"{name}: what came from {url} has md5 {_md5(content)}, expected {supported[name]}; nothing was kept. "
            "Try another source: --base-url URL"
        )
    try:
        _write(target, content)
    except OSError as error:
        raise UserError(f"{name}: cannot write {target}: {error.strerror}. Choose another folder: --to DIR") from error
    return f"{name}: fetched, {target}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fetch story files of the Jericho suite and check them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="story files, such as zork1.z5")
    parser.add_argument("--all", action="store_true", help="every supported game")
    parser.add_argument("--list", action="store_true", help="print the supported names and stop")
    parser.add_argument("--to", type=Path, default=cache_dir(), metavar="DIR", help="where to (default: %(default)s)")
    parser.add_argument("--base-url", default=BASE_URL, metavar="URL", help="where from (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="seconds for one try (default: 30)")
    parser.add_argument("--tries", type=int, default=3, metavar="N", help="tries for one file (default: 3)")
    options = parser.parse_args(arguments)
    if bool(options.names) + options.all + options.list != 1:
        parser.error("give names (such as zork1.z5), or --all, or --list")
    if options.timeout <= 0 or options.tries < 1:
        parser.error(f"--timeout {options.timeout} must be above 0, --tries {options.tries} at least 1")
    return options


def _download(url: str, *, timeout_s: float, tries: int) -> bytes:
    for attempt in range(1, tries + 1):
        try:
            return _download_once(url, timeout_s)
        except urllib.error.HTTPError as error:
            reason = f"the server answered {error.code} {error.reason}"
            if error.code < 500 and error.code != 429:
                break  # asking again would not help
        except (OSError, ValueError, http.client.HTTPException) as error:  # among them URLError and time limits
            reason = str(error) or type(error).__name__
        if attempt < tries:
            time.sleep(min(2.0 ** (attempt - 1), 10.0))
    raise UserError(
        f"Cannot fetch {url}: {reason} (try {attempt} of {tries}, {timeout_s:g} s each). "
        "Check the network, or give another source: --base-url URL"
    )


def _download_once(url: str, timeout_s: float) -> bytes:
    deadline = time.monotonic() + timeout_s
    content = bytearray()
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        # In pieces: the time limit of a socket is for one read, and a slow server could take for ever.
        while piece := response.read1(1 << 16):
            content += piece
            if time.monotonic() > deadline:
                raise TimeoutError(f"not finished after {timeout_s:g} s")
            if len(content) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES} bytes, this is no story file")
        if response.length:  # what is still missing of the announced length
            raise ConnectionError(f"the connection closed {response.length} bytes too early")
    return bytes(content)


def _write(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
