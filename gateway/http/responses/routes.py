"""OpenAI's responses: POST /v1/responses, and what is asked about one later.

A response is a call in the journal like a chat, made by the chat endpoint's own checks; so it outlives its
connection, the front and the world, and what is told of it is made from the journal each time.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from gateway.calls import Call, OnDisconnect
from gateway.errors import RequestFailed
from gateway.http.errors import ApiError, from_failure
from gateway.http.logprobs import Namer, Placed
from gateway.http.openai import OpenAI, Prepared, read_body
from gateway.http.responses.answer import (
    Item,
    ResponseContent,
    ResponseWriter,
    TokenReading,
    decode_content,
    encode_content,
    from_the_start,
)
from gateway.http.responses.conversation import (
    chat_body,
    chat_messages_of,
    in_own_words,
    input_items,
)
from gateway.http.responses.schema import ResponseRequest, decode_response_request
from gateway.http.responses.stream import ResponseStream
from gateway.http.resumable import ID_HEADER
from gateway.http.schema import ChatRequest, check, check_model, decode_request
from gateway.http.streams import ClientGone, EventQueue, Reader, wait_for
from gateway.journal import JournalCall
from gateway.keys import owner_id
from gateway.protocol import Output

KIND = "responses"
PREFIX = "resp_"
MAX_ITEMS_SHOWN = 100


@dataclass(frozen=True)
class Responses:
    """The endpoints, for the model of `openai`."""

    openai: OpenAI

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/responses", self.create, methods=["POST"])
        router.add_api_route("/v1/responses/{response_id}", self.retrieve, methods=["GET"])
        router.add_api_route("/v1/responses/{response_id}", self.delete, methods=["DELETE"])
        router.add_api_route("/v1/responses/{response_id}/cancel", self.cancel, methods=["POST"])
        router.add_api_route(
            "/v1/responses/{response_id}/input_items", self.list_input_items, methods=["GET"]
        )
        return router

    async def create(self, http: Request) -> Response:
        """POST /v1/responses."""
        resumable = self.openai.resumable
        body = await read_body(http, self.openai.max_body_bytes)
        request = decode_response_request(body)
        claim = resumable.claim(http, body, KIND)
        if (known := resumable.known_call(claim)) is not None:
            return await self._answer(known, http, stream=bool(request.stream))
        check_model(request.model, self.openai.model)
        response_id = PREFIX + uuid.uuid4().hex
        items = [*self._history(request.previous_response_id), *input_items(request, response_id)]
        prepared = await self._prepare(request, items)
        background = bool(request.background)
        prepared.content.owner = owner_id()
        content = ResponseContent(
            prepared.content,
            msgspec.json.encode(_shown(request, prepared)),
            msgspec.json.encode(items),
            request.store is not False,
            background,
        )
        default = OnDisconnect.GRACE if request.stream else OnDisconnect.CANCEL
        if (known := resumable.known_call(claim)) is not None:  # somebody was faster with the same key
            return await self._answer(known, http, stream=bool(request.stream))
        call = resumable.open_call(
            claim,
            response_id,
            prepared.prompts,
            prepared.params,
            prepared.conditions,
            encode_content(content),
            OnDisconnect.CONTINUE if background else default,
        )
        return await self._answer(call, http, stream=bool(request.stream))

    async def retrieve(self, response_id: str, http: Request) -> Response:
        """GET /v1/responses/{id}; with `stream=true` its events, behind the one that `starting_after` names."""
        call = self._find(response_id)
        if http.query_params.get("stream", "").lower() not in ("true", "1"):
            return self._whole(call)
        after = http.query_params.get("starting_after")
        number = int(after) if after is not None and after.isascii() and after.isdecimal() else -1
        is_number = after is None or (number >= 0 and len(after) < 10)
        check(is_number, "starting_after", repr((after or "")[:20]), "the sequence_number of an event")
        return self._stream(call, starting_after=number, begins_at_once=True)

    async def delete(self, response_id: str) -> Response:
        """DELETE /v1/responses/{id}: ends it if it runs, and forgets it."""
        call = self._find(response_id)
        try:
            self.openai.resumable.calls.delete(call)
        except RequestFailed as error:
            raise from_failure(error) from None
        return _json({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, response_id: str) -> Response:
        """POST /v1/responses/{id}/cancel: ends it, if it still runs."""
        call = self._find(response_id)
        call.cancel()
        return self._whole(call)

    async def list_input_items(self, response_id: str, http: Request) -> Response:
        """GET /v1/responses/{id}/input_items: the conversation that it answered, the newest item first."""
        items = decode_content(self._find(response_id).record.content).items
        order = http.query_params.get("order", "desc")
        check(order in ("asc", "desc"), "order", repr(order[:20]), "asc, desc")
        if order == "desc":
            items.reverse()
        page, has_more = page_of(items, http)
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
        return _json({"object": "list", "data": page, "has_more": has_more, **ends})

    # ----------------------------------------------------------------------- making one

    def _history(self, previous_response_id: str | None) -> list[Item]:
        """The conversation up to and with an earlier response. Raises ApiError."""
        if previous_response_id is None:
            return []
        try:
            call = self._find(previous_response_id)
        except ApiError as error:
            error.status = 400 if error.status == 404 else error.status
            error.param, error.code = "previous_response_id", "previous_response_not_found"
            raise
        writer, _ = self._write(call)
        if not writer.ended:
            text = f"the response {previous_response_id!r} is still in progress; wait for its end"
            raise ApiError(400, text, param="previous_response_id", code="invalid_value")
        return [*decode_content(call.record.content).items, *writer.items]

    async def _prepare(self, request: ResponseRequest, items: list[Item]) -> Prepared:
        """The chat that gives the response. With truncation the oldest messages go until the rest fits. Raises
        ApiError."""
        messages = chat_messages_of(items)

        async def without(count: int) -> Prepared:
            chat = decode_request(chat_body(request, messages[count:]), ChatRequest)
            return await self.openai.prepare_chat(chat)

        try:
            try:
                return await without(0)
            except ApiError as error:
                if request.truncation != "auto" or error.code != "context_length_exceeded":
                    raise
            fewest, most = 1, max(1, len(messages) - 1)
            while fewest < most:
                count = (fewest + most) // 2
                try:
                    await without(count)
                    most = count
                except ApiError as error:
                    if error.code != "context_length_exceeded":
                        raise
                    fewest = count + 1
            return await without(min(fewest, len(messages) - 1))
        except ApiError as error:
            raise in_own_words(error) from None

    # ----------------------------------------------------------------------- telling of one

    def _find(self, response_id: str) -> Call:
        """A stored response. Raises ApiError."""
        calls = self.openai.resumable.calls
        try:
            call = calls.find(response_id)
        except RequestFailed as error:
            raise from_failure(error) from None
        content = None if call is None or call.record.kind != KIND else decode_content(call.record.content)
        if call is None or content is None or not content.stored or content.answer.owner != owner_id():
            kept = f"responses are kept for {calls.journal.retention_s:g} s after their end"
            text = f"Response with id '{response_id[:64]}' not found ({kept})"
            raise ApiError(404, text, param="response_id", code="response_not_found")
        return call

    async def _answer(self, call: Call, http: Request, *, stream: bool) -> Response:
        content = decode_content(call.record.content)
        if stream:
            return self._stream(call, begins_at_once=content.background)
        if content.background:
            return self._whole(call)
        waiter = _End()
        reader = self._read(call, waiter)
        try:
            await wait_for(waiter.done, reader, http.receive)
        except ClientGone:
            return Response(status_code=499)  # nobody reads it
        return self._whole(call)

    def _whole(self, call: Call) -> Response:
        writer, content = self._write(call)
        queued = content.background and not writer.ended and not call.is_in_world
        return _json(writer.response("queued" if queued else None), {ID_HEADER: call.record.call_id})

    def _write(self, call: Call) -> tuple[ResponseWriter, ResponseContent]:
        """The response as far as it is."""
        writer, content = self._writer(call.record)
        reading = self._reading(call.record, content, writer)
        reading.catch_up()
        return writer, content

    def _stream(self, call: Call, *, starting_after: int = -1, begins_at_once: bool) -> ResponseStream:
        queue = EventQueue()
        reader = self._read(call, queue)
        writer, _ = self._writer(call.record)
        stream = ResponseStream(
            reader, queue, writer, starting_after=starting_after, begins_at_once=begins_at_once
        )
        stream.headers[ID_HEADER] = call.record.call_id
        return stream

    def _writer(self, record: JournalCall) -> tuple[ResponseWriter, ResponseContent]:
        content = decode_content(record.content)
        return ResponseWriter(record, content, Namer(self.openai.text)), content

    def _read(self, call: Call, target: EventQueue | _End) -> Reader:
        """A client comes to a call, and reads it from its start."""
        reading = self._reading(call.record, decode_content(call.record.content), target)
        call.listen(reading)
        reading.catch_up()
        return Reader(self.openai.resumable.calls, call, reading)

    def _reading(
        self, record: JournalCall, content: ResponseContent, target: ResponseWriter | EventQueue | _End
    ) -> TokenReading:
        welcome = self.openai.requests.welcome
        return TokenReading(
            record,
            target,
            self.openai.text,
            welcome.eos_token_ids if welcome is not None else (),
            shows_logprobs=content.answer.options.logprobs,
            places=from_the_start(record),
        )


class _End:
    """Waits for the end of a response."""

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def put(self, index: int, output: Output, placed: list[Placed]) -> None:
        if output.finish_reason is not None and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: RequestFailed) -> None:
        if not self.done.done():
            self.done.set_exception(error)


def page_of(
    entries: list[Any], http: Request, *, default: int = 20, most: int = MAX_ITEMS_SHOWN
) -> tuple[list[Any], bool]:
    """The part of a list that `after` and `limit` ask for, and whether there is more. Raises ApiError."""
    query = http.query_params
    limit = query.get("limit", str(default))
    ok = limit.isascii() and limit.isdecimal() and len(limit) < 6 and 1 <= int(limit) <= most
    check(ok, "limit", repr(limit[:20]), f"1 to {most}")
    start = 0
    if (after := query.get("after")) is not None:
        places = [index for index, entry in enumerate(entries) if entry["id"] == after]
        check(bool(places), "after", repr(after[:64]), "the id of an entry of this list")
        start = places[0] + 1
    page = entries[start : start + int(limit)]
    return page, start + len(page) < len(entries)


def _shown(request: ResponseRequest, prepared: Prepared) -> dict[str, Any]:
    """What a response repeats of its request."""
    params = prepared.params[0]
    text: dict[str, Any] = {"format": {"type": "text"}}
    if request.text is not None and request.text.format is not None:
        text["format"] = {k: v for k, v in msgspec.to_builtins(request.text.format).items() if v is not None}
    text["verbosity"] = "medium"
    reasoning = request.reasoning
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "prompt_cache_retention": request.prompt_cache_retention,
        "reasoning": {"effort": reasoning.effort if reasoning is not None else None, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "temperature": params.temperature,
        "text": text,
        "tool_choice": request.tool_choice or "auto",
        "tools": [
            {name: getattr(tool, name) for name in ("type", "name", "description", "parameters", "strict")}
            for tool in request.tools or ()
        ],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": request.truncation or "disabled",
        "user": request.user,
    }


def _json(content: object, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json", headers=headers)
