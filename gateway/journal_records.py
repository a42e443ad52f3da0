"""What the rows of the journal's file contain, and how entries come out of them again.

Used by disk_journal.py alone. Contents are msgpack arrays, to which later versions may add elements at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from gateway.journal import JournalCall, JournalEntry
from gateway.journal_rows import StoredCall, StoredRequest
from gateway.journal_store import SqliteStore
from gateway.protocol import ErrorCode, FinishReason, SamplingParams, TokenLogprobs


class _CallContent(msgspec.Struct, array_like=True):
    kind: str
    created: float
    fingerprint: bytes
    on_disconnect: str
    content: bytes


class _RequestContent(msgspec.Struct, array_like=True):
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    stop: list[str]
    priority: int
    accepted_at: float
    deadline_at: float | None
    given: list[int]
    timeout_s: float | None = None


class _Chunk(msgspec.Struct, array_like=True):
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int | None = None


class StepTokens(msgspec.Struct, array_like=True):
    request: int
    position: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int | None = None


class _Ending(msgspec.Struct, array_like=True):
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    error: tuple[ErrorCode, str] | None


encode = msgspec.msgpack.Encoder().encode
_decode_call = msgspec.msgpack.Decoder(_CallContent).decode
_decode_request = msgspec.msgpack.Decoder(_RequestContent).decode
_decode_chunk = msgspec.msgpack.Decoder(_Chunk).decode
_decode_step = msgspec.msgpack.Decoder(list[StepTokens]).decode
_decode_ending = msgspec.msgpack.Decoder(_Ending).decode


class Slot:
    """Where an entry stands in the file."""

    __slots__ = ("entry", "first_step", "num_stored", "number")

    def __init__(self, entry: JournalEntry, number: int, num_stored: int, first_step: int) -> None:
        self.entry = entry
        self.number = number
        self.num_stored = num_stored
        """Output tokens in chunks, those that the client gave counted."""
        self.first_step = first_step
        """Its other tokens are in steps from this one on."""

    @property
    def needs_steps(self) -> bool:
        """Whether it has tokens that are in no chunk."""
        return self.num_stored < len(self.entry.output_token_ids)

    def chunk(self) -> tuple[int, int, bytes] | None:
        """What is not in chunks yet; from now on it is."""
        entry, position = self.entry, self.num_stored
        token_ids = entry.output_token_ids[position:]
        first = position == entry.num_given
        of_prompt = entry.prompt_logprobs if first else None
        num_cached = entry.num_cached_tokens if first else None
        if not token_ids and of_prompt is None:
            return None
        logprobs = entry.logprobs[position - entry.num_given :] or None
        self.num_stored += len(token_ids)
        return self.number, position, encode(_Chunk(token_ids, logprobs, of_prompt, num_cached))


class UnreadableCall(Exception):
    """The records of one call are not what they should be. The others may be."""


def load_unfinished(
    store: SqliteStore, on_unreadable: Callable[[StoredCall, UnreadableCall], None]
) -> tuple[list[JournalCall], list[tuple[Slot, JournalCall]]]:
    """The calls that have not ended, and the slots of those of their requests that have not. A call that cannot be
    read is told of and left out."""
    calls: list[JournalCall] = []
    slots: dict[int, tuple[Slot, JournalCall]] = {}
    for stored in store.unfinished():
        try:
            call = read_call(stored)
        except UnreadableCall as error:
            on_unreadable(stored, error)
            continue
        calls.append(call)
        for request, entry in zip(stored.requests, call.entries, strict=True):
            if not entry.ended:
                slots[request.number] = (Slot(entry, request.number, len(entry.output_token_ids), 0), call)
    for content in store.steps():
        for new in _decode_step(content):
            found = slots.get(new.request)
            if found is None or new.position != len(found[0].entry.output_token_ids):
                continue  # it is in a chunk
            entry = found[0].entry
            entry.output_token_ids += new.token_ids
            entry.logprobs += new.logprobs or ()
            entry.prompt_logprobs = new.prompt_logprobs or entry.prompt_logprobs
            if new.num_cached_tokens is not None:
                entry.num_cached_tokens = new.num_cached_tokens
    return calls, list(slots.values())


def read_call(stored: StoredCall) -> JournalCall:
    """Raises UnreadableCall."""
    try:
        content = _decode_call(stored.content)
        entries = [_read_request(request) for request in stored.requests]
    except (msgspec.DecodeError, ValueError) as error:
        raise UnreadableCall(f"the records of call {stored.call_id} cannot be read: {error}") from None
    return JournalCall(
        stored.call_id,
        content.kind,
        content.created,
        stored.key,
        content.fingerprint,
        content.on_disconnect,
        content.content,
        entries,
        stored.ended_at,
    )


def _read_request(stored: StoredRequest) -> JournalEntry:
    content = _decode_request(stored.content)
    entry = JournalEntry(
        content.request_id,
        content.prompt_token_ids,
        content.params,
        content.stop,
        content.priority,
        content.accepted_at,
        content.given,
        stored.crashes,
        content.deadline_at,
        len(content.given),
        timeout_s=content.timeout_s,
    )
    for position, encoded in stored.chunks:
        chunk = _decode_chunk(encoded)
        if position != len(entry.output_token_ids):
            raise ValueError(
                f"request {entry.request_id}: tokens from {len(entry.output_token_ids)} are missing"
            )
        entry.output_token_ids += chunk.token_ids
        entry.logprobs += chunk.logprobs or ()
        entry.prompt_logprobs = chunk.prompt_logprobs or entry.prompt_logprobs
        if chunk.num_cached_tokens is not None:
            entry.num_cached_tokens = chunk.num_cached_tokens
    if stored.ending is not None:
        ending = _decode_ending(stored.ending)
        entry.ended = True
        entry.finish_reason, entry.stop_reason, entry.error = (
            ending.finish_reason,
            ending.stop_reason,
            ending.error,
        )
    return entry


def request_content(entry: JournalEntry) -> bytes:
    return encode(
        _RequestContent(
            entry.request_id,
            entry.prompt_token_ids,
            entry.params,
            entry.stop,
            entry.priority,
            entry.accepted_at,
            entry.deadline_at,
            entry.output_token_ids[: entry.num_given],
            entry.timeout_s,
        )
    )


def ending_content(entry: JournalEntry) -> bytes:
    return encode(_Ending(entry.finish_reason, entry.stop_reason, entry.error))


def call_content(call: JournalCall) -> bytes:
    return encode(_CallContent(call.kind, call.created, call.fingerprint, call.on_disconnect, call.content))
