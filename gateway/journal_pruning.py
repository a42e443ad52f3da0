"""Room in the journal's file: what nobody needs any more goes, a little at a time. Called by disk_journal.py, in the
front's loop; everything here raises StoreError."""

from __future__ import annotations

import time

from gateway.journal_store import SqliteStore

_PRUNE_S = 0.005
"""How long one `prune` may delete."""
_FULL_SHARE = 0.8
"""From this share of the largest size on, finished calls go before their time."""
_PROBE_BYTES = 1 << 18
"""What has to fit before new requests are accepted again."""


def prune(store: SqliteStore, first_step: int, now: float, retention_s: float, max_bytes: int) -> int:
    """Deletes steps before the first one that is needed, calls that ended long ago, and more of those if the file is
    nearly full. `now`: Unix time. Returns the bytes that are used then."""
    until = time.perf_counter() + _PRUNE_S
    while time.perf_counter() < until and store.prune_steps(first_step):
        pass
    while time.perf_counter() < until and store.prune_calls(now - retention_s):
        pass
    used_bytes = store.used_bytes()
    while used_bytes > _FULL_SHARE * max_bytes and time.perf_counter() < until:
        if not store.prune_calls(now):
            break
        used_bytes = store.used_bytes()
    store.shrink()
    return used_bytes


def check_room(store: SqliteStore, now: float, retention_s: float, max_bytes: int) -> None:
    """Whether a file that could not be written has room for new requests again, once old calls are gone."""
    store.prune_calls(now - retention_s)
    if store.used_bytes() > _FULL_SHARE * max_bytes:
        store.prune_calls(now)
    store.probe(min(_PROBE_BYTES, max_bytes // 16))
