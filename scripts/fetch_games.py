"""Downloads story files of the Jericho suite: ``python scripts/fetch_games.py zork1.z5 detective.z5``.

A file is kept only if Jericho supports its MD5. The exit code is 0 if all files exist afterwards. It is 2 after an
unknown name, a wrong checksum or a network failure.
"""

from __future__ import annotations

import argparse
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

from priorzero.envs.action_cache import cache_dir
from priorzero.envs.games import supported_games
from priorzero.envs.names import did_you_mean
from priorzero.runtime.paths import user_path
from priorzero.types import UserError

BASE_URL = "https://raw.githubusercontent.com/BYU-PCCL/z-machine-games/master/jericho-game-suite/"
MAX_BYTES = 1 << 20  # a Z-machine story has at most 512 KiB


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parse(arguments)
    supported = supported_games()
    try:
        folder = user_path(options.to, what="--to ") if options.to is not None else cache_dir()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(sorted(supported)))
        return 0
    names = sorted(supported) if options.all else options.names
    failures = 0
    for name in names:
        try:
            print(fetch(name, folder, base_url=options.base_url, timeout_s=options.timeout, tries=options.tries))
        except UserError as error:
            failures += 1
            print(f"error: {error}", file=sys.stderr)
    return 2 if failures else 0


def fetch(name: str, folder: Path, *, base_url: str, timeout_s: float, tries: int) -> str:
    """Download the story file ``name`` into ``folder``, unless it is already there.

    Args:
        name: name of a supported story file, such as ``zork1.z5``.
        folder: created if it does not exist. An existing file is kept if its checksum is correct; otherwise it is
            replaced, but only by a file with the correct checksum.
        base_url: URL of the folder that contains the story files.
        timeout_s: time limit of one attempt, in seconds.
        tries: maximum number of attempts when the network fails. A wrong checksum is not retried.

    Returns:
        One line of text for the user.

    Raises:
        UserError: the name is unknown, the checksum is wrong, the network fails, or the folder is not writable.
    """
    supported = supported_games()
    if name not in supported:
        hint = did_you_mean(name, supported)
        raise UserError(f"Jericho does not support a game called {name!r}.{hint} To list all names, use --list.")
    target = folder / name
    if target.is_file() and _md5(target.read_bytes()) == supported[name]:
        return f"{name}: already exists, {target}"
    url = base_url.rstrip("/") + "/" + urllib.parse.quote(name)
    content = _download(url, timeout_s=timeout_s, tries=tries)
    if _md5(content) != supported[name]:
        raise UserError(
            f"{name}: the file at {url} has MD5 {_md5(content)} instead of {supported[name]}; it was not kept. "
            "Choose another source with --base-url URL."
        )
    try:
        _write(target, content)
    except OSError as error:
        raise UserError(
            f"{name}: cannot write {target}: {error.strerror}. Choose another folder with --to DIR."
        ) from error
    return f"{name}: downloaded, {target}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Download story files of the Jericho suite and check them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="story files, such as zork1.z5")
    parser.add_argument("--all", action="store_true", help="all supported games")
    parser.add_argument("--list", action="store_true", help="print the supported names and exit")
    parser.add_argument(
        "--to", metavar="DIR", help="target folder (default: priorzero/games in $XDG_CACHE_HOME or ~/.cache)"
    )
    parser.add_argument("--base-url", default=BASE_URL, metavar="URL", help="source (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=30.0, metavar="S", help="time limit per attempt, in seconds (default: 30)"
    )
    parser.add_argument("--tries", type=int, default=3, metavar="N", help="attempts per file (default: 3)")
    options = parser.parse_args(arguments)
    if bool(options.names) + options.all + options.list != 1:
        parser.error("give either names (such as zork1.z5), or --all, or --list")
    if options.timeout <= 0 or options.tries < 1:
        parser.error(f"--timeout {options.timeout} must be above 0, and --tries {options.tries} at least 1")
    return options


def _download(url: str, *, timeout_s: float, tries: int) -> bytes:
    for attempt in range(1, tries + 1):
        try:
            return _download_once(url, timeout_s)
        except urllib.error.HTTPError as error:
            reason = f"the server replied {error.code} {error.reason}"
            if error.code < 500 and error.code != 429:
                break  # a retry would fail in the same way
        except (OSError, ValueError, http.client.HTTPException) as error:  # OSError includes URLError and timeouts
            reason = str(error) or type(error).__name__
        if attempt < tries:
            time.sleep(min(2.0 ** (attempt - 1), 10.0))
    raise UserError(
        f"Cannot download {url}: {reason} (attempt {attempt} of {tries}, time limit {timeout_s:g} s). "
        "Check the network, or choose another source with --base-url URL."
    )


def _download_once(url: str, timeout_s: float) -> bytes:
    deadline = time.monotonic() + timeout_s
    content = bytearray()
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        # The timeout of a socket applies to a single read, so the total time is checked after each.
        while chunk := response.read1(1 << 16):
            content += chunk
            if time.monotonic() > deadline:
                raise TimeoutError(f"not finished after {timeout_s:g} s")
            if len(content) > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes, so it is not a story file")
        if response.length:  # the number of missing bytes
            raise ConnectionError(f"the connection was closed, and {response.length} bytes are missing")
    return bytes(content)


def _write(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # only the owner can read a file of mkstemp
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
