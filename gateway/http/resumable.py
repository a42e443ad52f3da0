"""HTTP calls that outlive their connection: begun, attached to by key or id, answered as a stream or as a whole.

Used by the OpenAI endpoints, and itself the endpoints under /v1/requests. What a call needs to be answered again
is in the journal with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from fastapi import APIRouter, Request, Response

from gateway.call_ids import new_call_id
from gateway.calls import MAX_KEY_LENGTH, Call, Calls, Conditions, KeyReused, OnDisconnect, Wanted
from gateway.errors import RequestFailed
from gateway.http.answers import (
    Answer,
    AnswerOptions,
    ChatAnswerBuilder,
    TextAnswerBuilder,
    best_choices,
    finish_reason,
)
from gateway.http.anthropic.answer import MessagesAnswer
from gateway.http.connections import HANGUP
from gateway.http.errors import ApiError, from_failure
from gateway.http.logprobs import Namer
from gateway.http.reading import EventId, Place, Reading
from gateway.http.streams import ClientGone, Collector, EventQueue, EventStream, Reader
from gateway.journal import JournalCall, JournalEntry
from gateway.keys import owner_id
from gateway.protocol import SamplingParams
from gateway.text import TextModel

ID_HEADER = "x-phalanx-request-id"
KEY_HEADER = "idempotency-key"
DISCONNECT_HEADER = "x-on-disconnect"
_KEY_SPACE = "http:"
_EVENT_STREAM = "text/event-stream"
_ANSWERS: dict[str, type[Answer]] = {
    "chat": ChatAnswerBuilder,
    "completions": TextAnswerBuilder,
    "messages": MessagesAnswer,
}
_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "messages": "/v1/messages"}


@dataclass
class AnswerContent:
    """What it takes to answer a call again, beside its tokens."""

    model: str
    stream: bool
    num_prompts: int
    prompt_tokens: int
    options: AnswerOptions
    owner: str = ""
    """Whose API key it came with; nobody else sees it."""


_encode_content = msgspec.msgpack.Encoder().encode
_decode_content = msgspec.msgpack.Decoder(AnswerContent).decode


@dataclass(frozen=True)
class Claim:
    """What the headers of a POST say about its call."""

    kind: str
    key: str | None
    fingerprint: bytes
    on_disconnect: OnDisconnect | None
    """None if the client did not say."""


@dataclass(frozen=True)
class ResumableCalls:
    """The calls of HTTP clients."""

    calls: Calls
    text: TextModel
    front: int = 0
    """Which of the fronts this is; the ids of its calls name it."""

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/requests/{call_id}", self.show, methods=["GET"])
        router.add_api_route("/v1/requests/{call_id}", self.cancel, methods=["DELETE"])
        router.add_api_route("/v1/requests/{call_id}/stream", self.stream, methods=["GET"])
        return router

    # ----------------------------------------------------------------------- for the OpenAI endpoints

    def claim(self, http: Request, body: bytes, kind: str) -> Claim:
        """Reads the headers. Raises ApiError."""
        key = http.headers.get(KEY_HEADER)
        if key is not None and not 0 < len(key) <= MAX_KEY_LENGTH:
            text = f"Idempotency-Key has {len(key)} characters; allowed: 1 to {MAX_KEY_LENGTH}"
            raise ApiError(400, text, code="invalid_idempotency_key")
        wish = http.headers.get(DISCONNECT_HEADER)
        if wish is not None and wish not in (OnDisconnect.CANCEL, OnDisconnect.CONTINUE):
            text = f"X-On-Disconnect is {wish[:20]!r}; allowed: continue, cancel"
            raise ApiError(400, text, code="invalid_value")
        on_disconnect = None if wish is None else OnDisconnect(wish)
        return Claim(kind, key and _own(key), _fingerprint(kind, body) if key else b"", on_disconnect)

    async def answer_known(self, claim: Claim, http: Request) -> Response | None:
        """The answer of the call that has this key already, from its start; None if there is none. Raises
        ApiError."""
        call = self.known_call(claim)
        if call is None:
            return None
        content = _content(call.record)
        return await self._respond(call, content, http, [Place() for _ in call.record.entries])

    def known_call(self, claim: Claim) -> Call | None:
        """The call that has this key already. Raises ApiError."""
        if claim.key is None:
            return None
        try:
            return self.calls.find_key(claim.key, claim.fingerprint)
        except RequestFailed as error:
            raise from_failure(error) from None
        except KeyReused:
            text = "this Idempotency-Key was used for another request; use a new one for each request"
            raise ApiError(422, text, code="idempotency_key_reused") from None

    async def begin(
        self,
        claim: Claim,
        http: Request,
        prompts: list[list[int]],
        params: list[SamplingParams],
        conditions: Conditions,
        content: AnswerContent,
    ) -> Response:
        """A new call, and its answer. `params` has an element for each prompt and choice, prompt by prompt. Raises
        ApiError."""
        default = OnDisconnect.GRACE if content.stream else OnDisconnect.CANCEL
        content.owner = owner_id()
        call_id = f"{_ANSWERS[claim.kind].prefix}-{new_call_id(self.front)}"
        encoded = _encode_content(content)
        call = self.open_call(claim, call_id, prompts, params, conditions, encoded, default, commit_soon=True)
        return await self._respond(call, content, http, None)

    def open_call(
        self,
        claim: Claim,
        call_id: str,
        prompts: list[list[int]],
        params: list[SamplingParams],
        conditions: Conditions,
        content: bytes,
        on_disconnect: OnDisconnect,
        *,
        commit_soon: bool = False,
    ) -> Call:
        """A new call, which runs from now on. `on_disconnect`: if the client did not say, and sent no key.
        `commit_soon`: see Calls.begin. Raises ApiError."""
        if claim.key is not None:
            on_disconnect = OnDisconnect.CONTINUE
        record = JournalCall(
            call_id,
            claim.kind,
            time.time(),
            claim.key,
            claim.fingerprint,
            claim.on_disconnect or on_disconnect,
            content,
        )
        per_prompt = len(params) // len(prompts)
        wanted = [Wanted(prompts[index // per_prompt], one) for index, one in enumerate(params)]
        try:
            return self.calls.begin(record, wanted, conditions, commit_soon=commit_soon)
        except RequestFailed as error:
            raise from_failure(error) from None

    # ----------------------------------------------------------------------- /v1/requests

    async def show(self, call_id: str, http: Request) -> Response:
        """GET /v1/requests/{id}: how a request is doing, and its answer once it has one."""
        call = self._find(call_id)
        record, content = call.record, _content(call.record)
        shown: dict[str, object] = {
            "id": record.call_id,
            "object": "request",
            "endpoint": _PATHS[record.kind],
            "created": int(record.created),
            "model": content.model,
            "status": _status(record),
            "choices": [_describe(index, entry) for index, entry in enumerate(record.entries)],
            "error": None,
            "response": None,
        }
        if record.error is not None:
            shown["error"] = from_failure(RequestFailed(*record.error)).body()["error"]
        elif call.ended:
            collector = Collector(len(record.entries))
            self._read(call, content, collector, [Place() for _ in record.entries])
            shown["response"] = msgspec.Raw(self._whole(record, content, collector))
        return Response(msgspec.json.encode(shown), media_type="application/json")

    async def cancel(self, call_id: str) -> Response:
        """DELETE /v1/requests/{id}: ends it, if it still runs."""
        call = self._find(call_id)
        call.cancel()
        shown = {"id": call_id, "object": "request", "status": _status(call.record)}
        return Response(msgspec.json.encode(shown), media_type="application/json")

    async def stream(self, call_id: str, http: Request) -> Response:
        """GET /v1/requests/{id}/stream: its stream, behind the event that Last-Event-ID names."""
        call = self._find(call_id)
        record, content = call.record, _content(call.record)
        num_choices = len(record.entries)
        if num_choices > content.num_prompts * content.options.choices_per_prompt:
            raise ApiError(400, "a request with best_of greater than n has no stream; GET it without /stream")
        last = http.headers.get("last-event-id") or http.query_params.get("last_event_id")
        try:
            at = EventId(num_choices) if not last else EventId.parse(last, num_choices)
            for place, entry in zip(at.places, record.entries, strict=True):
                if entry.ended and place.tokens > len(entry.output_token_ids):
                    raise ValueError(f"it counts {place.tokens} tokens of a choice, which has fewer")
        except ValueError as error:
            raise ApiError(
                400, f"Last-Event-ID is not an id of this stream: {error}", code="invalid_event_id"
            ) from None
        if at.is_done:
            return Response(
                status_code=204, headers={ID_HEADER: record.call_id}
            )  # EventSource stays away then
        return self._stream(call, content, at, at.places)

    # ----------------------------------------------------------------------- inside

    def _find(self, call_id: str) -> Call:
        try:
            call = self.calls.find(call_id)
        except RequestFailed as error:
            raise from_failure(error) from None
        is_ours = call is not None and call.record.kind in _ANSWERS
        if call is None or not is_ours or _content(call.record).owner != owner_id():
            kept = f"finished ones are kept for {self.calls.journal.retention_s:g} s"
            if self.calls.journal.moved_aside is not None:
                kept += f"; {self.calls.journal.moved_aside}"
            raise ApiError(
                404, f"there is no request {call_id[:64]!r} (any more; {kept})", code="request_not_found"
            )
        return call

    async def _respond(
        self, call: Call, content: AnswerContent, http: Request, places: list[Place] | None
    ) -> Response:
        record = call.record
        num_choices = len(record.entries)
        if content.stream:
            return self._stream(call, content, EventId(num_choices), places, with_ids=reads_ids(http))
        collector = Collector(num_choices)
        reader = self._read(call, content, collector, places)
        try:
            await collector.wait(reader, http.receive, http.scope.get("state", {}).get(HANGUP))
        except ClientGone:
            return Response(status_code=499)  # nobody reads it
        return Response(
            self._whole(record, content, collector),
            media_type="application/json",
            headers={ID_HEADER: record.call_id},
        )

    def _stream(
        self,
        call: Call,
        content: AnswerContent,
        at: EventId,
        places: list[Place] | None,
        *,
        with_ids: bool = True,
    ) -> EventStream:
        answer = self._answer(call.record, content)
        begun = [index for index, place in enumerate(at.places) if place.begun]
        answer.go_on(begun, sum(place.tokens for place in at.places))
        queue = EventQueue(len(call.record.entries))
        reader = self._read(call, content, queue, places, answer.known)
        stream = EventStream(reader, queue, answer, at, with_ids=with_ids)
        stream.headers[ID_HEADER] = call.record.call_id
        return stream

    def _read(
        self,
        call: Call,
        content: AnswerContent,
        target: Collector | EventQueue,
        places: list[Place] | None,
        on_known: Callable[[int, str], None] | None = None,
    ) -> Reader:
        """A client comes to a call; with `places` to one that may have brought something already. `on_known` gets
        the text that the client has."""
        welcome = self.calls.requests.welcome
        reading = Reading(
            call.record,
            target,
            self.text,
            welcome.eos_token_ids if welcome is not None else (),
            shows_logprobs=content.options.logprobs,
            places=places,
            on_known=on_known,
        )
        call.listen(reading)
        if places is not None:
            reading.catch_up()
        return Reader(self.calls, call, reading)

    def _answer(self, record: JournalCall, content: AnswerContent) -> Answer:
        return _ANSWERS[record.kind](
            record.call_id,
            int(record.created),
            content.model,
            content.prompt_tokens,
            content.options,
            Namer(self.text),
            lambda: record.num_cached_tokens(content.num_prompts),
        )

    def _whole(self, record: JournalCall, content: AnswerContent, collector: Collector) -> bytes:
        candidates = collector.choices
        completion_tokens = sum(choice.num_tokens for choice in candidates)
        choices = best_choices(candidates, content.num_prompts, content.options.choices_per_prompt)
        return self._answer(record, content).whole(choices, completion_tokens)


def reads_ids(http: Request) -> bool:
    """Whether the events of a POST's stream have ids: its client says that it reads event streams, or that it means
    to come back. Others get one line of data an event: many tools take each line, or each block, for one."""
    headers = http.headers
    if KEY_HEADER in headers or DISCONNECT_HEADER in headers:
        return True
    return _EVENT_STREAM in headers.get("accept", "")


def _own(key: str) -> str:
    """The name of a client's key among the keys of all clients."""
    owner = owner_id()
    return f"{_KEY_SPACE}\0{owner}\0{key}" if owner else _KEY_SPACE + key


def _fingerprint(kind: str, body: bytes) -> bytes:
    """Of what is asked for, whatever the order and the spaces of its JSON."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # it is refused anyway
        body = msgspec.json.encode(msgspec.json.decode(body), order="deterministic")
    return hashlib.blake2b(kind.encode() + b"\0" + body, digest_size=16).digest()


def _content(record: JournalCall) -> AnswerContent:
    return _decode_content(record.content)


def _status(record: JournalCall) -> str:
    if record.error is not None:
        return "failed"
    if record.ended_at is None:
        return "running"
    return "completed" if record.has_answer else "cancelled"


def _describe(index: int, entry: JournalEntry) -> dict[str, object]:
    return {
        "index": index,
        "completion_tokens": len(entry.output_token_ids),
        "finish_reason": finish_reason(entry.finish_reason),
    }
