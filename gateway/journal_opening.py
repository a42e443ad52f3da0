"""Opening the journal's file: what an earlier front left in it, and what to do with a file that cannot be used.

Used by disk_journal.py alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from gateway.journal import JournalCall
from gateway.journal_records import Slot, UnreadableCall, load_unfinished
from gateway.journal_rows import Batch, StoredCall, StoreError
from gateway.journal_store import SqliteStore, move_aside
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
    moved_aside: str | None = None
    """What clients are told of an earlier file that could not be used; None if there was none."""


def open_file(path: Path, log: Logger, *, identity: bytes, sync: bool, max_bytes: int) -> OpenedFile:
    """Opens the file, or moves it aside and begins a new one if it is damaged, of a newer version, or of another
    tokenizer. Raises StoreError if neither works, and JournalLocked."""
    try:
        return _open(path, log, identity, sync, max_bytes)
    except StoreError as error:
        if not error.damaged:
            raise
        detail = str(error)
    except (msgspec.DecodeError, ValueError) as error:
        detail = f"{path}: {error}"
    moved_aside = set_aside(path, log, detail)
    return replace(_open(path, log, identity, sync, max_bytes), moved_aside=moved_aside)


def set_aside(path: Path, log: Logger, detail: str) -> str:
    """Moves a file aside that cannot be used, and logs why. Returns what clients are told who ask for a call that was
    in it. Raises StoreError."""
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    target = move_aside(path, "unusable")
    log.error("journal moved aside", detail=detail, moved_to=str(target))
    return f"at {at} the server had to put its journal aside; its log says why"


def _open(path: Path, log: Logger, identity: bytes, sync: bool, max_bytes: int) -> OpenedFile:
    files = [p for p in (path, path.with_name(path.name + "-wal")) if p.exists()]
    written_at = max((p.stat().st_mtime for p in files), default=time.time())
    store = SqliteStore(path, sync=sync, max_bytes=max_bytes)
    try:
        known = store.meta("identity")
        if known is None:
            store.set_meta("identity", identity)
        elif known != identity:
            text = f"{path} belongs to another model's tokenizer; {store.num_unfinished()} calls in it are unfinished"
            raise StoreError(text, damaged=True)
        unreadable: list[str] = []

        def leave_out(stored: StoredCall, error: UnreadableCall) -> None:
            log.error("call cannot be taken up", call=stored.call_id, detail=str(error))
            unreadable.append(stored.call_id)

        calls, slots = load_unfinished(store, leave_out)
        if unreadable:  # or the next front would meet them again
            store.write(Batch(ended_calls=[(time.time(), None, call_id) for call_id in unreadable]))
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
