"""Anthropic's endpoints: /v1/messages and /v1/messages/count_tokens, over the chats of openai.py.

Made by app.py. A message is a call like every other: it is journaled, taken up again, and outlives its world.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from fastapi import APIRouter, Request, Response

from gateway.http.anthropic.schema import CountRequest, MessagesRequest, as_chat
from gateway.http.chat import Chat
from gateway.http.errors import ApiError
from gateway.http.openai import OpenAI, read_body
from gateway.http.schema import check_model, decode_body

PATH = "/v1/messages"
KIND = "messages"


@dataclass(frozen=True)
class Messages:
    """The endpoints, for the model of `openai`."""

    openai: OpenAI

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route(PATH, self.create, methods=["POST"])
        router.add_api_route(f"{PATH}/count_tokens", self.count_tokens, methods=["POST"])
        return router

    async def create(self, http: Request) -> Response:
        """POST /v1/messages."""
        openai = self.openai
        body = await read_body(http, openai.max_body_bytes)
        request = decode_body(body, MessagesRequest)
        claim = openai.resumable.claim(http, body, KIND)
        if (known := await openai.resumable.answer_known(claim, http)) is not None:
            return known
        try:
            prepared = await openai.prepare_chat(as_chat(request))
        except ApiError as error:
            raise _in_own_words(error) from None
        if (known := await openai.resumable.answer_known(claim, http)) is not None:
            return known  # somebody was faster with the same key
        return await openai.resumable.begin(
            claim, http, prepared.prompts, prepared.params, prepared.conditions, prepared.content
        )

    async def count_tokens(self, http: Request) -> Response:
        """POST /v1/messages/count_tokens: the tokens of the prompt that a message would have."""
        openai = self.openai
        request = decode_body(await read_body(http, openai.max_body_bytes), CountRequest)
        check_model(request.model, openai.model)
        asked = as_chat(request)
        _, prompt, _, _ = await openai.encode_chat(Chat.read(asked, openai.text.chat_template), asked)
        content = msgspec.json.encode({"input_tokens": len(prompt)})
        return Response(content, media_type="application/json")


def _in_own_words(error: ApiError) -> ApiError:
    """An error of the chat with the names that the fields have here."""
    if error.param == "stop":
        error.message = error.message.replace("stop", "stop_sequences", 1)
    return error
