"""SQLite files that survive killed processes and are shared by several: opened, checked and versioned in one way."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path


def open_database(path: Path | str, schema: str, *, what: str, version: int = 1) -> sqlite3.Connection:
    """Open or make the database at ``path``. Every statement outside of a transaction is on disk when it returns.

    Write-ahead logging: readers never wait, writers wait for each other for up to a minute. A process may die at any moment; a power
    cut may cost the last rows.

    Args:
        schema: one ``CREATE TABLE IF NOT EXISTS`` statement.
        what: what the file should be, for errors.
        version: of the schema, kept in the file.

    Raises:
        ValueError: the file is something else, damaged, or of another version.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        connection = sqlite3.connect(path, timeout=60.0, isolation_level=None)
        try:
            _prepare(connection, path, schema, what, version)
        except BaseException:
            connection.close()
            raise
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{path}: expected a {what}, or a place to make one, got: {error}. Choose another file, or delete this one to begin anew"
        ) from error
    return connection


def insert_all(connection: sqlite3.Connection, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
    """Insert all rows or none."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.executemany(statement, rows)
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _prepare(connection: sqlite3.Connection, path: Path, schema: str, what: str, version: int) -> None:
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if state != "ok":
        raise sqlite3.DatabaseError(f"it is damaged: {state}")
    if found not in (0, version):
        raise ValueError(f"{path}: this {what} is in format {found}, expected {version}: it was written by another version of blockem_tl")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute(schema)
    connection.execute(f"PRAGMA user_version={version}")
