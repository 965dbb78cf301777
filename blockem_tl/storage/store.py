"""`Store`: what was computed once and is never computed again, a SQLite file of JSON values by key.

Replies and verdicts are kept in it. Keys are hashes of everything that a value depends on, so any two runs may share a file.
"""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_VERSION = 2
_AT_ONCE = 500  # keys in one query; SQLite takes no more than 999
_PATIENCE = 60.0  # seconds that one process waits for another


class Store:
    """A SQLite file of JSON values by key. What `put` was given is on disk, whole, when it returns; several processes may share the file.

    Write-ahead logging: readers never wait, writers wait for each other for up to a minute. A process may die at any moment; a power cut
    may cost the last rows.

    Raises:
        ValueError: the file is no store, damaged, or written by another version.
        OSError: the disk is full.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.connection = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self.connection.close()
                raise
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            _raise_if_full(error, self.path)
            raise ValueError(f"{self.path}: expected a store of replies and verdicts, or a place to make one, got: {error}") from error

    def _prepare(self) -> None:
        (state,) = self.connection.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {state}. Restore it from a copy, or choose another file")
        if self._version() != _VERSION:
            self._make()
        self._log_ahead()
        self.connection.execute("PRAGMA synchronous=NORMAL")

    def _version(self) -> int:
        return int(self.connection.execute("PRAGMA user_version").fetchone()[0])

    def _make(self) -> None:
        # One transaction: of several processes that meet at a new file, one makes the table and the others wait and find it made.
        with self._writing():
            found = self._version()
            (tables,) = self.connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if found != _VERSION and (found or tables):
                raise ValueError(
                    f"{self.path}: expected a store in format {_VERSION}, got format {found}: another version of blockem_tl or another "
                    "program wrote it; choose another file"
                )
            self.connection.execute("CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value TEXT)")
            self.connection.execute(f"PRAGMA user_version={_VERSION}")

    def _log_ahead(self) -> None:
        # The one statement at which SQLite does not wait for another process.
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                self.connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(0.01)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values that are there, of the keys asked for."""
        wanted, found = list(dict.fromkeys(keys)), {}
        for start in range(0, len(wanted), _AT_ONCE):
            part = wanted[start : start + _AT_ONCE]
            marks = ",".join("?" * len(part))
            found |= dict(self._rows(f"SELECT key, value FROM entries WHERE key IN ({marks})", part))
        return found

    def _rows(self, query: str, arguments: Iterable[str] = ()) -> Iterator[tuple[str, Any]]:
        try:
            yield from ((key, json.loads(value)) for key, value in self.connection.execute(query, tuple(arguments)))
        except (sqlite3.DatabaseError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path}: the store is damaged: {error}. Restore it from a copy, or choose another file") from error

    def put(self, values: Mapping[str, Any]) -> None:
        """Keep values by key, all of them or none; the first value of a key stays. Raises OSError where the disk is full."""
        self._write("INSERT OR IGNORE INTO entries VALUES (?, ?)", values)

    def replace(self, values: Mapping[str, Any]) -> None:
        """As `put`, but a value that is there already gives way."""
        self._write("INSERT OR REPLACE INTO entries VALUES (?, ?)", values)

    def _write(self, statement: str, values: Mapping[str, Any]) -> None:
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        try:
            with self._writing():
                self.connection.executemany(statement, rows)
        except sqlite3.DatabaseError as error:
            _raise_if_full(error, self.path)
            raise

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """(key, value) of everything, by key."""
        return self._rows("SELECT key, value FROM entries ORDER BY key")

    def __len__(self) -> int:
        return int(self.connection.execute("SELECT COUNT(*) FROM entries").fetchone()[0])

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {len(self)} values)"

    def close(self) -> None:
        """Close the file."""
        self.connection.close()


def _raise_if_full(error: Exception, path: Path) -> None:
    if "full" in str(error) or "disk I/O error" in str(error):
        raise OSError(f"the disk is full at {path}, or fails: make room and run the same again; what was kept is still there") from error
