"""A cache of valid actions on disk, which processes and runs share."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import time
from pathlib import Path

from priorzero.runtime.paths import user_cache_dir, user_path
from priorzero.types import UserError

CACHE_VARIABLE = "PRIORZERO_ACTION_CACHE"
MAX_ROWS = 200_000  # a row takes about 0.7 kB
BUSY_TIMEOUT_S = 2.0  # transactions take about a millisecond, so a longer wait means that a process is stuck
_CHECKSUM_SIZE = 16  # bytes

logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """The folder of downloaded and generated games: ``games`` in the user's cache folder."""
    return user_cache_dir() / "games"


def digest(*fields: bytes) -> bytes:
    """A 32-byte hash of a sequence of fields. It depends on where one field ends and the next begins."""
    result = hashlib.blake2b(digest_size=32)
    for field in fields:
        result.update(len(field).to_bytes(8, "big"))
        result.update(field)
    return result.digest()


def cache_file() -> Path | None:
    """The value of ``$PRIORZERO_ACTION_CACHE``, or ``valid_actions.sqlite3`` in the folder of downloaded games.

    None if the value is ``off``, or, with a warning, if it is not a usable path or the user has no home folder.
    """
    value = os.environ.get(CACHE_VARIABLE)
    if value == "off":
        return None
    try:
        return user_path(value, what=f"{CACHE_VARIABLE}=") if value else cache_dir() / "valid_actions.sqlite3"
    except UserError as error:
        logger.warning("The cache of valid actions is disabled: %s. %s=FILE enables it.", error, CACHE_VARIABLE)
        return None


# Raised for a file that is damaged, locked or not writable, or when the disk is full. It is a ValueError if SQLite's
# message about a damaged file is not valid UTF-8.
_CACHE_ERRORS = (sqlite3.Error, OSError, ValueError)


class ActionCache:
    """A key-value store in one SQLite file. Any number of processes can use the file at once.

    Errors never stop a game. If the file is damaged, locked or not writable, or if the disk is full, the cache logs one
    warning and disables itself: ``get`` returns None and ``put`` does nothing. Each entry has a checksum, and damaged
    entries are ignored.
    """

    def __init__(self, path: Path | None, *, max_rows: int = MAX_ROWS, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        """The file is opened, and created if it does not exist, at the first use.

        Args:
            path: the file; None disables the cache.
            max_rows: maximum number of entries, at least 1. The oldest entries are deleted first.
            busy_timeout_s: how long to wait for the lock of another process, in seconds.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows} must be at least 1")
        self._path = path
        self._max_rows = max_rows
        self._busy_timeout_s = busy_timeout_s
        self._connection: sqlite3.Connection | None = None
        self._disabled = path is None
        self._warned_of_damage = False

    def get(self, key: bytes) -> tuple[str, ...] | None:
        """Return the actions stored under ``key``; None if there is no valid entry. Never raises."""
        try:
            connection = self._open()
            if connection is None:
                return None
            row = connection.execute("SELECT value FROM valid_actions WHERE key = ?", (key,)).fetchone()
        except _CACHE_ERRORS as error:
            self._disable(error)
            return None
        if row is None:
            return None
        actions = _decode(key, row[0])
        if actions is None and not self._warned_of_damage:
            logger.warning("The cache of valid actions %s contains damaged entries; they are ignored", self._path)
            self._warned_of_damage = True
        return actions

    def put(self, key: bytes, actions: tuple[str, ...]) -> None:
        """Store ``actions`` under ``key``, replacing an existing entry. Never raises."""
        content = json.dumps(actions).encode()
        try:
            connection = self._open()
            if connection is None:
                return
            with connection:  # one transaction
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(
                    "INSERT OR REPLACE INTO valid_actions (key, value) VALUES (?, ?)",
                    (key, _checksum(key, content) + content),
                )
                # A new row gets the highest number, so this limits the number of rows without counting them.
                connection.execute(
                    "DELETE FROM valid_actions WHERE number <= (SELECT MAX(number) FROM valid_actions) - ?",
                    (self._max_rows,),
                )
        except _CACHE_ERRORS as error:
            self._disable(error)

    def close(self) -> None:
        """Close the file. The next use opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection | None:
        if self._connection is not None or self._disabled:
            return self._connection
        assert self._path is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Isolation level None means that transactions are started explicitly. The thread check is off because several
        # threads may use a game, one after the other.
        connection = sqlite3.connect(
            self._path, timeout=self._busy_timeout_s, isolation_level=None, check_same_thread=False
        )
        try:
            _use_wal(connection, timeout_s=self._busy_timeout_s)
            connection.execute("PRAGMA synchronous=NORMAL")  # a power failure may lose the last entries only
            connection.execute(
                "CREATE TABLE IF NOT EXISTS valid_actions"
                " (number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, value BLOB NOT NULL)"
            )
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _disable(self, error: Exception) -> None:
        self._disabled = True
        logger.warning(
            "The cache of valid actions %s is disabled: %s: %s. If the file is damaged, delete it. Set %s=FILE to use "
            "another file, or %s=off to use no cache.",
            self._path, type(error).__name__, error, CACHE_VARIABLE, CACHE_VARIABLE,
        )  # fmt: skip
        self.close()


def _decode(key: bytes, value: object) -> tuple[str, ...] | None:
    """The actions of an entry; None if it is damaged."""
    if not isinstance(value, bytes) or value[:_CHECKSUM_SIZE] != _checksum(key, value[_CHECKSUM_SIZE:]):
        return None
    try:
        return tuple(json.loads(value[_CHECKSUM_SIZE:]))
    except ValueError:
        return None


def _checksum(key: bytes, content: bytes) -> bytes:
    # It includes the key, so that the entry of another state is rejected.
    return digest(key, content)[:_CHECKSUM_SIZE]


def _use_wal(connection: sqlite3.Connection, *, timeout_s: float) -> None:
    """Use a write-ahead log, with which readers and a writer do not block each other."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            # While another process creates the file, SQLite raises "busy" here immediately instead of waiting.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
