"""The journal: every accepted request and the tokens emitted for it.

Written by the front before a client sees anything. What it holds is all that a request needs to go on in another
world. This one lives as long as the front; disk_journal.py has the one that outlives it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from gateway.errors import GatewayError
from gateway.histogram import Histogram
from gateway.protocol import ErrorCode, FinishReason, SamplingParams, TokenLogprobs

RETENTION_S = 600.0
MAX_MEMORY_TOKENS = 4_000_000
"""Of finished calls that are kept without a disk."""


class PositionError(GatewayError):
    """Tokens that do not continue what the journal has: repeated ones, or a gap before them."""

    def __init__(self, request_id: str, expected: int, got: int) -> None:
        super().__init__(f"request {request_id}: tokens from position {got}, {expected} was expected")
        self.expected = expected
        self.got = got


class JournalUnavailable(GatewayError):
    """The journal cannot be written, so that no new request may be accepted. The text says why."""


@dataclass(slots=True)
class JournalEntry:
    """One accepted request for one sequence of tokens. What it brought grows; the rest stays as it was accepted."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    """With the seed that is used: a request without one got it from the front."""
    stop: list[str]
    priority: int
    accepted_at: float
    """Unix time in seconds."""
    output_token_ids: list[int] = field(default_factory=list)
    """As the client gets them: nothing behind a stop string."""
    crashes: int = 0
    """Worlds that died with this request in them, as `Journal.add_crash` counted, since `Journal.acquit`."""
    deadline_at: float | None = None
    """Unix time at which it ends with the error "timeout"."""
    num_given: int = 0
    """Output tokens that the client had from earlier and gave with the request."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the output tokens from `num_given` on, if they were asked for."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    ended: bool = False
    finish_reason: FinishReason | None = None
    """None while it runs, and for one that ended with an error."""
    stop_reason: int | str | None = None
    error: tuple[ErrorCode, str] | None = None
    timeout_s: float | None = None
    """What was asked for `deadline_at`: some of it had passed when the request was accepted."""
    num_cached_tokens: int | None = None
    """Of its prompt, in the prefix cache of the world that began it; None before, and where that did not say."""


@dataclass(slots=True)
class JournalCall:
    """What a client asked for in one piece: the requests of all prompts and choices of one HTTP or ZeroMQ call."""

    call_id: str
    kind: str
    """Who made it and can answer it again."""
    created: float
    """Unix time in seconds."""
    key: str | None = None
    """By which the client finds it again; no other call has it."""
    fingerprint: bytes = b""
    """Of what was asked: the same key for something else is an error."""
    on_disconnect: str = "continue"
    content: bytes = b""
    """What its maker needs to answer it again."""
    entries: list[JournalEntry] = field(default_factory=list)
    ended_at: float | None = None
    """Unix time; None while one of its requests runs."""

    @property
    def error(self) -> tuple[ErrorCode, str] | None:
        """Of the first request that failed."""
        return next((entry.error for entry in self.entries if entry.error is not None), None)

    def num_cached_tokens(self, num_prompts: int) -> int:
        """Of all prompts, in prefix caches. The choices of a prompt share it: the first of them counts."""
        per_prompt = max(1, len(self.entries) // num_prompts)
        return sum(entry.num_cached_tokens or 0 for entry in self.entries[::per_prompt])

    @property
    def has_answer(self) -> bool:
        """Whether every request ended as it should."""
        return bool(self.entries) and all(e.finish_reason in ("stop", "length") for e in self.entries)


class Journal:
    """Entries by request id, in the order of acceptance. `flush` ends a group of changes: what was written before
    it is kept when it returns, as far as the journal keeps anything.

    Entries without a call are in no file: they end with the front."""

    failing: str | None = None
    """Why nothing can be written; None in good health. What is accepted goes on in memory meanwhile."""
    moved_aside: str | None = None
    """What clients are told of a file that could not be used: its calls are not found any more."""
    num_errors = 0
    """Failed attempts to write."""
    write_seconds: Histogram | None = None
    """How long commits took."""

    def __init__(self, retention_s: float = RETENTION_S) -> None:
        """`retention_s`: how long a finished call can be read."""
        self.retention_s = retention_s
        self.on_restored: Callable[[list[JournalCall]], None] = lambda calls: None
        """Called with unfinished calls of an earlier front that could only be read later than at the start."""
        self._entries: dict[str, JournalEntry] = {}
        self._call_of: dict[str, JournalCall] = {}
        self._live: dict[str, JournalCall] = {}
        self._live_keys: dict[str, JournalCall] = {}
        self._ended: dict[str, JournalCall] = {}
        self._ended_keys: dict[str, JournalCall] = {}
        self._ended_tokens = 0

    @property
    def last_number(self) -> int:
        """The highest number that a request of this journal had when it was opened."""
        return 0

    @property
    def saved_welcome(self) -> bytes | None:
        """What `save_welcome` was given last."""
        return None

    def save_welcome(self, content: bytes) -> None:
        """Keeps what is known of the world."""

    # ----------------------------------------------------------------------- writing

    def check(self) -> None:
        """Raises JournalUnavailable if no new request may be accepted."""

    def open_call(self, call: JournalCall) -> None:
        """A new call, whose entries are to follow. Raises ValueError for an id or a key that is there already (of
        calls that have ended, where they are on disk only, the id is not looked up: ids are made at random)."""
        if call.call_id in self._live or call.call_id in self._ended:
            raise ValueError(f"call {call.call_id} is in the journal already")
        if call.key is not None and self.find_key(call.key) is not None:
            raise ValueError(f"a call with the key {call.key!r} is in the journal already")
        self._live[call.call_id] = call
        if call.key is not None:
            self._live_keys[call.key] = call

    def accept(self, entry: JournalEntry, call: JournalCall | None = None) -> None:
        """A new request, of a call that is open. Raises ValueError for an id that is there already."""
        if entry.request_id in self._entries:
            raise ValueError(f"request {entry.request_id} is in the journal already")
        self._entries[entry.request_id] = entry
        if call is not None:
            call.entries.append(entry)
            self._call_of[entry.request_id] = call

    def commit(self, call: JournalCall) -> None:
        """Writes a call whose requests have been accepted. Raises JournalUnavailable, and then they are not
        accepted: the caller ends them."""
        self.flush()

    def withdraw(self, call: JournalCall) -> None:
        """Ends a call that got no request."""
        if not call.entries and call.call_id in self._live:
            self._end_call(call)

    def delete(self, call_id: str) -> None:
        """Forgets a call that has ended. Does nothing for one that is not there. Raises JournalUnavailable."""
        if (call := self._ended.get(call_id)) is not None:
            self._forget_ended(call)

    def append(
        self,
        request_id: str,
        position: int,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None = None,
        prompt_logprobs: list[TokenLogprobs] | None = None,
        num_cached_tokens: int | None = None,
    ) -> None:
        """New tokens of a request, the first at `position` among its output tokens. Raises PositionError and
        writes nothing if that is not where the journal ends; KeyError for a request that is not there."""
        entry = self._entries[request_id]
        if position != len(entry.output_token_ids):
            raise PositionError(request_id, len(entry.output_token_ids), position)
        entry.output_token_ids += token_ids
        if logprobs is not None:
            entry.logprobs += logprobs
        if prompt_logprobs is not None:
            entry.prompt_logprobs = prompt_logprobs
        if num_cached_tokens is not None:
            entry.num_cached_tokens = num_cached_tokens

    def finish(
        self,
        request_id: str,
        reason: FinishReason | None,
        stop_reason: int | str | None = None,
        error: tuple[ErrorCode, str] | None = None,
    ) -> None:
        """The request ended, with an error if there is no reason. Does nothing for one that is not there."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return
        entry.ended = True
        entry.finish_reason, entry.stop_reason, entry.error = reason, stop_reason, error
        call = self._call_of.pop(request_id, None)
        if call is not None:
            self._note_end(entry, call)
            if all(other.ended for other in call.entries):
                self._end_call(call)

    def add_crash(self, request_ids: Iterable[str]) -> None:
        """One more world died with each of these requests in it. Written when this returns; ids that are not
        there are left out."""
        for request_id in request_ids:
            entry = self._entries.get(request_id)
            if entry is not None:
                entry.crashes += 1

    def acquit(self, request_id: str) -> None:
        """The request was not what those worlds died of: its count begins anew. Written with the next flush;
        an id that is not there is left out."""
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.crashes = 0

    def flush(self) -> None:
        """Makes what was written last. Nothing to do in memory."""

    def tick(self, now: float) -> None:
        """To be called now and then, with the Unix time: forgets what is too old or too much."""
        while self._ended:
            call = next(iter(self._ended.values()))
            assert call.ended_at is not None
            if call.ended_at + self.retention_s > now and self._ended_tokens <= MAX_MEMORY_TOKENS:
                return
            self._forget_ended(call)

    def close(self) -> None:
        """Closes the file, if there is one."""

    # ----------------------------------------------------------------------- reading

    def unfinished(self) -> Iterator[JournalEntry]:
        """The requests that have not ended, oldest first."""
        yield from self._entries.values()

    def unfinished_calls(self) -> list[JournalCall]:
        """The calls that have not ended, oldest first."""
        return list(self._live.values())

    def find(self, call_id: str) -> JournalCall | None:
        """A call that runs, or has ended and is not forgotten yet. Raises JournalUnavailable."""
        return self._live.get(call_id) or self._ended.get(call_id)

    def find_key(self, key: str) -> JournalCall | None:
        """The call that has this key. Raises JournalUnavailable."""
        return self._live_keys.get(key) or self._ended_keys.get(key)

    def size_bytes(self) -> int:
        """Of its file; 0 without one."""
        return 0

    def __len__(self) -> int:
        return len(self._entries)

    # ----------------------------------------------------------------------- inside

    def _note_end(self, entry: JournalEntry, call: JournalCall) -> None:
        """A request of a call has just ended."""

    def _end_call(self, call: JournalCall) -> None:
        """The last request of a call has ended. One without an answer gives up its key: whoever comes with it
        again wants to try again."""
        call.ended_at = time.time()
        self._live.pop(call.call_id, None)
        if call.key is not None:
            self._live_keys.pop(call.key, None)
            if not call.has_answer:
                call.key = None
        self._keep_ended(call)

    def _keep_ended(self, call: JournalCall) -> None:
        self._ended[call.call_id] = call
        self._ended_tokens += _num_tokens(call)
        if call.key is not None:
            self._ended_keys[call.key] = call

    def _forget_ended(self, call: JournalCall) -> None:
        if self._ended.pop(call.call_id, None) is not None:
            self._ended_tokens -= _num_tokens(call)
            if call.key is not None:
                self._ended_keys.pop(call.key, None)


def _num_tokens(call: JournalCall) -> int:
    """What a call weighs, in tokens: an entry of log-probabilities weighs like ten."""
    return sum(_weight(entry) for entry in call.entries)


def _weight(entry: JournalEntry) -> int:
    reported: Sequence[TokenLogprobs] = entry.prompt_logprobs or ()
    tokens = len(entry.prompt_token_ids) + len(entry.output_token_ids)
    return tokens + 10 * (len(entry.logprobs) + len(reported))
