"""The OpenAI endpoints: /v1/chat/completions, /v1/completions, /v1/models.

Each call: read and check the request, tokenize, hand it to the front's requests, then collect or stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from fastapi import APIRouter, Request, Response

from gateway.chat_template import ChatTemplateError
from gateway.errors import ModelFilesError, RequestFailed
from gateway.http.answers import Answer, ChatAnswerBuilder, TextAnswerBuilder
from gateway.http.errors import ApiError, from_failure
from gateway.http.schema import (
    COMPLETION_MAX_TOKENS,
    ChatRequest,
    CommonRequest,
    CompletionRequest,
    asked_max_tokens,
    chat_messages,
    check_common,
    completion_prompts,
    decode_request,
    num_choices,
    sampling_params,
    stop_strings,
)
from gateway.http.streams import ClientGone, Collector, EventQueue, EventStream, Group
from gateway.protocol import Limits, SamplingParams
from gateway.rank0 import check_prompt, with_seed
from gateway.requests import Requests
from gateway.text import LONG_TEXT, TextModel, TextTooLong

MAX_BODY_BYTES = 16 * 1024 * 1024
STARTED_AT = int(time.time())

_T = TypeVar("_T")


@dataclass(frozen=True)
class OpenAI:
    """The endpoints for one model."""

    model: str
    requests: Requests
    text: TextModel
    max_body_bytes: int = MAX_BODY_BYTES

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"])
        router.add_api_route("/v1/completions", self.completions, methods=["POST"])
        router.add_api_route("/v1/models", self.list_models, methods=["GET"])
        router.add_api_route("/v1/models/{model:path}", self.show_model, methods=["GET"])
        return router

    async def chat_completions(self, http: Request) -> Response:
        """POST /v1/chat/completions."""
        request = decode_request(await read_body(http, self.max_body_bytes), ChatRequest)
        check_common(request, self.model)
        messages = chat_messages(request)
        limit = asked_max_tokens(request.max_completion_tokens, "max_completion_tokens")
        if limit is None:
            limit = asked_max_tokens(request.max_tokens, "max_tokens")
        _check_parameters(request)
        limits = await self._limits()
        size = sum(len(message["content"]) for message in messages)
        prompt = await self._encode(
            size, "messages", lambda: self.text.encode_chat(messages, at_most=limits.max_model_len)
        )
        if limit is None:
            limit = max(1, min(limits.max_model_len, limits.kv_cache_tokens) - len(prompt))
        return await self._answer(http, request, [prompt], limit, limits, "messages", ChatAnswerBuilder)

    async def completions(self, http: Request) -> Response:
        """POST /v1/completions."""
        request = decode_request(await read_body(http, self.max_body_bytes), CompletionRequest)
        check_common(request, self.model)
        limit = asked_max_tokens(request.max_tokens, "max_tokens") or COMPLETION_MAX_TOKENS
        prompts = completion_prompts(request)
        _check_parameters(request)
        limits = await self._limits()

        def encode() -> list[list[int]]:
            return [
                self.text.encode(prompt, at_most=limits.max_model_len) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]

        size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        encoded = await self._encode(size, "prompt", encode)
        return await self._answer(http, request, encoded, limit, limits, "prompt", TextAnswerBuilder)

    async def list_models(self) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [self._describe_model()]})

    async def show_model(self, model: str) -> Response:
        """GET /v1/models/{model}."""
        if model != self.model:
            raise ApiError(
                404,
                f"the model {model!r} does not exist; this server has {self.model!r}",
                param="model",
                code="model_not_found",
            )
        return _json(self._describe_model())

    # ----------------------------------------------------------------------- inside

    async def _answer(
        self,
        http: Request,
        request: CommonRequest,
        prompts: list[list[int]],
        max_tokens: int,
        limits: Limits,
        prompt_param: str,
        answer_type: type[Answer],
    ) -> Response:
        """Submits and answers: every prompt with each of its choices."""
        for prompt in prompts:
            problem = check_prompt(prompt, max_tokens, limits)
            if problem is not None:
                too_long = len(prompt) + max_tokens > min(limits.max_model_len, limits.kv_cache_tokens)
                code = "context_length_exceeded" if too_long else "invalid_value"
                raise ApiError(400, problem, param=prompt_param, code=code)
        params = _params_of_choices(request, max_tokens, len(prompts))
        if len(params) > self.requests.max_waiting:
            text = f"{len(params)} prompts and choices in one request; allowed: {self.requests.max_waiting}"
            raise ApiError(400, text, param="n")
        options = request.stream_options
        usage = bool(options and options.include_usage)
        answer = answer_type(
            self.model,
            sum(map(len, prompts)),
            usage=usage,
            running_usage=usage and bool(options and options.continuous_usage_stats),
        )
        group = Group(self.requests)
        stop = stop_strings(request)
        try:
            if request.stream:
                queue = EventQueue()
                group.submit(prompts, params, stop, queue)
                return EventStream(group, queue, answer, len(params))
            collector = Collector(len(params))
            group.submit(prompts, params, stop, collector)
        except RequestFailed as error:
            raise from_failure(error) from None
        try:
            choices = await collector.wait(group, http.receive)
        except ClientGone:
            return Response(status_code=499)  # nobody reads it
        return Response(answer.whole(choices), media_type="application/json")

    async def _limits(self) -> Limits:
        try:
            return (await self.requests.known_welcome()).limits
        except RequestFailed as error:
            raise from_failure(error) from None

    async def _encode(self, size: int, param: str, function: Callable[[], _T]) -> _T:
        """Runs an encoding of so many characters, in a thread if they are many. Raises ApiError."""
        try:
            return await asyncio.to_thread(function) if size > LONG_TEXT else function()
        except TextTooLong as error:
            raise ApiError(400, str(error), param=param, code="context_length_exceeded") from None
        except (ChatTemplateError, ModelFilesError, ValueError) as error:
            raise ApiError(400, str(error), param=param) from None

    def _describe_model(self) -> dict[str, object]:
        known = self.requests.welcome
        return {
            "id": self.model,
            "object": "model",
            "created": STARTED_AT,
            "owned_by": "phalanx",
            "root": self.model,
            "parent": None,
            "max_model_len": known.limits.max_model_len if known is not None else None,
        }


def _check_parameters(request: CommonRequest) -> None:
    """Refuses what is wrong in itself, before anything waits for a world. Raises ApiError."""
    sampling_params(request, 1)
    num_choices(request)
    stop_strings(request)


def _params_of_choices(request: CommonRequest, max_tokens: int, num_prompts: int) -> list[SamplingParams]:
    """Choices of a prompt share a seed and differ in their number; prompts without a seed get one each."""
    base = sampling_params(request, max_tokens)
    count = num_choices(request)
    params = []
    for _ in range(num_prompts):
        seeded = with_seed(base)
        params += [msgspec.structs.replace(seeded, choice=choice) for choice in range(count)]
    return params


async def read_body(http: Request, limit: int) -> bytes:
    """The body of a request. Raises ApiError (413) as soon as it is known to be too long."""
    too_long = ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")
    announced = http.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_long
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size > limit:
            raise too_long
        parts.append(part)
    return b"".join(parts)


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
