"""What vLLM's server answers beside OpenAI's endpoints: the tokenizer, the version, and the ping of SageMaker.

Mounted by app.py; scores and rankings are in ranking.py. Nothing here asks a world for tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import Struct

from gateway.chat_template import ChatTemplateError
from gateway.errors import ModelFilesError
from gateway.http.chat import Chat
from gateway.http.errors import ApiError
from gateway.http.openai import Deadline, OpenAI, read_body
from gateway.http.operations import Operations
from gateway.http.schema import (
    ChatMessage,
    ChatRequest,
    check_model,
    decode_body,
    decode_request,
)
from gateway.text import LONG_TEXT

MAX_TOKENIZE_CHARACTERS = 2**22
MAX_DETOKENIZE_TOKENS = 2**20

_T = TypeVar("_T")


class TokenizeRequest(Struct, kw_only=True):
    """vLLM's fields: a prompt, or messages with what shapes their template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    """Default: true for a prompt, false for messages, whose template writes them itself."""
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class TokenizeAnswer(Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


@dataclass(frozen=True)
class Compat:
    """The endpoints, for the model of `openai`."""

    openai: OpenAI
    operations: Operations

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/tokenize", self.tokenize, methods=["POST"])
        router.add_api_route("/detokenize", self.detokenize, methods=["POST"])
        router.add_api_route("/tokenizer_info", self.tokenizer_info, methods=["GET"])
        router.add_api_route("/version", self.version, methods=["GET"])
        router.add_api_route("/ping", self.ping, methods=["GET"])
        router.add_api_route("/ping", self.ping, methods=["POST"])
        return router

    async def tokenize(self, http: Request) -> Response:
        """POST /tokenize: the token ids of a prompt or of a conversation."""
        body = await read_body(http, self.openai.max_body_bytes)
        request = decode_body(body, TokenizeRequest)
        check_model(request.model, self.openai.model)
        if (request.prompt is None) == (request.messages is None):
            raise ApiError(400, "give either prompt or messages, one of them", param="prompt")
        limits = await self.openai.limits(Deadline(None))
        text = self.openai.text
        if request.prompt is not None:
            prompt, special = request.prompt, request.add_special_tokens is not False
            token_ids = await _in_time(
                len(prompt), "prompt", lambda: text.encode(prompt, add_special_tokens=special)
            )
        else:
            # With its refusals of what the template does not get.
            chat = Chat.read(decode_request(body, ChatRequest), text.chat_template)
            special = bool(request.add_special_tokens)
            token_ids = await _in_time(
                chat.num_characters,
                "messages",
                lambda: text.encode(chat.prompt(text.template()), add_special_tokens=special),
            )
        strings = [text.token(token_id) for token_id in token_ids] if request.return_token_strs else None
        answer = TokenizeAnswer(
            count=len(token_ids), max_model_len=limits.max_model_len, tokens=token_ids, token_strs=strings
        )
        return _json(answer)

    async def detokenize(self, http: Request) -> Response:
        """POST /detokenize: the text of token ids, special tokens by their names."""
        request = decode_body(await read_body(http, self.openai.max_body_bytes), DetokenizeRequest)
        check_model(request.model, self.openai.model)
        tokens = request.tokens
        if len(tokens) > MAX_DETOKENIZE_TOKENS:
            text = f"tokens has {len(tokens)} ids; allowed: up to {MAX_DETOKENIZE_TOKENS}"
            raise ApiError(400, text, param="tokens", code="invalid_value")
        size = self.openai.text.vocab_size
        wrong = next((token for token in tokens if not 0 <= token < size), None)
        if wrong is not None:
            text = f"token id {wrong} is not in the tokenizer's vocabulary; allowed: 0 to {size - 1}"
            raise ApiError(400, text, param="tokens", code="invalid_value")
        decode = self.openai.text.decode
        shown = await _in_time(len(tokens), "tokens", lambda: decode(tokens, skip_special_tokens=False))
        return _json({"prompt": shown})

    async def tokenizer_info(self) -> Response:
        """GET /tokenizer_info: the tokenizer's own configuration, and the chat template."""
        text = self.openai.text
        template = text.chat_template
        info = {"tokenizer_class": "PreTrainedTokenizerFast", **text.config}
        info["chat_template"] = template.source if template is not None else None
        return _json(info)

    async def version(self) -> Response:
        """GET /version."""
        return _json({"version": package_version()})

    async def ping(self) -> Response:
        """GET and POST /ping, as SageMaker asks: 200 if requests are served, else 503."""
        return await self.operations.health()


def package_version() -> str:
    """Of this package; "unknown" where it runs without being installed."""
    try:
        return metadata.version("phalanx-serve")
    except metadata.PackageNotFoundError:
        return "unknown"


async def _in_time(size: int, param: str, function: Callable[[], _T]) -> _T:
    """Runs the tokenizer on so many characters, in a thread if they are many. Raises ApiError."""
    if size > MAX_TOKENIZE_CHARACTERS:
        text = f"{param} has {size} characters; allowed: up to {MAX_TOKENIZE_CHARACTERS}"
        raise ApiError(400, text, param=param, code="invalid_value")
    try:
        return await asyncio.to_thread(function) if size > LONG_TEXT else function()
    except (ChatTemplateError, ModelFilesError, ValueError) as error:
        raise ApiError(400, str(error), param=param) from None


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
