"""What is not in the journal's file yet: the rows of the next commit, and what becomes of them if it fails.

Used by disk_journal.py alone, which commits. Knows no file and raises nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from gateway.journal import JournalCall, JournalEntry
from gateway.journal_records import Slot, StepTokens, call_content, encode, ending_content, request_content
from gateway.journal_rows import Batch
from gateway.protocol import TokenLogprobs

CHUNK_TOKENS = 512
"""So many tokens of one request at most are in rows of steps only."""


class Unwritten:
    """Rows are collected as things happen, taken for a commit, and then were `written` or `not_written`."""

    def __init__(self) -> None:
        self.slots: dict[str, Slot] = {}
        """Where each request stands in the file whose end is not in it, by its id."""
        self._batch = Batch()
        self._step: list[StepTokens] = []
        self._next_number = 1
        self._next_step = 1
        self._in_file: set[str] = set()
        """Ids of the calls that live and are, or are about to be, in the file."""
        self._chunked: list[tuple[Slot, int]] = []
        """Whose chunks are in the batch, and how many tokens they had stored before."""
        self._ending: list[Slot] = []
        self._ending_calls: list[JournalCall] = []

    # ----------------------------------------------------------------------- a file that was opened

    def continue_behind(self, last_number: int, next_step: int) -> None:
        """Of requests and steps that the file has."""
        self._next_number = max(self._next_number, last_number + 1)
        self._next_step = next_step

    def take_up(self, call: JournalCall) -> None:
        """A call that is in the file and has not ended; its slots follow."""
        self._in_file.add(call.call_id)

    # ----------------------------------------------------------------------- what happens

    def open_call(self, call: JournalCall) -> None:
        self._batch.calls.append((call.call_id, call.key, call_content(call)))
        self._in_file.add(call.call_id)

    def accept(self, entry: JournalEntry, call: JournalCall) -> None:
        slot = self._new_slot(entry, len(entry.output_token_ids), self._next_step)
        entry.num_given = len(entry.output_token_ids)
        self._batch.requests.append((slot.number, call.call_id, request_content(entry), entry.crashes))

    def append(
        self,
        slot: Slot,
        position: int,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None,
        prompt_logprobs: list[TokenLogprobs] | None,
        num_cached_tokens: int | None,
    ) -> None:
        """New tokens, which the slot's entry has already."""
        if position + len(token_ids) - slot.num_stored >= CHUNK_TOKENS or (prompt_logprobs and not token_ids):
            self._store_chunk(slot)
        elif token_ids:
            if slot.num_stored == position:
                slot.first_step = self._next_step
            new = StepTokens(slot.number, position, token_ids, logprobs, prompt_logprobs, num_cached_tokens)
            self._step.append(new)

    def end(self, entry: JournalEntry) -> None:
        slot = self.slots.get(entry.request_id)
        if slot is not None:
            self._store_chunk(slot)
            self._batch.endings.append((ending_content(entry), slot.number))
            self._ending.append(slot)

    def end_call(self, call: JournalCall) -> None:
        """One that it `knows`."""
        assert call.ended_at is not None
        self._batch.ended_calls.append((call.ended_at, call.key, call.call_id))
        self._ending_calls.append(call)

    def count_crashes(self, request_ids: Iterable[str]) -> None:
        """Each as often as its entry says now."""
        found = [slot for name in request_ids if (slot := self.slots.get(name)) is not None]
        self._batch.crashes += [(slot.entry.crashes, slot.number) for slot in found]

    def acquit(self, request_id: str) -> None:
        if (slot := self.slots.get(request_id)) is not None:
            self._batch.crashes.append((0, slot.number))

    # ----------------------------------------------------------------------- commits

    def knows(self, call_id: str) -> bool:
        """Whether a call lives and is, or is about to be, in the file."""
        return call_id in self._in_file

    @property
    def first_needed_step(self) -> int:
        """Rows of earlier steps have nothing that is not in chunks."""
        return min(
            (slot.first_step for slot in self.slots.values() if slot.needs_steps), default=self._next_step
        )

    def take(self) -> Batch:
        """What is to be committed now; the caller says afterwards whether it was."""
        if self._step:
            self._batch.step = (self._next_step, encode(self._step))
            self._step = []
            self._next_step += 1
        batch, self._batch = self._batch, Batch()
        return batch

    def take_whole(self) -> Batch:
        """What is in no chunk, and all that has ended: rows of steps are not needed behind it."""
        self._batch, self._step = Batch(), []
        self._chunked.clear()
        for slot in self.slots.values():
            self._store_chunk(slot)
            self._batch.crashes.append((slot.entry.crashes, slot.number))
            if slot.entry.ended:
                self._batch.endings.append((ending_content(slot.entry), slot.number))
        for call in self._ending_calls:
            assert call.ended_at is not None
            self._batch.ended_calls.append((call.ended_at, call.key, call.call_id))
        batch, self._batch = self._batch, Batch()
        return batch

    def begin_file(self, calls: Iterable[JournalCall]) -> Batch:
        """These calls and those that have ended, for a file that has none of them; `take_whole` follows."""
        batch = Batch()
        for call in [*calls, *self._ending_calls]:
            batch.calls.append((call.call_id, call.key, call_content(call)))
            for entry in call.entries:
                slot = self.slots.get(entry.request_id) or self._new_slot(entry, 0, 0)
                slot.num_stored = entry.num_given
                batch.requests.append((slot.number, call.call_id, request_content(entry), entry.crashes))
            self._in_file.add(call.call_id)
        return batch

    def written(self) -> list[JournalCall]:
        """What was taken is in the file. Returns the calls that nobody has to remember any more: they have ended."""
        self._chunked.clear()
        for slot in self._ending:
            self.slots.pop(slot.entry.request_id, None)
        self._ending.clear()
        ended = self._ending_calls[:]
        self._in_file.difference_update(call.call_id for call in ended)
        self._ending_calls.clear()
        return ended

    def whole_written(self) -> list[JournalCall]:
        """`written`, behind `take_whole`."""
        self._ending = [slot for slot in self.slots.values() if slot.entry.ended]
        return self.written()

    def not_written(self, batch: Batch) -> list[JournalCall]:
        """The batch is not in the file: what it said is still to be written, except calls that are new. Returns those
        of them that have ended."""
        for slot, before in reversed(self._chunked):
            slot.num_stored = before
        self._chunked.clear()
        for call_id, _, _ in batch.calls:
            self._in_file.discard(call_id)
        for number, _, _, _ in batch.requests:
            for request_id in [name for name, slot in self.slots.items() if slot.number == number]:
                del self.slots[request_id]
        lost = [call for call in self._ending_calls if call.call_id not in self._in_file]
        for call in lost:
            self._ending_calls.remove(call)
        return lost

    @property
    def ended_calls(self) -> list[JournalCall]:
        """Calls whose end is not in the file."""
        return self._ending_calls

    def drop_ended_calls(self) -> None:
        """They are in the file no more, and never will be."""
        for call in self._ending_calls:
            for entry in call.entries:
                self.slots.pop(entry.request_id, None)
            self._in_file.discard(call.call_id)
        self._ending_calls.clear()

    # ----------------------------------------------------------------------- inside

    def _new_slot(self, entry: JournalEntry, num_stored: int, first_step: int) -> Slot:
        slot = Slot(entry, self._next_number, num_stored, first_step)
        self._next_number += 1
        self.slots[entry.request_id] = slot
        return slot

    def _store_chunk(self, slot: Slot) -> None:
        before = slot.num_stored
        chunk = slot.chunk()
        slot.first_step = self._next_step
        if chunk is not None:
            self._batch.chunks.append(chunk)
            self._chunked.append((slot, before))
