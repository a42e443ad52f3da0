"""What is kept of files and batches: rows in `batches.sqlite`, contents in the folder `files` of the run folder.

Used by the routes and the runner. Several fronts of one run folder may have it open. A change is
with the operating system when its method returns: it outlives the process, not the power. It knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

MAX_STORED_BYTES = 2**30
"""Of all files and unfinished results together."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, name TEXT NOT NULL, purpose TEXT NOT NULL,
  bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER, owner TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS batches (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, status TEXT NOT NULL, content BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS results (
  batch TEXT NOT NULL, line INTEGER NOT NULL, ok INTEGER NOT NULL, input_tokens INTEGER NOT NULL,
  output_tokens INTEGER NOT NULL, content BLOB NOT NULL, PRIMARY KEY (batch, line)) WITHOUT ROWID;
"""

RUNNING = ("validating", "in_progress", "finalizing", "cancelling")
"""What a batch is before it has ended."""


class StorageFull(Exception):
    """No room is left; the text says how much there is."""


class StorageFailed(Exception):
    """The disk did not do as asked; the text says why."""


@dataclass(frozen=True)
class StoredFile:
    """One file of a client, or of a batch."""

    id: str
    name: str
    purpose: str
    num_bytes: int
    created_at: int
    expires_at: int | None
    owner: str = ""
    """See gateway.keys.owner_id."""


class Batch(msgspec.Struct, kw_only=True):
    """One batch as it is kept. Times are Unix seconds."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: str
    created_at: int
    expires_at: int
    owner: str = ""
    """See gateway.keys.owner_id."""
    metadata: dict[str, str] | None = None
    output_expires_after_s: int | None = None
    times: dict[str, int] = {}
    """When it came into a state, by names like `in_progress_at`."""
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    errors: list[dict[str, Any]] = []
    output_file_id: str | None = None
    error_file_id: str | None = None


@dataclass(frozen=True)
class Counts:
    """Of the lines of a batch that are done."""

    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


_encode = msgspec.msgpack.Encoder().encode
_decode_batch = msgspec.msgpack.Decoder(Batch).decode


class BatchStore:
    """Raises StorageFailed from everything that touches the disk. For one thread, except where it is said."""

    def __init__(self, folder: Path | None, max_bytes: int = MAX_STORED_BYTES) -> None:
        """`folder`: the run folder; without one everything is in a temporary one, and goes with this front."""
        self._given = folder
        self._max_bytes = max_bytes
        self._open_db: sqlite3.Connection | None = None

    @property
    def is_there(self) -> bool:
        """Whether anything can be in it yet."""
        return self._given is not None or self._open_db is not None

    @cached_property
    def folder(self) -> Path:
        return self._given or Path(tempfile.mkdtemp(prefix="phalanx-batches-"))

    @property
    def _files(self) -> Path:
        return self.folder / "files"

    @property
    def _path(self) -> Path:
        return self.folder / "batches.sqlite"

    @property
    def _db(self) -> sqlite3.Connection:
        """Opened when it is needed first: a disk that is full at the start ends no front."""
        if self._open_db is None:
            with _translated():
                self._files.mkdir(mode=0o700, exist_ok=True)
                self._files.chmod(0o700)
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                self._path.chmod(0o600)
                db = sqlite3.connect(self._path, isolation_level=None, timeout=5)
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=OFF")
                db.execute(f"PRAGMA journal_size_limit={4 * 2**20}")
                db.executescript(_SCHEMA)
            self._open_db = db
        return self._open_db

    def close(self) -> None:
        if self._open_db is not None:
            self._open_db.close()
            if self._given is None:
                shutil.rmtree(self.folder, ignore_errors=True)

    # ----------------------------------------------------------------------- files

    def check_room(self, num_bytes: int) -> None:
        """Raises StorageFull if so much more is too much."""
        used = self.used_bytes()
        if used + num_bytes > self._max_bytes:
            text = f"{num_bytes} bytes more would be too much: {used} of {self._max_bytes} bytes are in use; "
            raise StorageFull(text + "delete files that are not needed any more")

    def used_bytes(self) -> int:
        with _translated():
            files = self._db.execute("SELECT ifnull(sum(bytes), 0) FROM files").fetchone()[0]
            results = self._db.execute("SELECT ifnull(sum(length(content)), 0) FROM results").fetchone()[0]
        return int(files + results)

    def write_content(self, parts: Iterable[bytes], file_id: str | None = None) -> str:
        """Writes the content of a new file, and returns its id. It is no file yet. May be called in a thread. With
        an id: again, after an attempt that was cut off."""
        found = file_id or f"file-{uuid.uuid4().hex}"
        path = self._files / found
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_EXCL if file_id is None else os.O_TRUNC)
        with _translated():
            try:
                with open(os.open(path, flags, 0o600), "wb") as out:
                    for part in parts:
                        out.write(part)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return found

    def add_file(
        self, file_id: str, name: str, purpose: str, expires_after_s: int | None, owner: str
    ) -> StoredFile:
        """Makes written content a file."""
        now = int(time.time())
        expires_at = None if expires_after_s is None else now + expires_after_s
        with _translated():
            num_bytes = (self._files / file_id).stat().st_size
            found = StoredFile(file_id, name, purpose, num_bytes, now, expires_at, owner)
            self._db.execute(
                "INSERT OR REPLACE INTO files (id, name, purpose, bytes, created_at, expires_at, owner)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (file_id, name, purpose, num_bytes, now, expires_at, owner),
            )
        return found

    def file(self, file_id: str) -> StoredFile | None:
        found = self._select_files("WHERE id = ?", file_id)
        return found[0] if found else None

    def files(self) -> list[StoredFile]:
        """All of them, the oldest first."""
        return self._select_files("ORDER BY number")

    def path(self, file: StoredFile) -> Path:
        return self._files / file.id

    def delete_file(self, file_id: str) -> None:
        with _translated():
            self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))
            (self._files / file_id).unlink(missing_ok=True)

    def tidy(self, now: float) -> None:
        """Deletes files past their time."""
        with _translated():
            rows = self._db.execute("SELECT id FROM files WHERE expires_at <= ?", (now,)).fetchall()
        for (file_id,) in rows:
            self.delete_file(file_id)

    def sweep(self) -> None:
        """Deletes contents that belong to no file: of a process that was killed while it wrote. To be called by
        the one that runs batches; what was written in the last minutes may be another one's work."""
        with _translated():
            known = {name for (name,) in self._db.execute("SELECT id FROM files")}
            for path in self._files.iterdir():
                if path.name not in known and path.stat().st_mtime < time.time() - 600:
                    path.unlink(missing_ok=True)

    def _select_files(self, rest: str, *values: object) -> list[StoredFile]:
        with _translated():
            rows = self._db.execute(
                f"SELECT id, name, purpose, bytes, created_at, expires_at, owner FROM files {rest}", values
            ).fetchall()
        now = time.time()
        found = [StoredFile(*row) for row in rows]
        return [file for file in found if file.expires_at is None or file.expires_at > now]

    # ----------------------------------------------------------------------- batches

    def add_batch(self, batch: Batch) -> None:
        with _translated():
            values = (batch.id, batch.status, _encode(batch))
            self._db.execute("INSERT INTO batches (id, status, content) VALUES (?, ?, ?)", values)

    def batch(self, batch_id: str) -> Batch | None:
        with _translated():
            row = self._db.execute("SELECT content FROM batches WHERE id = ?", (batch_id,)).fetchone()
        return None if row is None else _decode_batch(row[0])

    def batches(self) -> list[Batch]:
        """All of them, the newest first."""
        with _translated():
            rows = self._db.execute("SELECT content FROM batches ORDER BY number DESC").fetchall()
        return [_decode_batch(content) for (content,) in rows]

    def running_batches(self) -> list[Batch]:
        """Those that have not ended, the oldest first."""
        marks = ",".join("?" * len(RUNNING))
        with _translated():
            rows = self._db.execute(
                f"SELECT content FROM batches WHERE status IN ({marks}) ORDER BY number", RUNNING
            ).fetchall()
        return [_decode_batch(content) for (content,) in rows]

    def set_status(self, batch: Batch, status: str, expected: Iterable[str]) -> bool:
        """A new state, with its time, if the batch is in one of these still. Whether it was; `batch` is as it is
        kept then."""
        with _translated(), self._transaction():
            current = self.batch(batch.id)
            if current is None or current.status not in expected:
                return False
            batch.status = status
            batch.times = {**current.times, f"{status}_at": int(time.time())}
            self._db.execute(
                "UPDATE batches SET status = ?, content = ? WHERE id = ?", (status, _encode(batch), batch.id)
            )
        return True

    def finish(self, batch: Batch, status: str) -> None:
        """The last state of a batch; its results are in files by now."""
        batch.status = status
        batch.times = {**batch.times, f"{status}_at": int(time.time())}
        with _translated(), self._transaction():
            self._db.execute(
                "UPDATE batches SET status = ?, content = ? WHERE id = ?", (status, _encode(batch), batch.id)
            )
            self._db.execute("DELETE FROM results WHERE batch = ?", (batch.id,))

    # ----------------------------------------------------------------------- results

    def add_result(
        self, batch_id: str, line: int, *, ok: bool, content: bytes, tokens: tuple[int, int] = (0, 0)
    ) -> None:
        """A line is done. Nothing changes if it was done already."""
        with _translated():
            self._db.execute(
                "INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?, ?, ?)",
                (batch_id, line, ok, *tokens, content),
            )

    def done_lines(self, batch_id: str) -> set[int]:
        with _translated():
            rows = self._db.execute("SELECT line FROM results WHERE batch = ?", (batch_id,)).fetchall()
        return {line for (line,) in rows}

    def counts(self, batch_id: str) -> Counts:
        with _translated():
            row = self._db.execute(
                "SELECT ifnull(sum(ok), 0), count(*), ifnull(sum(input_tokens), 0), ifnull(sum(output_tokens), 0)"
                " FROM results WHERE batch = ?",
                (batch_id,),
            ).fetchone()
        return Counts(row[0], row[1] - row[0], row[2], row[3])

    def results(self, batch_id: str, *, ok: bool) -> Iterator[bytes]:
        """The lines of the output file, or of the error file, in the order of the input. May be called in a
        thread."""
        with _translated(), contextlib.closing(sqlite3.connect(self._path, timeout=5)) as db:
            for (content,) in db.execute(
                "SELECT content FROM results WHERE batch = ? AND ok = ? ORDER BY line", (batch_id, ok)
            ):
                yield content + b"\n"

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        text = f"files and batches (batches.sqlite and files in the run folder) cannot be read or written: {error}"
        raise StorageFailed(text) from None
