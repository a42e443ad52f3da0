"""The journal's file: one SQLite database in WAL mode, for one front at a time.

Owned by journal.py, which says what to write; called in the front's loop, so that nothing here takes long. A
commit reaches the operating system before `write` returns: it outlives the process, and with `sync` the power.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from gateway.journal_rows import Batch, JournalLocked, StoredCall, StoredRequest, StoreError

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x50484C58  # "PHLX", which `file` and SQLite's own tools show
_PAGE_BYTES = 4096
_WAL_PAGES = 1000
"""A checkpoint is made when the log has so many pages; then it is written again from its start."""
_CALLS_A_PIECE = 16
_STEPS_A_PIECE = 2000
_VACUUM_PAGES = 64
_KEPT_ASIDE = 3

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, content BLOB) WITHOUT ROWID;
CREATE TABLE calls (id TEXT PRIMARY KEY, key TEXT UNIQUE, content BLOB NOT NULL, ended_at REAL) WITHOUT ROWID;
CREATE INDEX calls_ended ON calls (ended_at) WHERE ended_at IS NOT NULL;
CREATE TABLE requests (
  number INTEGER PRIMARY KEY AUTOINCREMENT, call TEXT NOT NULL, content BLOB NOT NULL,
  crashes INTEGER NOT NULL DEFAULT 0, ending BLOB);
CREATE INDEX requests_call ON requests (call);
CREATE TABLE chunks (
  request INTEGER, position INTEGER, content BLOB NOT NULL, PRIMARY KEY (request, position)) WITHOUT ROWID;
CREATE TABLE steps (number INTEGER PRIMARY KEY, content BLOB NOT NULL);
"""
# `steps` has a row for each message of the engine, with the tokens of all its requests; it is the only thing that
# most commits touch. What a request has gathered there becomes a row of `chunks` now and then and when it ends, and
# steps that nobody needs any more are deleted.

_DAMAGED = {
    sqlite3.SQLITE_ERROR,  # "no such table"
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_SCHEMA,
    sqlite3.SQLITE_MISMATCH,
}
"""Errors that say something about the file. All others leave it as it was: a full disk, a lock, and a batch that
breaks a constraint, which is a mistake in the batch."""


class SqliteStore:
    """An open journal file. Raises StoreError from everything that touches the file."""

    def __init__(self, path: Path, *, sync: bool, max_bytes: int) -> None:
        """Opens or makes the file (mode 0600). Raises JournalLocked, and StoreError: `damaged` for a file that is
        no journal of this version."""
        self.path = path
        try:
            self._lock = os.open(
                path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from None
        try:
            _take_lock(self._lock, path)
            with _translated(path):
                self._connection = self._open(sync, max_bytes)
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        os.close(self._lock)

    def _open(self, sync: bool, max_bytes: int) -> sqlite3.Connection:
        try:
            # SQLite gives its -wal the mode of the file.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self.path.chmod(0o600)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}") from None
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=0, cached_statements=64)
        try:
            # One process alone needs no shared index of the log, and no locks at each commit.
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            if (
                self.path.stat().st_size == 0
            ):  # of an old file it would be a write, on a disk that may be full
                connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA synchronous={'FULL' if sync else 'OFF'}")
            connection.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
            connection.execute(f"PRAGMA journal_size_limit={_WAL_PAGES * _PAGE_BYTES}")
            connection.execute("PRAGMA cache_size=-8192")
            connection.execute(f"PRAGMA max_page_count={max(64, max_bytes // _PAGE_BYTES)}")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                text = f"{self.path} was written by a newer version (schema {version}, here {SCHEMA_VERSION})"
                raise StoreError(text, damaged=True)
            if version == 0:
                if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise StoreError(f"{self.path} is a database of something else", damaged=True)
                connection.executescript(
                    f"BEGIN; {_SCHEMA} PRAGMA application_id={_APPLICATION_ID};"
                    f"PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
                )
        except BaseException:
            connection.close()
            raise
        return connection

    # ----------------------------------------------------------------------- writing

    def write(self, batch: Batch) -> None:
        """All of it or nothing."""
        execute = self._connection.execute
        with _translated(self.path):
            if batch.step is not None and not batch.has_more:  # a transaction by itself
                execute("INSERT INTO steps VALUES (?, ?)", batch.step)
                return
            with self._transaction():
                for statement, rows in (
                    ("INSERT INTO calls (id, key, content) VALUES (?, ?, ?)", batch.calls),
                    (
                        "INSERT INTO requests (number, call, content, crashes) VALUES (?, ?, ?, ?)",
                        batch.requests,
                    ),
                    ("INSERT INTO steps VALUES (?, ?)", [batch.step] if batch.step is not None else []),
                    ("INSERT OR REPLACE INTO chunks VALUES (?, ?, ?)", batch.chunks),
                    ("UPDATE requests SET ending = ? WHERE number = ?", batch.endings),
                    ("UPDATE requests SET crashes = ? WHERE number = ?", batch.crashes),
                    ("UPDATE calls SET ended_at = ?, key = ? WHERE id = ?", batch.ended_calls),
                ):
                    if rows:  # also a statement for no row is prepared
                        self._connection.executemany(statement, rows)

    def forget_steps(self) -> None:
        """All steps are in chunks."""
        with _translated(self.path):
            self._connection.execute("DELETE FROM steps")

    def set_meta(self, name: str, content: bytes) -> None:
        with _translated(self.path):
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, content))

    def probe(self, num_bytes: int) -> None:
        """Writes so many bytes for a moment: whether there is room for a request."""
        self.set_meta("probe", bytes(num_bytes))
        self.set_meta("probe", b"")

    # ----------------------------------------------------------------------- reading

    def num_unfinished(self) -> int:
        """How many calls have not ended."""
        with _translated(self.path):
            row = self._connection.execute("SELECT count(*) FROM calls WHERE ended_at IS NULL").fetchone()
        return int(row[0])

    def meta(self, name: str) -> bytes | None:
        with _translated(self.path):
            row = self._connection.execute("SELECT content FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def last_number(self) -> int:
        """The highest number that a request ever had."""
        with _translated(self.path):
            row = self._connection.execute(
                "SELECT seq FROM sqlite_sequence WHERE name = 'requests'"
            ).fetchone()
        return 0 if row is None else int(row[0])

    def last_step(self) -> int:
        with _translated(self.path):
            return int(self._connection.execute("SELECT ifnull(max(number), 0) FROM steps").fetchone()[0])

    def unfinished(self) -> list[StoredCall]:
        """The calls that have not ended, oldest first."""
        with _translated(self.path):
            rows = self._connection.execute(
                "SELECT id, key, content, ended_at FROM calls WHERE ended_at IS NULL"
            ).fetchall()
            calls = [self._with_requests(row) for row in rows]
        return sorted(calls, key=lambda call: call.requests[0].number if call.requests else 0)

    def steps(self) -> Iterator[bytes]:
        """The content of all steps, in order."""
        with _translated(self.path):
            for (content,) in self._connection.execute("SELECT content FROM steps ORDER BY number"):
                yield content

    def find(self, call_id: str) -> StoredCall | None:
        return self._find("id", call_id)

    def find_key(self, key: str) -> StoredCall | None:
        return self._find("key", key)

    def _find(self, column: str, value: str) -> StoredCall | None:
        with _translated(self.path):
            row = self._connection.execute(
                f"SELECT id, key, content, ended_at FROM calls WHERE {column} = ?", (value,)
            ).fetchone()
            return None if row is None else self._with_requests(row)

    def _with_requests(self, row: tuple[str, str | None, bytes, float | None]) -> StoredCall:
        execute = self._connection.execute
        requests = [
            StoredRequest(
                number,
                content,
                crashes,
                ending,
                execute(
                    "SELECT position, content FROM chunks WHERE request = ? ORDER BY position", (number,)
                ).fetchall(),
            )
            for number, content, crashes, ending in execute(
                "SELECT number, content, crashes, ending FROM requests WHERE call = ? ORDER BY number",
                (row[0],),
            ).fetchall()
        ]
        return StoredCall(*row, requests)

    # ----------------------------------------------------------------------- size

    def size_bytes(self) -> int:
        """Of the file and its log."""
        total = 0
        for path in (self.path, self.path.with_name(self.path.name + "-wal")):
            with contextlib.suppress(OSError):
                total += path.stat().st_size
        return total

    def used_bytes(self) -> int:
        """What is in the file, without the pages that are free in it."""
        with _translated(self.path):
            pages = self._connection.execute("PRAGMA page_count").fetchone()[0]
            return int(pages - self._free_pages()) * _PAGE_BYTES

    def prune_steps(self, below: int) -> bool:
        """Deletes some of the steps below this number; whether more are left."""
        with _translated(self.path):
            first = self._connection.execute("SELECT min(number) FROM steps").fetchone()[0]
            if first is None or first >= below:
                return False
            end = min(below, first + _STEPS_A_PIECE)
            self._connection.execute("DELETE FROM steps WHERE number < ?", (end,))
            return end < below

    def prune_calls(self, ended_before: float) -> bool:
        """Deletes a few of the calls that ended before this time, the oldest first; whether more may be left."""
        with _translated(self.path):
            ids = self._connection.execute(
                "SELECT id FROM calls WHERE ended_at < ? ORDER BY ended_at LIMIT ?",
                (ended_before, _CALLS_A_PIECE),
            ).fetchall()
        if ids:
            self.delete_calls([call_id for (call_id,) in ids])
        return len(ids) == _CALLS_A_PIECE

    def delete_calls(self, ids: list[str]) -> None:
        """Deletes calls and all that belongs to them."""
        rows = [(call_id,) for call_id in ids]
        with _translated(self.path), self._transaction():
            many = self._connection.executemany
            many("DELETE FROM chunks WHERE request IN (SELECT number FROM requests WHERE call = ?)", rows)
            many("DELETE FROM requests WHERE call = ?", rows)
            many("DELETE FROM calls WHERE id = ?", rows)

    def shrink(self) -> None:
        """Gives a few pages back to the file system if many are free."""
        with _translated(self.path):
            if self._free_pages() > 4 * _VACUUM_PAGES:
                self._connection.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()

    def _free_pages(self) -> int:
        return int(self._connection.execute("PRAGMA freelist_count").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # some errors have rolled back already
                self._connection.execute("ROLLBACK")
            raise


def move_aside(path: Path, why: str) -> Path:
    """Renames a file that cannot be used, and its log; returns the new name. Of those that were moved earlier the
    last few are kept. Raises StoreError."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    target = path.with_name(f"{path.name}.{why}-{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{why}-{stamp}-{number}")
    try:
        path.rename(target)
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + suffix).rename(target.with_name(target.name + suffix))
    except OSError as error:
        raise StoreError(f"{path} cannot be moved aside: {error.strerror}") from None
    earlier = [p for p in path.parent.glob(f"{path.name}.*-*") if not p.name.endswith(("-wal", "-shm"))]
    for old in sorted(earlier, key=lambda p: p.stat().st_mtime)[:-_KEPT_ASIDE]:
        for suffix in ("", "-wal", "-shm"):
            old.with_name(old.name + suffix).unlink(missing_ok=True)
    return target


def _take_lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise JournalLocked(
            f"{path} is in use by another front; end it first, or give this one another --run-dir"
        ) from None


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        damaged = code is not None and code & 0xFF in _DAMAGED
        raise StoreError(f"{path}: {error}", damaged=damaged) from None
