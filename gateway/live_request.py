"""One live request of the front, and what it is connected to: a sink for its outputs, a world for its tokens.

Owned by requests.py; nothing here acts by itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from gateway.detokenizer import TextStream
from gateway.errors import RequestFailed
from gateway.journal import JournalEntry
from gateway.keys import Holder
from gateway.protocol import Cancel, Output, Submit, Welcome


class Sink(Protocol):
    """Where the outputs of a request go. Neither method may block or raise."""

    def output(self, request: Request, output: Output) -> None:
        """New tokens and text; the last one has a finish reason."""

    def failed(self, request: Request, error: RequestFailed) -> None:
        """The request ended without having finished."""


class World(Protocol):
    """The link to the world that serves."""

    @property
    def welcome(self) -> Welcome | None: ...

    def send(self, message: Submit | Cancel) -> None: ...


class Outage:
    """A request between two worlds. Moments are on the monotonic clock."""

    __slots__ = ("began_at", "epoch", "lost_epoch", "resumed_at", "submitted_at")

    def __init__(self, began_at: float, lost_epoch: int | None) -> None:
        self.began_at = began_at
        self.lost_epoch = lost_epoch
        """None for the world of an earlier front."""
        self.epoch: int | None = None
        """Of the next world that had it."""
        self.submitted_at: float | None = None
        self.resumed_at: float | None = None
        """When it had a new token."""


class Request:
    """One live request: its journal entry, and what can be rebuilt from that."""

    __slots__ = (
        "accepted_at",
        "call_id",
        "deadline_timer",
        "deaths_alone",
        "ended",
        "engine_id",
        "entry",
        "epoch",
        "first_step",
        "first_token_at",
        "holder",
        "last_step",
        "last_token_at",
        "num_waiting_tokens",
        "outages",
        "resubmits",
        "sink",
        "submissions",
        "submitted_at",
        "text",
        "trace",
        "wait_timer",
    )

    def __init__(self, entry: JournalEntry, sink: Sink, text: TextStream) -> None:
        self.entry = entry
        self.call_id = entry.request_id
        """What its client knows it by, where it is part of a call."""
        self.num_waiting_tokens = len(entry.prompt_token_ids) + len(entry.output_token_ids)
        """What it counts for while it has no first token."""
        self.sink = sink
        self.text = text
        self.epoch: int | None = None
        """The world that has it; None while it waits for one."""
        self.engine_id = entry.request_id
        """Its id in that world: a new one for each submission, so that late outputs find nobody."""
        self.outages: list[Outage] = []
        """Each time that it was in no world behind its first one."""
        self.first_step: tuple[int, int] | None = None
        """Epoch and step that brought its first token; of a request that is pooled, its numbers."""
        self.last_step: tuple[int, int] | None = None
        self.trace: tuple[dict[str, str], str] | None = None
        """Trace headers and path that it came with, where traces are on."""
        self.submissions = 0
        self.submitted_at: float | None = None
        """When a world had it first, on the monotonic clock."""
        self.resubmits = 0
        self.accepted_at = time.monotonic()
        self.first_token_at: float | None = None
        self.last_token_at = 0.0
        self.deaths_alone = 0
        """Worlds that died while they had nothing but this request: see quarantine.py."""
        self.ended = False
        self.holder: Holder | None = None
        """Whose key its tokens are charged to."""
        self.wait_timer: asyncio.TimerHandle | None = None
        self.deadline_timer: asyncio.TimerHandle | None = None

    @property
    def request_id(self) -> str:
        return self.entry.request_id

    def lose_world(self) -> None:
        """It was in a world, and is not any more."""
        if self.epoch is not None:
            self.outages.append(Outage(time.monotonic(), self.epoch))
            self.epoch = None

    def has_come_with(self, epoch: int, step: int) -> None:
        """New tokens are those of this step."""
        self.last_step = (epoch, step)
        if self.first_step is None:
            self.first_step = self.last_step

    def read(self, output: Output, eos_token_ids: Sequence[int]) -> Output:
        """New tokens with their text, as the client gets them."""
        return read_text(self.text, self.entry, output, eos_token_ids)


def read_text(text: TextStream, entry: JournalEntry, output: Output, eos_token_ids: Sequence[int]) -> Output:
    """New tokens of a request with their text. It has a finish reason that `output` has not if a stop string ended
    the request; then its tokens may be fewer. The text of so many tokens is the same however they are cut into
    outputs."""
    token_ids, finish_reason, stop_reason = output.token_ids, output.finish_reason, output.stop_reason
    pieces = []
    # An end token has no text, even if it is no special token.
    ends = finish_reason == "stop" and bool(token_ids) and not isinstance(stop_reason, str)
    ends = ends and (token_ids[-1] in eos_token_ids or token_ids[-1] in entry.params.stop_token_ids)
    silent = len(token_ids) - 1 if ends else -1
    for index, token_id in enumerate(token_ids):
        if index == silent:
            break
        pieces.append(text.push(token_id))
        if text.matched_stop is not None:
            token_ids = token_ids[: index + 1]
            finish_reason, stop_reason = "stop", text.matched_stop
            break
    if finish_reason is not None and text.matched_stop is None:
        pieces.append(text.finish())
        if text.matched_stop is not None:
            finish_reason, stop_reason = "stop", text.matched_stop
    return msgspec.structs.replace(
        output,
        request_id=entry.request_id,
        token_ids=token_ids,
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        text="".join(pieces),
        logprobs=output.logprobs and output.logprobs[: len(token_ids)],
    )


def without_repeated(output: Output, position: int) -> Output:
    """What of an output is new behind the first `position` tokens of its request; it begins before or there."""
    repeated = position - output.position
    return msgspec.structs.replace(
        output,
        position=position,
        token_ids=output.token_ids[repeated:],
        logprobs=output.logprobs and output.logprobs[repeated:],
    )
