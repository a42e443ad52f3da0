"""Opening the journal's file: what an earlier front left in it, and what to do with a file that cannot be used.

Used by disk_journal.py alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gateway.journal import JournalCall
from gateway.journal_records import Slot, load_unfinished
from gateway.journal_store import SqliteStore, StoreError, move_aside
from gateway.log import Logger


@dataclass(frozen=True)
class OpenedFile:
    """An open file and what is unfinished in it."""

    store: SqliteStore
    welcome: bytes | None
    last_number: int
    next_step: int
    used_bytes: int
    calls: list[JournalCall]
    slots: list[tuple[Slot, JournalCall]]
    age_s: float
    """Since a front was there last."""


def open_file(path: Path, log: Logger, *, identity: bytes, sync: bool, max_bytes: int) -> OpenedFile:
    """Opens the file, or moves it aside and begins a new one if it is damaged, of a newer version, or of another
    tokenizer. Raises StoreError if neither works, and JournalLocked."""
    try:
        return _open(path, identity, sync, max_bytes)
    except StoreError as error:
        if not error.damaged:
            raise
        detail = str(error)
    except (msgspec.DecodeError, ValueError) as error:
        detail = f"{path}: {error}"
    target = move_aside(path, "unusable")
    log.error("journal moved aside", detail=detail, moved_to=str(target))
    return _open(path, identity, sync, max_bytes)


def _open(path: Path, identity: bytes, sync: bool, max_bytes: int) -> OpenedFile:
    files = [p for p in (path, path.with_name(path.name + "-wal")) if p.exists()]
    written_at = max((p.stat().st_mtime for p in files), default=time.time())
    store = SqliteStore(path, sync=sync, max_bytes=max_bytes)
    try:
        known = store.meta("identity")
        if known is None:
            store.set_meta("identity", identity)
        elif known != identity:
            raise StoreError(f"{path} belongs to another model's tokenizer", damaged=True)
        calls, slots = load_unfinished(store)
        return OpenedFile(
            store,
            store.meta("welcome"),
            store.last_number(),
            store.last_step() + 1,
            store.used_bytes(),
            calls,
            slots,
            time.time() - written_at,
        )
    except BaseException:
        store.close()
        raise
