"""Calls: what clients asked for in one piece, and who listens to it now.

Between requests.py and the servers. A call lives longer than the connection that it came by: clients leave and come
back, fronts are killed and started again. HTTP and ZeroMQ decide what a call looks like from outside.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from gateway.errors import RequestFailed
from gateway.journal import Journal, JournalCall, JournalUnavailable
from gateway.live_request import Request
from gateway.log import Logger
from gateway.protocol import Output, SamplingParams
from gateway.requests import Requests

GRACE_S = 2.0
COMMIT_WITHIN_S = 0.005
"""How long a call may wait for its commit, which is shared with what comes in this time, or with the first output."""
MAX_KEY_LENGTH = 255


class OnDisconnect(StrEnum):
    """What becomes of a call that nobody listens to any more."""

    CANCEL = "cancel"
    GRACE = "grace"
    """It is cancelled if nobody takes it up again soon."""
    CONTINUE = "continue"


class KeyReused(Exception):
    """The key of a call came again with something else."""


class Listener(Protocol):
    """Who hears the outputs of a call. Neither method may block or raise."""

    def put(self, index: int, output: Output) -> None:
        """New tokens and text of one of its requests."""

    def fail(self, error: RequestFailed) -> None:
        """The call ended without having finished."""


@dataclass(frozen=True)
class Wanted:
    """One request of a call."""

    prompt_token_ids: list[int]
    params: SamplingParams
    output_token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Conditions:
    """What all requests of a call have in common beside their sampling."""

    stop: list[str]
    priority: int = 0
    deadline_s: float | None = None
    timeout_s: float | None = None
    """What was asked, of which `deadline_s` is left."""


class _Choice:
    """The sink of one request."""

    __slots__ = ("_call", "_index")

    def __init__(self, call: Call, index: int) -> None:
        self._call = call
        self._index = index

    def output(self, request: Request, output: Output) -> None:
        for listener in tuple(self._call.listeners):
            listener.put(self._index, output)
        if output.finish_reason is not None:
            self._call.note_end()

    def failed(self, request: Request, error: RequestFailed) -> None:
        self._call.fail(error)


class Call:
    """A call of this front, running or ended."""

    def __init__(
        self, record: JournalCall, requests: Requests, on_ended: Callable[[Call], None] = lambda call: None
    ) -> None:
        self.record = record
        self.listeners: list[Listener] = []
        self._requests = requests
        self._on_ended = on_ended
        self._members: list[Request] = []
        self._grace: asyncio.TimerHandle | None = None

    @property
    def ended(self) -> bool:
        return self.record.ended_at is not None

    @property
    def is_in_world(self) -> bool:
        """Whether each request has been in a world: it cannot end as "no world came" any more."""
        return all(request.submissions for request in self._members)

    def add(self, request: Request) -> None:
        request.call_id = self.record.call_id
        self._members.append(request)

    def listen(self, listener: Listener) -> None:
        """From now on it hears what comes; what has come is in `record`."""
        self._stop_grace()
        self.listeners.append(listener)

    def leave(self, listener: Listener, grace_s: float, *, keep: bool = False) -> None:
        """Its client is gone, or has all. The last one's going may end the call, with `keep` only if it was to be
        cancelled at once then."""
        if listener in self.listeners:
            self.listeners.remove(listener)
        if self.listeners or self.ended:
            return
        if keep and self.record.on_disconnect != OnDisconnect.CANCEL:
            return
        if self.record.on_disconnect == OnDisconnect.CANCEL or grace_s <= 0:
            if self.record.on_disconnect != OnDisconnect.CONTINUE:
                self.cancel()
        elif self.record.on_disconnect == OnDisconnect.GRACE and self._grace is None:
            self._grace = asyncio.get_running_loop().call_later(grace_s, self.cancel)

    def cancel(self) -> None:
        """Ends what runs of it; listeners get outputs with the finish reason "cancelled"."""
        self._stop_grace()
        for request in self._members:
            self._requests.cancel(request)

    def fail(self, error: RequestFailed) -> None:
        """One of its requests has failed: the others are worth nothing."""
        self._stop_grace()
        listeners, self.listeners = self.listeners, []
        self.cancel()
        for listener in listeners:
            listener.fail(error)
        self.note_end()

    def note_end(self) -> None:
        """To be called when one of its requests has ended."""
        if self.ended:
            self._stop_grace()
            self._members = []  # they know this call, too: without the ring nothing waits for a collection
            self._on_ended(self)

    def _stop_grace(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None


class Calls:
    """All calls that can be taken up: those that run, and through the journal those that have ended."""

    def __init__(
        self, requests: Requests, journal: Journal, log: Logger, *, grace_s: float = GRACE_S
    ) -> None:
        """To be made in the running loop: what an earlier front left unfinished goes on."""
        self.requests = requests
        self.grace_s = grace_s
        self.journal = journal
        self._log = log
        self._live: dict[str, Call] = {}
        self._uncommitted: list[Call] = []
        journal.on_restored = self._restore
        self._restore(journal.unfinished_calls())

    def begin(
        self,
        record: JournalCall,
        wanted: list[Wanted],
        conditions: Conditions,
        *,
        commit_soon: bool = False,
    ) -> Call:
        """Takes a call on, all of its requests or none. When it returns, the journal has it; with `commit_soon` it
        has it within COMMIT_WITHIN_S, and always before an output is heard: for callers that tell nobody before. If
        that fails, the call fails. Raises RequestFailed."""
        tokens = sum(len(one.prompt_token_ids) + len(one.output_token_ids) for one in wanted)
        self.requests.check_admission(len(wanted), tokens)
        try:
            self.journal.open_call(record)
        except JournalUnavailable as error:
            raise self.requests.refused("unavailable", str(error)) from None
        call = self._live[record.call_id] = Call(record, self.requests, self._forget)
        try:
            for index, one in enumerate(wanted):
                call.add(
                    self.requests.accept(
                        one.prompt_token_ids,
                        one.params,
                        conditions.stop,
                        _Choice(call, index),
                        one.output_token_ids,
                        conditions.priority,
                        conditions.deadline_s,
                        conditions.timeout_s,
                        record,
                    )
                )
            if commit_soon:
                self._commit_soon(call)
            else:
                self.journal.commit(record)
        except RequestFailed:
            self._give_up(call)
            raise
        except JournalUnavailable as error:
            self._give_up(call)
            raise self.requests.refused("unavailable", str(error)) from None
        self._log.debug(
            "accepted", call=record.call_id, requests=[entry.request_id for entry in record.entries]
        )
        return call

    def find(self, call_id: str) -> Call | None:
        """By its id. Raises RequestFailed(unavailable) if the journal cannot be read."""
        return self._found(lambda: self.journal.find(call_id))

    def find_key(self, key: str, fingerprint: bytes) -> Call | None:
        """The call that has this key. Raises KeyReused, and RequestFailed(unavailable)."""
        call = self._found(lambda: self.journal.find_key(key))
        if call is not None and call.record.fingerprint != fingerprint:
            raise KeyReused
        return call

    def leave(self, call: Call, listener: Listener, *, keep: bool = False) -> None:
        call.leave(listener, self.grace_s, keep=keep)

    def delete(self, call: Call) -> None:
        """Ends a call, and forgets it. Raises RequestFailed(unavailable) if the journal cannot be written."""
        call.cancel()
        try:
            self.journal.delete(call.record.call_id)
        except JournalUnavailable as error:
            raise RequestFailed("unavailable", str(error)) from None

    # ----------------------------------------------------------------------- inside

    def _found(self, find: Callable[[], JournalCall | None]) -> Call | None:
        try:
            record = find()
        except JournalUnavailable as error:
            raise RequestFailed("unavailable", str(error)) from None
        if record is None:
            return None
        # One that has ended has no requests any more: what it brought is in the record.
        return self._live.get(record.call_id) or Call(record, self.requests)

    def _commit_soon(self, call: Call) -> None:
        if not self._uncommitted:
            asyncio.get_running_loop().call_later(COMMIT_WITHIN_S, self._commit)
        self._uncommitted.append(call)

    def _commit(self) -> None:
        """What came lately is one commit, if the commit of an output has not written it already."""
        calls, self._uncommitted = self._uncommitted, []
        for call in calls:
            if call.ended or any(entry.output_token_ids for entry in call.record.entries):
                continue
            try:
                self.journal.commit(call.record)
            except JournalUnavailable as error:
                call.fail(self.requests.refused("unavailable", str(error)))
                self._give_up(call)

    def _give_up(self, call: Call) -> None:
        call.cancel()
        self.journal.withdraw(call.record)
        self._live.pop(call.record.call_id, None)

    def _forget(self, call: Call) -> None:
        self._live.pop(call.record.call_id, None)

    def _restore(self, records: list[JournalCall]) -> None:
        for record in records:
            call = self._live[record.call_id] = Call(record, self.requests, self._forget)
            for index, entry in enumerate(record.entries):
                if not entry.ended:
                    call.add(self.requests.restore(entry, _Choice(call, index)))
            if record.error is not None:
                call.cancel()
        if records:
            oldest_s = time.time() - min(record.created for record in records)
            self._log.info("calls taken up", calls=len(records), oldest_s=round(oldest_s, 3))
