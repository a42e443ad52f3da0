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
from gateway.journal_records import (
    Slot,
    StepTokens,
    UnreadableCall,
    call_content,
    encode,
    ending_content,
    read_call,
    request_content,
)
from gateway.journal_rows import Batch, JournalLocked, StoredCall, StoreError
from gateway.journal_store import SqliteStore
from gateway.log import Logger
from gateway.protocol import TokenLogprobs

MAX_BYTES = 1 << 30
CHUNK_TOKENS = 512
"""So many tokens of one request at most are in rows of steps only."""
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
        self._slots: dict[str, Slot] = {}
        self._batch = Batch()
        self._step: list[StepTokens] = []
        self._next_number = 1
        self._next_step = 1
        self._last_number = 0
        self._in_file: set[str] = set()
        """Ids of the calls that live and are, or are about to be, in the file."""
        self._chunked: list[tuple[Slot, int]] = []
        """Whose chunks are in the batch, and how many tokens they had stored before."""
        self._ending: list[Slot] = []
        self._ending_calls: list[JournalCall] = []
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
        self._next_number = max(self._next_number, found.last_number + 1)
        self._next_step = found.next_step
        for call in found.calls:
            self._live[call.call_id] = call
            self._in_file.add(call.call_id)
            if call.key is not None:
                self._live_keys[call.key] = call
        for slot, call in found.slots:
            while slot.entry.request_id in self._entries:  # read late, when others run already
                slot.entry.request_id += "+"
            self._slots[slot.entry.request_id] = slot
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
        self._batch.calls.append((call.call_id, call.key, call_content(call)))
        self._in_file.add(call.call_id)

    def accept(self, entry: JournalEntry, call: JournalCall | None = None) -> None:
        super().accept(entry, call)
        if call is not None:
            number, self._next_number = self._next_number, self._next_number + 1
            entry.num_given = len(entry.output_token_ids)
            self._slots[entry.request_id] = Slot(entry, number, entry.num_given, self._next_step)
            self._batch.requests.append((number, call.call_id, request_content(entry), entry.crashes))

    def commit(self, call: JournalCall) -> None:
        self.flush()
        if self.failing is not None and call.call_id not in self._in_file:
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
        slot = self._slots.get(request_id)
        if slot is None or self.failing is not None:
            return
        if position + len(token_ids) - slot.num_stored >= CHUNK_TOKENS or (prompt_logprobs and not token_ids):
            self._store_chunk(slot)
        elif token_ids:
            if slot.num_stored == position:
                slot.first_step = self._next_step
            new = StepTokens(slot.number, position, token_ids, logprobs, prompt_logprobs, num_cached_tokens)
            self._step.append(new)

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
        self._write_crashes(request_ids)

    def acquit(self, request_id: str) -> None:
        super().acquit(request_id)
        if (slot := self._slots.get(request_id)) is not None:
            self._batch.crashes.append((0, slot.number))

    def flush(self) -> None:
        if self._step:
            self._batch.step = (self._next_step, encode(self._step))
            self._step = []
            self._next_step += 1
        if not self._batch:
            return
        batch, self._batch = self._batch, Batch()
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
        self._written()

    def tick(self, now: float) -> None:
        super().tick(now)
        if self._slots and now - self._touched_at > _TOUCH_S:
            # In a long outage nothing is written; the file's time says that somebody is there.
            self._touched_at = now
            with contextlib.suppress(OSError):
                os.utime(self._path)
        if self.failing is not None:
            self._recover(now)
        store = self._store
        if store is None or self.failing is not None:
            return
        floor = min((s.first_step for s in self._slots.values() if s.needs_steps), default=self._next_step)
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
        slot = self._slots.get(entry.request_id)
        if slot is not None:
            self._store_chunk(slot)
            self._batch.endings.append((ending_content(entry), slot.number))
            self._ending.append(slot)

    def _keep_ended(self, call: JournalCall) -> None:
        if call.call_id in self._in_file:
            assert call.ended_at is not None
            self._batch.ended_calls.append((call.ended_at, call.key, call.call_id))
            self._ending_calls.append(call)
            super()._keep_ended(call)  # until it is written

    def _write_crashes(self, request_ids: Iterable[str]) -> None:
        found = [slot for name in request_ids if (slot := self._slots.get(name)) is not None]
        self._batch.crashes += [(slot.entry.crashes, slot.number) for slot in found]
        self.flush()

    def _store_chunk(self, slot: Slot) -> None:
        before = slot.num_stored
        chunk = slot.chunk()
        slot.first_step = self._next_step
        if chunk is not None:
            self._batch.chunks.append(chunk)
            self._chunked.append((slot, before))

    def _written(self) -> None:
        """The batch is in the file."""
        self._chunked.clear()
        for slot in self._ending:
            self._slots.pop(slot.entry.request_id, None)
        self._ending.clear()
        for call in self._ending_calls:
            self._in_file.discard(call.call_id)
            self._forget_ended(call)
        self._ending_calls.clear()

    def _keep_unwritten(self, batch: Batch) -> None:
        """The batch is not in the file: what it said is still to be written, except calls that are new."""
        for slot, before in reversed(self._chunked):
            slot.num_stored = before
        self._chunked.clear()
        for call_id, _, _ in batch.calls:
            self._in_file.discard(call_id)
        for number, _, _, _ in batch.requests:
            for request_id in [name for name, slot in self._slots.items() if slot.number == number]:
                del self._slots[request_id]
        for call in [call for call in self._ending_calls if call.call_id not in self._in_file]:
            self._ending_calls.remove(call)
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
                self._rewrite_calls([self._live[call_id] for call_id in known])
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
        calls = self._ending_calls
        if self._store is None or self._damaged or not calls:
            return
        try:
            self._store.delete_calls([call.call_id for call in calls])
        except StoreError:
            return  # not even that; there is something else in the way
        for call in calls:
            for entry in call.entries:
                self._slots.pop(entry.request_id, None)
            self._in_file.discard(call.call_id)
        calls.clear()

    def _rewrite(self) -> None:
        """Writes whatever is not in chunks. Raises StoreError."""
        assert self._store is not None
        self._batch, self._step = Batch(), []
        self._chunked.clear()
        for slot in self._slots.values():
            self._store_chunk(slot)
            self._batch.crashes.append((slot.entry.crashes, slot.number))
            if slot.entry.ended:
                self._batch.endings.append((ending_content(slot.entry), slot.number))
        for call in self._ending_calls:
            assert call.ended_at is not None
            self._batch.ended_calls.append((call.ended_at, call.key, call.call_id))
        batch, self._batch = self._batch, Batch()
        try:
            self._store.write(batch)
            self._store.forget_steps()
        except StoreError:
            self._keep_unwritten(Batch())
            raise
        self._ending = [slot for slot in self._slots.values() if slot.entry.ended]
        self._written()

    def _rewrite_calls(self, calls: list[JournalCall]) -> None:
        """Writes calls into a new file. Raises StoreError."""
        assert self._store is not None
        batch = Batch()
        for call in [*calls, *self._ending_calls]:
            batch.calls.append((call.call_id, call.key, call_content(call)))
            for entry in call.entries:
                slot = self._slots.get(entry.request_id)
                if slot is None:
                    slot = Slot(entry, self._next_number, 0, 0)
                    self._next_number += 1
                    self._slots[entry.request_id] = slot
                slot.num_stored = entry.num_given
                batch.requests.append((slot.number, call.call_id, request_content(entry), entry.crashes))
            self._in_file.add(call.call_id)
        self._store.write(batch)

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
