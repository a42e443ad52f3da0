"""The journal on disk: what the front has accepted and emitted outlives the front.

Each engine message is one commit of one row, each accepted call another one. What cannot be written stays in
memory: new requests are refused then, accepted ones go on, and everything is written when there is room again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from gateway.histogram import Histogram
from gateway.journal import RETENTION_S, Journal, JournalCall, JournalEntry, JournalUnavailable
from gateway.journal_opening import open_file, set_aside
from gateway.journal_pruning import check_room, prune
from gateway.journal_records import UnreadableCall, read_call
from gateway.journal_rows import Batch, JournalLocked, StoredCall, StoreError
from gateway.journal_store import SqliteStore
from gateway.journal_unwritten import Unwritten
from gateway.log import Logger
from gateway.protocol import TokenLogprobs

MAX_BYTES = 1 << 30
_RETRY_S = 1.0
_TOUCH_S = 10.0
_BUCKETS_S = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 1.0)


class DiskJournal(Journal):
    """A journal in a file. Never raises for a file that cannot be used: it is moved aside, or the journal says in
    `failing` what is wrong and tries again. Only JournalLocked leaves the constructor."""

    def __init__(
        self,
        path: Path,
        log: Logger,
        *,
        identity: bytes = b"",
        sync: bool = False,
        retention_s: float = RETENTION_S,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """`identity`: of the tokenizer. A journal of another one is moved aside, since its tokens mean something
        else. `sync`: commits outlive power loss, too. `max_bytes`: how large the file may get."""
        super().__init__(retention_s)
        self.write_seconds: Histogram = Histogram(_BUCKETS_S)
        self._path = path
        self._log = log
        self._identity = identity
        self._sync = sync
        self._max_bytes = max_bytes
        self._store: SqliteStore | None = None
        self._unwritten = Unwritten()
        self._last_number = 0
        self._damaged = False
        self._retry_at = 0.0
        self._touched_at = 0.0
        self._welcome: bytes | None = None
        self._used_bytes = 0
        try:
            self._open()
        except StoreError as error:
            self._fail(error)

    # ----------------------------------------------------------------------- opening

    def _open(self) -> None:
        """Raises StoreError if neither the file nor a new one can be used."""
        found = open_file(
            self._path, self._log, identity=self._identity, sync=self._sync, max_bytes=self._max_bytes
        )
        self._store = found.store
        self.moved_aside = found.moved_aside or self.moved_aside
        self._used_bytes = found.used_bytes
        self._welcome = self._welcome or found.welcome
        self._last_number = found.last_number
        self._unwritten.continue_behind(found.last_number, found.next_step)
        for call in found.calls:
            self._live[call.call_id] = call
            self._unwritten.take_up(call)
            if call.key is not None:
                self._live_keys[call.key] = call
        for slot, call in found.slots:
            while slot.entry.request_id in self._entries:  # read late, when others run already
                slot.entry.request_id += "+"
            self._unwritten.slots[slot.entry.request_id] = slot
            self._entries[slot.entry.request_id] = slot.entry
            self._call_of[slot.entry.request_id] = call
        if found.calls:
            self._restored(found.calls, found.age_s)

    def _restored(self, calls: list[JournalCall], age_s: float) -> None:
        try:
            self._rewrite()
        except StoreError as error:
            self._fail(error)
        for call in calls:
            if all(entry.ended for entry in call.entries):  # its last word is missing
                self._end_call(call)
        if age_s > self.retention_s:
            # Nobody waits any more for what is older than what a finished call is kept for.
            text = f"the server was away for {age_s:.0f} s, longer than its journal keeps anything"
            self._log.warning("journal too old", calls=len(calls), detail=text)
            for entry in [entry for call in calls for entry in call.entries]:
                self.finish(entry.request_id, None, error=("unavailable", text))
        self.flush()

    # ----------------------------------------------------------------------- Journal

    @property
    def last_number(self) -> int:
        return self._last_number

    @property
    def saved_welcome(self) -> bytes | None:
        return self._welcome

    def save_welcome(self, content: bytes) -> None:
        if content == self._welcome:
            return
        self._welcome = content
        if self._store is not None and self.failing is None:
            try:
                self._store.set_meta("welcome", content)
            except StoreError as error:
                self._fail(error)

    def check(self) -> None:
        if self.failing is not None:
            self._recover(time.time())
        if self.failing is not None:
            raise JournalUnavailable(
                f"new requests are refused, since the journal cannot be written: {self.failing}; those that were "
                "accepted go on"
            )

    def open_call(self, call: JournalCall) -> None:
        self.check()
        super().open_call(call)
        self._unwritten.open_call(call)

    def accept(self, entry: JournalEntry, call: JournalCall | None = None) -> None:
        super().accept(entry, call)
        if call is not None:
            self._unwritten.accept(entry, call)

    def commit(self, call: JournalCall) -> None:
        self.flush()
        if self.failing is not None and not self._unwritten.knows(call.call_id):
            raise JournalUnavailable(
                f"the request is refused, since the journal cannot be written: {self.failing}"
            )

    def append(
        self,
        request_id: str,
        position: int,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None = None,
        prompt_logprobs: list[TokenLogprobs] | None = None,
        num_cached_tokens: int | None = None,
    ) -> None:
        super().append(request_id, position, token_ids, logprobs, prompt_logprobs, num_cached_tokens)
        slot = self._unwritten.slots.get(request_id)
        if slot is not None and self.failing is None:
            self._unwritten.append(slot, position, token_ids, logprobs, prompt_logprobs, num_cached_tokens)

    def delete(self, call_id: str) -> None:
        self.flush()
        self.check()
        super().delete(call_id)
        assert self._store is not None
        try:
            self._store.delete_calls([call_id])
        except StoreError as error:
            self._fail(error)
            raise JournalUnavailable(f"the journal cannot be written: {error}") from None

    def add_crash(self, request_ids: Iterable[str]) -> None:
        request_ids = list(request_ids)
        super().add_crash(request_ids)
        self._unwritten.count_crashes(request_ids)
        self.flush()

    def acquit(self, request_id: str) -> None:
        super().acquit(request_id)
        self._unwritten.acquit(request_id)

    def flush(self) -> None:
        batch = self._unwritten.take()
        if not batch:
            return
        if self._store is None or self.failing is not None:
            self._keep_unwritten(batch)
            return
        began = time.perf_counter()
        try:
            self._store.write(batch)
        except StoreError as error:
            self._keep_unwritten(batch)
            self._fail(error)
            return
        self.write_seconds.observe(time.perf_counter() - began)
        self._forget(self._unwritten.written())

    def tick(self, now: float) -> None:
        super().tick(now)
        if self._unwritten.slots and now - self._touched_at > _TOUCH_S:
            # In a long outage nothing is written; the file's time says that somebody is there.
            self._touched_at = now
            with contextlib.suppress(OSError):
                os.utime(self._path)
        if self.failing is not None:
            self._recover(now)
        store = self._store
        if store is None or self.failing is not None:
            return
        floor = self._unwritten.first_needed_step
        try:
            self._used_bytes = prune(store, floor, now, self.retention_s, self._max_bytes)
        except StoreError as error:
            self._fail(error)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def find(self, call_id: str) -> JournalCall | None:
        return super().find(call_id) or self._read(lambda store: store.find(call_id))

    def find_key(self, key: str) -> JournalCall | None:
        return super().find_key(key) or self._read(lambda store: store.find_key(key))

    def size_bytes(self) -> int:
        return self._store.size_bytes() if self._store is not None else 0

    # ----------------------------------------------------------------------- inside

    def _note_end(self, entry: JournalEntry, call: JournalCall) -> None:
        self._unwritten.end(entry)

    def _keep_ended(self, call: JournalCall) -> None:
        if self._unwritten.knows(call.call_id):
            self._unwritten.end_call(call)
            super()._keep_ended(call)  # until it is written

    def _keep_unwritten(self, batch: Batch) -> None:
        self._forget(self._unwritten.not_written(batch))

    def _forget(self, ended: list[JournalCall]) -> None:
        for call in ended:
            self._forget_ended(call)

    def _fail(self, error: StoreError) -> None:
        self.num_errors += 1
        self._damaged = self._damaged or (error.damaged and self._store is not None)
        self._retry_at = time.time() + _RETRY_S
        if self.failing is None:
            self._log.error("journal cannot be written", detail=str(error))
        self.failing = str(error)

    def _recover(self, now: float) -> None:
        """Tries to write again, at most once in a while."""
        if now < self._retry_at:
            return
        try:
            if self._damaged and self._store is not None:
                self._store.close()
                self._store = None
                self.moved_aside = set_aside(self._path, self._log, self.failing or "damaged")
                self._damaged = False
            if self._store is None:
                known = set(self._live)
                self._open()
                assert self._store is not None
                self._store.write(self._unwritten.begin_file([self._live[call_id] for call_id in known]))
                self.on_restored([call for call in self._live.values() if call.call_id not in known])
            assert self._store is not None
            check_room(self._store, now, self.retention_s, self._max_bytes)
            self._rewrite()
        except StoreError as error:
            self._fail(error)
            self._drop_ended()
        except JournalLocked as error:
            self._fail(StoreError(str(error)))
        else:
            self.failing = None
            self._log.info("journal can be written again")

    def _drop_ended(self) -> None:
        """Makes room for those that run: what has ended, and cannot be written, goes from the file."""
        calls = self._unwritten.ended_calls
        if self._store is None or self._damaged or not calls:
            return
        try:
            self._store.delete_calls([call.call_id for call in calls])
        except StoreError:
            return  # not even that; there is something else in the way
        self._unwritten.drop_ended_calls()

    def _rewrite(self) -> None:
        """Writes whatever is not in chunks. Raises StoreError."""
        assert self._store is not None
        batch = self._unwritten.take_whole()
        try:
            self._store.write(batch)
            self._store.forget_steps()
        except StoreError:
            self._keep_unwritten(Batch())
            raise
        self._forget(self._unwritten.whole_written())

    def _read(self, find: Callable[[SqliteStore], StoredCall | None]) -> JournalCall | None:
        if self._store is None:
            raise JournalUnavailable(f"the journal cannot be read: {self.failing}")
        try:
            stored = find(self._store)
            return None if stored is None else read_call(stored)
        except UnreadableCall as error:
            raise JournalUnavailable(str(error)) from None
        except StoreError as error:
            self._fail(error)
            raise JournalUnavailable(f"the journal cannot be read: {error}") from None
