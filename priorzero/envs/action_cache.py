"""Valid actions on disk: what one process has found, no other process or later run needs to look for again."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from pathlib import Path

from priorzero.envs.cache import cache_dir, digest

CACHE_VARIABLE = "PRIORZERO_ACTION_CACHE"
MAX_ROWS = 200_000  # about 0.7 kB each
BUSY_TIMEOUT_S = 2.0  # transactions take a millisecond; whoever blocks longer is stuck
_CHECKSUM_SIZE = 16  # bytes

logger = logging.getLogger(__name__)


def cache_file() -> Path | None:
    """The file that ``$PRIORZERO_ACTION_CACHE`` names; None if that is ``off``.

    Where the variable is not set or empty: ``valid_actions.sqlite3`` in the folder of fetched games; None, with a
    warning, for a user without a home folder.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named == "off":
        return None
    try:
        return Path(named).expanduser() if named else cache_dir() / "valid_actions.sqlite3"
    except RuntimeError as error:
        logger.warning("No cache of valid actions: %s %s=FILE names a place for it.", error, CACHE_VARIABLE)
        return None


# What a file that is damaged, locked, unwritable or on a full disk raises. ValueError: what SQLite says of a damaged
# file
# need not be UTF-8.
_CANNOT_BE_USED = (sqlite3.Error, OSError, ValueError)


class ActionCache:
    """One sqlite3 file, shared by any number of processes, each with an object of its own.

    It helps or it steps aside: after an error (damaged, locked, unwritable, full disk) it warns once and finds nothing
    any more. An entry that is not what was written is not served.
    """

    def __init__(self, path: Path | None, *, max_rows: int = MAX_ROWS, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        """The file is opened, and made if there is none, at the first use.

        Args:
            path: the file; None for no cache, which never finds anything.
            max_rows: states that the file holds at most, 1 or more; the oldest make room.
            busy_timeout_s: how long to wait for other processes, in seconds.

        Raises:
            ValueError: ``max_rows`` below 1.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows} must be 1 or more")
        self._path = path
        self._max_rows = max_rows
        self._busy_timeout_s = busy_timeout_s
        self._connection: sqlite3.Connection | None = None
        self._is_off = path is None
        self._has_warned_of_damage = False

    def get(self, key: bytes) -> tuple[str, ...] | None:
        """The actions stored under ``key``; None if there are none, or none that can be trusted. Never raises."""
        try:
            connection = self._open()
            if connection is None:
                return None
            row = connection.execute("SELECT value FROM valid_actions WHERE key = ?", (key,)).fetchone()
        except _CANNOT_BE_USED as error:
            self._give_up(error)
            return None
        if row is None:
            return None
        actions = _read(key, row[0])
        if actions is None and not self._has_warned_of_damage:
            logger.warning("Damaged entries in the cache of valid actions %s are left aside", self._path)
            self._has_warned_of_damage = True
        return actions

    def put(self, key: bytes, actions: tuple[str, ...]) -> None:
        """Store ``actions`` under ``key`` in place of what is there. Never raises."""
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
                # New rows get the highest number, so this bounds their count without counting them.
                connection.execute(
                    "DELETE FROM valid_actions WHERE number <= (SELECT MAX(number) FROM valid_actions) - ?",
                    (self._max_rows,),
                )
        except _CANNOT_BE_USED as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file. It is opened again when it is needed again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection | None:
        if self._connection is not None or self._is_off:
            return self._connection
        assert self._path is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Autocommit: transactions are begun by hand. A game may be used by one thread after another.
        connection = sqlite3.connect(
            self._path, timeout=self._busy_timeout_s, isolation_level=None, check_same_thread=False
        )
        try:
            _use_wal(connection, timeout_s=self._busy_timeout_s)
            connection.execute("PRAGMA synchronous=NORMAL")  # a power cut may lose the last entries, not the file
            connection.execute(
                "CREATE TABLE IF NOT EXISTS valid_actions"
                " (number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, value BLOB NOT NULL)"
            )
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _give_up(self, error: Exception) -> None:
        self._is_off = True
        logger.warning(
            "Going on without the cache of valid actions %s: %s: %s. If the file is damaged, delete it; "
            "%s=FILE puts it elsewhere, %s=off does without.",
            self._path, type(error).__name__, error, CACHE_VARIABLE, CACHE_VARIABLE,
        )  # fmt: skip
        self.close()


def _read(key: bytes, value: object) -> tuple[str, ...] | None:
    """The actions of an entry; None if it is not what was written."""
    if not isinstance(value, bytes) or value[:_CHECKSUM_SIZE] != _checksum(key, value[_CHECKSUM_SIZE:]):
        return None
    try:
        return tuple(json.loads(value[_CHECKSUM_SIZE:]))
    except ValueError:
        return None


def _checksum(key: bytes, content: bytes) -> bytes:
    # The key is part of it: the entry of another state does not pass either.
    return digest(key, content)[:_CHECKSUM_SIZE]


def _use_wal(connection: sqlite3.Connection, *, timeout_s: float) -> None:
    """Write-ahead log: readers and a writer do not wait for one another."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            # While other processes make the file, SQLite says "busy" here at once instead of waiting.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
