"""The OpenAI endpoints: /v1/chat/completions, /v1/completions, /v1/models.

Each call: read and check the request, tokenize, hand it to the front's requests, then collect or stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from gateway.calls import Conditions
from gateway.chat_template import ChatTemplateError
from gateway.checks import check_params, check_prompt
from gateway.dialect import Dialect
from gateway.errors import ModelFilesError, RequestFailed
from gateway.http.answers import AnswerOptions
from gateway.http.chat import Chat
from gateway.http.errors import ApiError, from_failure
from gateway.http.logprobs import lay_out
from gateway.http.resumable import AnswerContent, Claim, ResumableCalls
from gateway.http.sampling import (
    bad_words,
    check_answer_size,
    check_length,
    check_sampling,
    num_candidates,
    num_choices,
    priority,
    stop_strings,
    timeout_s,
    truncated,
)
from gateway.http.schema import (
    COMPLETION_MAX_TOKENS,
    ChatRequest,
    CommonRequest,
    CompletionRequest,
    asked_max_tokens,
    check_common,
    completion_prompts,
    decode_request,
    unknown_model,
)
from gateway.http.structured import constraint
from gateway.protocol import Limits, SamplingParams
from gateway.rank0 import with_seed
from gateway.requests import Requests
from gateway.text import LONG_TEXT, TextModel, TextTooLong

MAX_BODY_BYTES = 16 * 1024 * 1024
STARTED_AT = int(time.time())

_T = TypeVar("_T")
_PLAIN = AnswerOptions()
_NO_DIALECT = Dialect()


@dataclass(frozen=True)
class Prepared:
    """A request that was checked and tokenized: what a call of it begins with."""

    prompts: list[list[int]]
    params: list[SamplingParams]
    """One for each prompt and choice, prompt by prompt."""
    conditions: Conditions
    content: AnswerContent


@dataclass(frozen=True)
class OpenAI:
    """The endpoints for one model."""

    model: str
    requests: Requests
    text: TextModel
    resumable: ResumableCalls
    dialect: Dialect = _NO_DIALECT
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
        body = await read_body(http, self.max_body_bytes)
        request = decode_request(body, ChatRequest)
        claim = self.resumable.claim(http, body, "chat")
        if (known := await self.resumable.answer_known(claim, http)) is not None:
            return known
        return await self._answer(http, claim, await self.prepare_chat(request))

    async def prepare_chat(self, request: ChatRequest) -> Prepared:
        """Checks a chat and makes its prompt. Waits for the first world. Raises ApiError."""
        check_common(request, self.model)
        chat = Chat.read(request, self.text.chat_template)
        limit = asked_max_tokens(request.max_completion_tokens, "max_completion_tokens")
        if limit is None:
            limit = asked_max_tokens(request.max_tokens, "max_tokens")
        params = check_sampling(request)
        wanted = constraint(request)
        text, prompt, limits, deadline = await self.encode_chat(chat, request)
        parsing = chat.parsing(self.dialect, text)
        grammar = None
        if wanted is not None or chat.tools.functions:
            grammar = await asyncio.to_thread(chat.grammar, self.dialect, parsing, wanted)
        if limit is None:
            limit = max(1, min(limits.max_model_len, limits.kv_cache_tokens) - len(prompt))
        shape = AnswerOptions(parsing=parsing)
        return self._prepare(request, params, [prompt], limit, limits, deadline, grammar, "messages", shape)

    async def encode_chat(self, chat: Chat, request: ChatRequest) -> tuple[str, list[int], Limits, Deadline]:
        """The prompt of a chat, as text and as tokens, what the world allows, and the end of its time. Raises
        ApiError."""
        deadline = Deadline(timeout_s(request))
        limits = await self.limits(deadline)
        at_most = limits.max_model_len if request.truncate_prompt_tokens is None else None

        def encode() -> tuple[str, list[int]]:
            text = chat.prompt(self.text.template())
            return text, self.text.encode(text, add_special_tokens=False, at_most=at_most)

        text, prompt = await self._encode(chat.num_characters, "messages", encode)
        return text, truncated(request, prompt, limits.max_model_len), limits, deadline

    async def completions(self, http: Request) -> Response:
        """POST /v1/completions."""
        body = await read_body(http, self.max_body_bytes)
        request = decode_request(body, CompletionRequest)
        claim = self.resumable.claim(http, body, "completions")
        if (known := await self.resumable.answer_known(claim, http)) is not None:
            return known
        return await self._answer(http, claim, await self._prepare_completion(request))

    async def _prepare_completion(self, request: CompletionRequest) -> Prepared:
        check_common(request, self.model)
        only_echo = bool(request.echo) and request.max_tokens == 0
        # The engine makes one token at least; of a mere echo it is not shown.
        limit = 1 if only_echo else asked_max_tokens(request.max_tokens, "max_tokens")
        prompts = completion_prompts(request)
        params = check_sampling(request)
        grammar = await _grammar(request)
        deadline = Deadline(timeout_s(request))
        limits = await self.limits(deadline)

        encoded = await self.encode_prompts(prompts, "prompt", limits)
        encoded = [truncated(request, prompt, limits.max_model_len) for prompt in encoded]
        echo = []
        if request.echo:
            pairs = zip(prompts, encoded, strict=True)
            echo = [lay_out(prompt, token_ids, self.text) for prompt, token_ids in pairs]
        return self._prepare(
            request,
            params,
            encoded,
            COMPLETION_MAX_TOKENS if limit is None else limit,
            limits,
            deadline,
            grammar,
            "prompt",
            AnswerOptions(echo=echo, only_echo=only_echo),
        )

    async def list_models(self) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [self._describe_model()]})

    async def show_model(self, model: str) -> Response:
        """GET /v1/models/{model}."""
        if model != self.model:
            raise unknown_model(model, self.model)
        return _json(self._describe_model())

    # ----------------------------------------------------------------------- inside

    async def _answer(self, http: Request, claim: Claim, prepared: Prepared) -> Response:
        if (known := await self.resumable.answer_known(claim, http)) is not None:
            return known  # somebody was faster with the same key
        return await self.resumable.begin(
            claim, http, prepared.prompts, prepared.params, prepared.conditions, prepared.content
        )

    def _prepare(
        self,
        request: CommonRequest,
        base: SamplingParams,
        prompts: list[list[int]],
        max_tokens: int,
        limits: Limits,
        deadline: Deadline,
        grammar: str | None,
        prompt_param: str,
        shape: AnswerOptions = _PLAIN,
    ) -> Prepared:
        """Every prompt with each of its choices; `base`: what `check_sampling` gave. Raises ApiError."""
        for prompt in prompts:
            problem = check_prompt(prompt, max_tokens, limits)
            if problem is not None:
                too_long = len(prompt) + max_tokens > min(limits.max_model_len, limits.kv_cache_tokens)
                code = "context_length_exceeded" if too_long else "invalid_value"
                raise ApiError(400, problem, param=prompt_param, code=code)
        check_length(request, max_tokens)
        base = msgspec.structs.replace(
            base,
            max_tokens=max_tokens,
            bad_words=bad_words(request, self.text),
            grammar=grammar,
            shown_token_ids=[] if shape.parsing is None else sorted(self.dialect.special.values()),
        )
        shape = _answer_options(request, base, shape)
        base = _ask_more(base, shape, needs_scores=num_candidates(request) > num_choices(request))
        found = check_params(base, limits, max(map(len, prompts)))
        if found is not None:
            raise ApiError(400, found.message, param=found.field, code="invalid_value")
        count = num_candidates(request)
        check_answer_size(base, sum(map(len, prompts)), len(prompts), count, bool(request.stream))
        params = _params_of_choices(base, count, len(prompts), bool(request.stream))
        most = self.requests.waiting.max_requests
        if len(params) > most:
            text = f"{len(params)} prompts and choices in one request; allowed: {most} (--max-waiting)"
            raise ApiError(400, text, param="n")
        prompt_tokens = sum(map(len, prompts))
        content = AnswerContent(self.model, bool(request.stream), len(prompts), prompt_tokens, shape)
        conditions = Conditions(
            stop_strings(request), priority(request), deadline.left_s(), deadline.timeout_s
        )
        return Prepared(prompts, params, conditions, content)

    async def limits(self, deadline: Deadline) -> Limits:
        """What the world allows; waits for the first one, up to the deadline. Raises ApiError."""
        if self.requests.welcome is not None:
            return self.requests.welcome.limits
        try:
            async with asyncio.timeout(deadline.left_s()):
                return (await self.requests.known_welcome()).limits
        except RequestFailed as error:
            raise from_failure(error) from None
        except TimeoutError:
            text = f"no world has come up to serve the model within the timeout of {deadline.timeout_s:g} s"
            raise from_failure(RequestFailed("timeout", text)) from None

    async def encode_prompts(
        self, prompts: Sequence[str | list[int]], param: str, limits: Limits
    ) -> list[list[int]]:
        """The token ids of texts; what is token ids already stays. Raises ApiError."""

        def encode() -> list[list[int]]:
            return [
                self.text.encode(prompt, at_most=limits.max_model_len) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]

        return await self._encode(sum(len(p) for p in prompts if isinstance(p, str)), param, encode)

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


class Deadline:
    """The end of a request's own timeout, counted from here."""

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._began = time.monotonic()

    def left_s(self) -> float | None:
        """Seconds, not below 0; None without a timeout."""
        if self.timeout_s is None:
            return None
        return max(0.0, self._began + self.timeout_s - time.monotonic())


async def _grammar(request: CommonRequest) -> str | None:
    """What the answers must match. Raises ApiError."""
    wanted = constraint(request)
    return None if wanted is None else await asyncio.to_thread(wanted.compile)


def _answer_options(request: CommonRequest, params: SamplingParams, shape: AnswerOptions) -> AnswerOptions:
    """What the answer shows, beside what the endpoint knows already."""
    options = request.stream_options
    usage = bool(options and options.include_usage)
    return AnswerOptions(
        usage=usage,
        running_usage=usage and bool(options and options.continuous_usage_stats),
        logprobs=params.logprobs is not None,
        num_top_of_prompt=params.prompt_logprobs,
        num_top_of_echo=params.logprobs or 0,
        choices_per_prompt=num_choices(request),
        echo=shape.echo,
        only_echo=shape.only_echo,
        parsing=shape.parsing,
    )


def _ask_more(params: SamplingParams, shape: AnswerOptions, *, needs_scores: bool) -> SamplingParams:
    """The log-probabilities that an echo shows of its prompt, and those that choices are compared by."""
    if shape.echo and params.logprobs is not None:
        num_top = max(params.logprobs, params.prompt_logprobs or 0)
        params = msgspec.structs.replace(params, prompt_logprobs=num_top)
    if needs_scores and params.logprobs is None:
        params = msgspec.structs.replace(params, logprobs=0)
    return params


def _params_of_choices(
    base: SamplingParams, count: int, num_prompts: int, streams: bool
) -> list[SamplingParams]:
    """Choices of a prompt share a seed and differ in their number; prompts without a seed get one each. What is
    asked about a prompt is asked once, except in a stream, whose choices begin in any order."""
    params = []
    for _ in range(num_prompts):
        seeded = with_seed(base)
        others = seeded if streams else msgspec.structs.replace(seeded, prompt_logprobs=None)
        params.append(seeded)
        params += [msgspec.structs.replace(others, choice=choice) for choice in range(1, count)]
    return params


async def read_body(http: Request, limit: int) -> bytes:
    """The body of a request. Raises ApiError (413) as soon as it is known to be too long."""
    announced = http.headers.get("content-length", "")
    size, parts = 0, []
    ends = announced.isdigit() and int(announced) > limit
    while not ends:
        message = await http.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        ends = size > limit or not message.get("more_body", False)
    if not parts or size > limit:
        raise ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")
    return b"".join(parts)


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
