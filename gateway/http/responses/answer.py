"""A response as it grows: its items, and the typed events that tell of them.

Used by stream.py for streams and by routes.py for whole responses. What it makes depends on the call's record and its
tokens alone, taken one by one, so that every reader sees the same events under the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gateway.errors import RequestFailed
from gateway.http.logprobs import ChatLogprob, Namer, Placed
from gateway.http.reading import Place, Reading
from gateway.http.resumable import AnswerContent
from gateway.journal import JournalCall
from gateway.message_parser import MessageParser
from gateway.protocol import Output
from gateway.tool_calls.pieces import Kind, Piece

Event = dict[str, Any]
Item = dict[str, Any]

_ENDS = {"stop": "completed", "length": "incomplete", "cancelled": "cancelled"}
_ERROR_CODES = {"overloaded": "rate_limit_exceeded", "invalid_request": "invalid_prompt"}
"""Of the codes that OpenAI's type of a failed response knows; else `server_error`."""


@dataclass
class ResponseContent:
    """What it takes to tell of a response again, beside its tokens. In the journal with the call."""

    answer: AnswerContent
    shown: bytes
    """Fields of the response that are as they were asked for; JSON, since clients may send numbers of any size."""
    encoded_items: bytes
    """The conversation up to this response, its own input at the end; JSON."""
    stored: bool = True
    background: bool = False

    @property
    def items(self) -> list[Item]:
        found: list[Item] = msgspec.json.decode(self.encoded_items)
        return found


encode_content = msgspec.msgpack.Encoder().encode
decode_content = msgspec.msgpack.Decoder(ResponseContent).decode


class TokenReading(Reading):
    """Reads a call token by token, however they came, from its first one on."""

    def put(self, index: int, output: Output) -> None:
        for part in _tokens_of(output):
            super().put(index, part)


def _tokens_of(output: Output) -> Iterator[Output]:
    """An output in pieces of one token. The end comes with the last of them; that of a cancelled request, which may
    come long after its last token, always by itself."""
    count = len(output.token_ids)
    if count == 0:
        yield output
        return
    ends_apart = output.finish_reason == "cancelled"
    for number in range(count):
        is_last = number == count - 1 and not ends_apart
        yield msgspec.structs.replace(
            output,
            position=output.position + number,
            token_ids=output.token_ids[number : number + 1],
            logprobs=output.logprobs and output.logprobs[number : number + 1],
            finish_reason=output.finish_reason if is_last else None,
            stop_reason=output.stop_reason if is_last else None,
        )
    if ends_apart:
        end = output.position + count
        yield msgspec.structs.replace(output, position=end, token_ids=[], logprobs=None)


def from_the_start(record: JournalCall) -> list[Place]:
    return [Place() for _ in record.entries]


@dataclass
class _Open:
    """The item that is being written."""

    kind: str
    item: Item
    index: int
    texts: list[str] = field(default_factory=list)
    logprobs: list[ChatLogprob] = field(default_factory=list)

    @property
    def part(self) -> dict[str, Any]:
        """Its content part; that of a call is never asked for."""
        text = "".join(self.texts)
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self.logprobs)}

    def shown(self, status: str) -> Item:
        """The item as far as it is."""
        if self.kind == "call":
            return {**self.item, "arguments": "".join(self.texts), "status": status}
        return {**self.item, "content": [self.part], "status": status}


_TEXT_EVENTS = {
    "content": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}
"""What `.delta` and `.done` of an item's text are called."""


class ResponseWriter:
    """Writes one response. Outputs come through `put`, of a TokenReading; events are taken with `take`."""

    def __init__(self, record: JournalCall, content: ResponseContent, namer: Namer) -> None:
        self.items: list[Item] = []
        self.ended = False
        self.status = "in_progress"
        self._record = record
        self._content = content
        self._shown: dict[str, Any] = msgspec.json.decode(content.shown)
        self._namer = namer
        parsing = content.answer.options.parsing
        self._parsing = parsing
        self._parser = None if parsing is None else MessageParser(parsing)
        self._number = record.call_id.partition("_")[2]
        self._next_event = 0
        self._events: list[Event] = []
        self._open: _Open | None = None
        self._num_tokens = 0
        self._num_reasoning_tokens = 0
        self._error: RequestFailed | None = None
        self._begin()

    def take(self) -> list[Event]:
        """The events since the last time."""
        events, self._events = self._events, []
        return events

    def response(self, status: str | None = None) -> dict[str, Any]:
        """The response as it is now."""
        record, status = self._record, status or self.status
        error = None
        if self._error is not None:
            code = _ERROR_CODES.get(self._error.code, "server_error")
            error = {"code": code, "message": self._error.message}
        done = status == "completed" and record.ended_at is not None
        return {
            "id": record.call_id,
            "object": "response",
            "created_at": int(record.created),
            "completed_at": int(record.ended_at or 0) if done else None,
            "status": status,
            "background": self._content.background,
            "store": self._content.stored,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._content.answer.model,
            "output": [*self.items, *([self._open.shown("in_progress")] if self._open is not None else [])],
            **self._shown,
            "usage": self._usage() if self.ended else None,
        }

    # ----------------------------------------------------------------------- what is read (Target)

    def put(self, index: int, output: Output, placed: list[Placed]) -> None:
        if self.ended:
            return
        text, ends = output.text or "", output.finish_reason is not None
        if self._parser is None:
            pieces = [Piece(Kind.CONTENT, text)] if text or placed else []
        else:
            pieces = self._parser.feed(text) if text else []
            pieces += self._parser.finish() if ends else []
        logprobs = self._namer.chat(placed).content if placed else []
        for piece in pieces:
            self._write(piece, logprobs)
            logprobs = [] if piece.kind is Kind.CONTENT else logprobs
        if logprobs and self._open is not None and self._open.kind == "content":
            self._open.logprobs += logprobs
        self._num_tokens += len(output.token_ids)
        if self._open is not None and self._open.kind == "reasoning":
            self._num_reasoning_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self._end(_ENDS.get(output.finish_reason, "completed"))

    def fail(self, error: RequestFailed) -> None:
        if not self.ended:
            self._error = error
            self._end("failed")

    # ----------------------------------------------------------------------- inside

    def _begin(self) -> None:
        first = "queued" if self._content.background else "in_progress"
        self._add("response.created", response=self.response(first))
        if self._content.background:
            self._add("response.queued", response=self.response("queued"))
        self._add("response.in_progress", response=self.response("in_progress"))

    def _write(self, piece: Piece, logprobs: list[ChatLogprob]) -> None:
        """More text of the item that is open, or the begin of the next one. `logprobs`: of its text, if it is
        content."""
        kind = "call" if piece.kind is Kind.ARGUMENTS else piece.kind.value
        if piece.kind is Kind.CALL:
            self._close("completed")
            self._open_item("call", self._call_item(piece))
            return
        if self._open is None or self._open.kind != kind:
            self._close("completed")
            self._open_item(kind, self._reasoning_item() if kind == "reasoning" else self._message_item())
        assert self._open is not None
        delta: dict[str, Any] = {"delta": piece.text}
        if kind == "content":
            self._open.logprobs += logprobs
            delta["logprobs"] = logprobs
        if piece.text:
            self._open.texts.append(piece.text)
            self._add(f"{_TEXT_EVENTS[kind]}.delta", **self._place(), **delta)

    def _message_item(self) -> Item:
        return {"id": self._item_id("msg"), "type": "message", "role": "assistant", "content": []}

    def _reasoning_item(self) -> Item:
        return {"id": self._item_id("rs"), "type": "reasoning", "summary": [], "content": []}

    def _call_item(self, piece: Piece) -> Item:
        assert self._parsing is not None
        return {
            "id": self._item_id("fc"),
            "type": "function_call",
            "call_id": self._parsing.call_id(self._record.call_id, 0, piece.call),
            "name": piece.text,
            "arguments": "",
        }

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self._number}{len(self.items):04x}"

    def _open_item(self, kind: str, item: Item) -> None:
        item["status"] = "in_progress"
        self._open = _Open(kind, item, len(self.items))
        self._add("response.output_item.added", output_index=self._open.index, item=dict(item))
        if kind != "call":
            self._add("response.content_part.added", **self._place(), part=self._open.part)

    def _place(self) -> dict[str, Any]:
        """Where the open item is, for an event about its text."""
        assert self._open is not None
        place: dict[str, Any] = {"item_id": self._open.item["id"], "output_index": self._open.index}
        return place if self._open.kind == "call" else {**place, "content_index": 0}

    def _close(self, status: str) -> None:
        """The open item, if there is one, has ended."""
        opened = self._open
        if opened is None:
            return
        text = {"text": "".join(opened.texts)}
        if opened.kind == "call":
            text = {"arguments": text["text"], "name": opened.item["name"]}
        more = {"logprobs": opened.logprobs} if opened.kind == "content" else {}
        self._add(f"{_TEXT_EVENTS[opened.kind]}.done", **self._place(), **text, **more)
        if opened.kind != "call":
            self._add("response.content_part.done", **self._place(), part=opened.part)
        item = opened.shown(status)
        self._add("response.output_item.done", output_index=opened.index, item=item)
        self.items.append(item)
        self._open = None

    def _end(self, status: str) -> None:
        if self._open is None and not self.items and status == "completed":
            self._open_item("content", self._message_item())  # an answer without text is an answer
        self._close("completed" if status == "completed" else "incomplete")
        self.ended, self.status = True, status
        # There is no event for a cancelled response: it is incomplete, and its status says why.
        kind = "incomplete" if status == "cancelled" else status
        self._add(f"response.{kind}", response=self.response())

    def _usage(self) -> dict[str, Any]:
        prompt = self._content.answer.prompt_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": self._record.num_cached_tokens(1),
                "cache_write_tokens": 0,
            },
            "output_tokens": self._num_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": prompt + self._num_tokens,
        }

    def _add(self, kind: str, **fields: Any) -> None:
        self._events.append({"type": kind, "sequence_number": self._next_event, **fields})
        self._next_event += 1
