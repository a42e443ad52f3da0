"""POST /v1/embeddings: pooled hidden states of the served model, as OpenAI's clients ask for them.

Beside openai.py: each input is a request of its own with `pooling`, carried over the death of worlds like any other.
"""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import Struct
from starlette.types import Receive

from gateway.checks import check_prompt
from gateway.errors import RequestFailed
from gateway.http.errors import ApiError, from_failure
from gateway.http.logprobs import Placed
from gateway.http.openai import Deadline, OpenAI, read_body
from gateway.http.sampling import MAX_TIMEOUT_S
from gateway.http.schema import check, check_model, decode_body, texts_or_token_ids
from gateway.http.streams import Ask, ClientGone, Group, wait_for
from gateway.protocol import Limits, Output, Pooling, SamplingParams

MAX_INPUTS = 2048
"""OpenAI's own bound."""
MAX_NUMBERS = 2**23
"""Numbers of one answer, over all inputs: 32 MiB as float32, some 90 MB as JSON."""

Encode = Callable[[bytes], bytes]
"""From the float32 numbers of one input to its `embedding` in JSON."""


class EmbeddingRequest(Struct, kw_only=True):
    """OpenAI's fields, then ours."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    user: str | None = None
    pooling: str | None = None
    """`last` (the default) or `mean`."""
    normalize: bool | None = None
    """True unless said otherwise."""
    priority: int | None = None
    timeout: float | None = None


class EmbeddingUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class Embedding(Struct, kw_only=True):
    object: str = "embedding"
    index: int
    embedding: msgspec.Raw


class EmbeddingAnswer(Struct, kw_only=True):
    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@dataclass(frozen=True)
class Embeddings:
    """The endpoint, for the model of `openai`."""

    openai: OpenAI

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/embeddings", self.embeddings, methods=["POST"])
        return router

    async def embeddings(self, http: Request) -> Response:
        """POST /v1/embeddings."""
        openai = self.openai
        request = decode_body(await read_body(http, openai.max_body_bytes), EmbeddingRequest)
        check_model(request.model, openai.model)
        params = _params(request)
        inputs = texts_or_token_ids(request.input, "input", MAX_INPUTS)
        deadline = Deadline(request.timeout)
        limits = await openai.limits(deadline)
        encode = _encoding(request, limits)
        num_numbers = len(inputs) * max(1, request.dimensions or limits.hidden_size)
        if num_numbers > MAX_NUMBERS:
            most = MAX_NUMBERS // max(1, request.dimensions or limits.hidden_size)
            text = f"input has {len(inputs)} entries; with so many numbers to each, allowed: up to {most}"
            raise ApiError(400, text, param="input", code="invalid_value")
        try:
            vectors, tokens = await self._compute(
                inputs, params, "input", request.priority, deadline, limits, http.receive
            )
        except ClientGone:
            return Response(status_code=499)  # nobody reads it

        def body() -> bytes:
            data = [
                Embedding(index=index, embedding=msgspec.Raw(encode(vector)))
                for index, vector in enumerate(vectors)
            ]
            usage = EmbeddingUsage(tokens, tokens)
            return msgspec.json.encode(EmbeddingAnswer(data=data, model=openai.model, usage=usage))

        is_long = num_numbers > 2**16
        return Response(await asyncio.to_thread(body) if is_long else body(), media_type="application/json")

    async def compute(
        self,
        inputs: Sequence[str],
        pooling: Literal["last", "mean"],
        param: str,
        priority: int | None,
        timeout_s: float | None,
        receive: Receive,
    ) -> tuple[list[bytes], int]:
        """The embeddings of texts as float32 numbers, of length 1, and how many tokens they had together. Raises
        ApiError, and ClientGone."""
        asked = EmbeddingRequest(input="", pooling=pooling, priority=priority, timeout=timeout_s)
        params = _params(asked)
        deadline = Deadline(timeout_s)
        limits = await self.openai.limits(deadline)
        most = MAX_NUMBERS // max(1, limits.hidden_size)
        check(len(inputs) <= most, param, f"{len(inputs)} texts", f"up to {most}")
        return await self._compute(inputs, params, param, priority, deadline, limits, receive)

    async def _compute(
        self,
        inputs: Sequence[str | list[int]],
        params: SamplingParams,
        param: str,
        priority: int | None,
        deadline: Deadline,
        limits: Limits,
        receive: Receive,
    ) -> tuple[list[bytes], int]:
        openai = self.openai
        prompts = await openai.encode_prompts(inputs, param, limits)
        for prompt in prompts:
            problem = check_prompt(prompt, 0, limits)
            if problem is not None:
                raise ApiError(400, problem, param=param, code="invalid_value")
        group = Group(openai.requests)
        collector = _Vectors(len(prompts))
        ask = Ask([], priority or 0, deadline.left_s(), deadline.timeout_s)
        try:
            group.submit(prompts, [params] * len(prompts), ask, collector)
        except RequestFailed as error:
            raise from_failure(error) from None
        return await collector.wait(group, receive), sum(map(len, prompts))


class _Vectors:
    """Gathers the numbers of all inputs; nobody is woken before the last."""

    def __init__(self, count: int) -> None:
        self._vectors = [b""] * count
        self._running = count
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def put(self, index: int, output: Output, placed: list[Placed]) -> None:
        if output.pooled is not None:
            self._vectors[index] = output.pooled
        if output.finish_reason is not None:
            self._running -= 1
            if self._running == 0 and not self._done.done():
                self._done.set_result(None)

    def fail(self, error: RequestFailed) -> None:
        if not self._done.done():
            self._done.set_exception(error)

    async def wait(self, group: Group, receive: Receive) -> list[bytes]:
        """The float32 numbers of each input. Raises ApiError, or ClientGone after the group was cancelled."""
        await wait_for(self._done, group, receive)
        return self._vectors


def _params(request: EmbeddingRequest) -> SamplingParams:
    """What each input asks of the engine. Raises ApiError."""
    kind: Literal["last", "mean"] = "mean" if request.pooling == "mean" else "last"
    check(request.pooling in (None, "last", "mean"), "pooling", repr(request.pooling), "last, mean")
    priority, timeout = request.priority or 0, request.timeout
    check(-(2**31) <= priority < 2**31, "priority", priority, "32-bit integers")
    in_range = timeout is None or 0 < timeout <= MAX_TIMEOUT_S
    check(in_range, "timeout", timeout, f"above 0, at most {MAX_TIMEOUT_S:g} seconds")
    return SamplingParams(pooling=Pooling(kind, request.normalize is not False))


def _encoding(request: EmbeddingRequest, limits: Limits) -> Encode:
    """How numbers are written. Raises ApiError."""
    wanted = request.encoding_format or "float"
    check(wanted in ("float", "base64"), "encoding_format", repr(wanted), "float, base64")
    count = request.dimensions
    check(
        count is None or 1 <= count <= limits.hidden_size, "dimensions", count, f"1 to {limits.hidden_size}"
    )
    normalize = request.normalize is not False

    def encode(numbers: bytes) -> bytes:
        if count is not None and count * 4 < len(numbers):
            head = struct.unpack_from(f"<{count}f", numbers)
            # What is left of a vector of length 1 is shorter: it becomes one again.
            length = max(math.hypot(*head), 1e-12) if normalize else 1.0
            numbers = struct.pack(f"<{count}f", *(number / length for number in head))
        if wanted == "base64":
            return b'"%b"' % base64.b64encode(numbers)
        return msgspec.json.encode(struct.unpack(f"<{len(numbers) // 4}f", numbers))

    return encode
