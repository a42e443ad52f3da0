"""A message as Anthropic's clients read it, whole and as a stream of events.

The blocks of a stream are rebuilt from the text that its client has, so that it can be taken up anywhere.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pydantic_core

from gateway.http.answers import Answer, Choice
from gateway.http.anthropic.schema import error_body
from gateway.http.errors import ApiError
from gateway.http.logprobs import Placed
from gateway.message_parser import MessageParser, Parsing
from gateway.protocol import Output
from gateway.tool_calls.pieces import Kind, Piece

Event = dict[str, Any]
_encode = msgspec.json.Encoder().encode
_BLOCKS: dict[Kind, tuple[Event, str, str]] = {
    Kind.CONTENT: ({"type": "text", "text": ""}, "text_delta", "text"),
    Kind.REASONING: ({"type": "thinking", "thinking": "", "signature": ""}, "thinking_delta", "thinking"),
}
"""How a block begins, and the type and the field of its deltas."""
_PLAIN = Parsing()


class MessagesAnswer(Answer):
    """For /v1/messages."""

    prefix = "msg"
    _block = -1
    """The index of the last block."""
    _open: Kind | None = None
    """What it holds, as long as it is not closed; CALL for a tool's use."""

    def known(self, index: int, text: str) -> None:
        self._blocks(self._parser(index, self._parsing).feed(text))

    def chunk(self, index: int, output: Output, placed: list[Placed]) -> tuple[bytes, bytes]:
        self.completion_tokens += len(output.token_ids)
        begin = b""
        if index not in self._begun:
            self._begun.add(index)
            message = self._message([], None, None, 0)
            begin = _events([{"type": "message_start", "message": message}, {"type": "ping"}])
        events = self._blocks(self._pieces(index, self._parsing, output))
        if output.finish_reason is not None:
            events += self._close()
            reason, sequence = self._stop(index, output.finish_reason, output.stop_reason)
            delta = {"stop_reason": reason, "stop_sequence": sequence}
            usage = self._usage(self.completion_tokens)
            events.append({"type": "message_delta", "delta": delta, "usage": usage})
        return begin, _events(events)

    def last_chunk(self) -> bytes:
        return b""

    def keep_alive(self, *, with_ids: bool) -> bytes:
        return b'event: ping\ndata: {"type":"ping"}\n\n'

    def framed(self, event_id: bytes | None, data: bytes) -> bytes:
        if event_id is None:
            return data + b"\n\n"
        # Of several events the last one has the id: a client that has not all of them asks for all again.
        before, gap, last = data.rpartition(b"\n\n")
        return b"%b%bid: %b\n%b\n\n" % (before, gap, event_id, last)

    def ended(self, event_id: bytes | None) -> bytes:
        return self.framed(event_id, _events([{"type": "message_stop"}]))

    def failed(self, event_id: bytes | None, error: ApiError) -> bytes:
        return self.framed(event_id, _events([error_body(error)]))

    def whole(self, choices: list[Choice], completion_tokens: int) -> bytes:
        [choice] = choices
        parser = self._parsers[choice.index] = MessageParser(self._parsing)
        blocks: list[Event] = []
        arguments: dict[int, list[str]] = {}
        uses: dict[int, Event] = {}
        for kind, text, number in parser.feed(choice.text) + parser.finish():
            if kind is Kind.CALL:
                call_id = self._parsing.call_id(self.id, choice.index, number)
                uses[number] = {"type": "tool_use", "id": call_id, "name": text, "input": {}}
                blocks.append(uses[number])
            elif kind is Kind.ARGUMENTS:
                arguments.setdefault(number, []).append(text)
            else:
                start, _, field = _BLOCKS[kind]
                if not blocks or blocks[-1]["type"] != start["type"]:
                    blocks.append({**start, field: ""})
                blocks[-1][field] += text
        for number, parts in arguments.items():
            uses[number]["input"] = _object("".join(parts))
        reason, sequence = self._stop(choice.index, choice.finish_reason, choice.stop_reason)
        return _encode(self._message(blocks, reason, sequence, completion_tokens))

    # ----------------------------------------------------------------------- inside

    @property
    def _parsing(self) -> Parsing:
        return self._options.parsing or _PLAIN

    def _message(
        self, blocks: list[Event], reason: str | None, sequence: str | None, output_tokens: int
    ) -> Event:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": blocks,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self._usage(output_tokens),
        }

    def _usage(self, output_tokens: int) -> Event:
        """`input_tokens` are those behind what came from the cache."""
        cached = self.cached_tokens()
        return {
            "input_tokens": self.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": output_tokens,
        }

    def _stop(self, index: int, reason: str | None, found: int | str | None) -> tuple[str, str | None]:
        if reason == "length":
            return "max_tokens", None
        if isinstance(found, str):
            return "stop_sequence", found
        has_called = index in self._parsers and self._parsers[index].num_calls > 0
        return "tool_use" if has_called else "end_turn", None

    def _blocks(self, pieces: list[Piece]) -> list[Event]:
        events: list[Event] = []
        for kind, text, number in pieces:
            if kind is Kind.CALL:
                call_id = self._parsing.call_id(self.id, 0, number)
                block = {"type": "tool_use", "id": call_id, "name": text, "input": {}}
                events += self._begin(Kind.CALL, block)
            elif kind is Kind.ARGUMENTS:
                events.append(self._delta({"type": "input_json_delta", "partial_json": text}))
            else:
                start, delta, field = _BLOCKS[kind]
                if self._open is not kind:
                    events += self._begin(kind, start)
                events.append(self._delta({"type": delta, field: text}))
        return events

    def _begin(self, kind: Kind, block: Event) -> list[Event]:
        events = self._close()
        self._open = kind
        self._block += 1
        return [*events, {"type": "content_block_start", "index": self._block, "content_block": block}]

    def _delta(self, delta: Event) -> Event:
        return {"type": "content_block_delta", "index": self._block, "delta": delta}

    def _close(self) -> list[Event]:
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": self._block}]


def _events(events: list[Event]) -> bytes:
    """Events without the blank line behind the last of them."""
    return b"\n\n".join(b"event: %b\ndata: %b" % (event["type"].encode(), _encode(event)) for event in events)


def _object(arguments: str) -> dict[str, Any]:
    """Arguments as an object; of what was cut off, as much as there is."""
    try:
        found = pydantic_core.from_json(arguments or "{}", allow_partial="trailing-strings")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
