"""What clients send to /v1/responses: its fields, and which of them are refused by name.

Used by routes.py. What a field means is said by the chat that it becomes, see conversation.py.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from gateway.http.errors import ApiError
from gateway.http.schema import check, decode_body

MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512

LOGPROBS = "message.output_text.logprobs"
EFFECTLESS_INCLUDES = (
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
)
"""Details of items that no response here has: whoever asks for them gets all there are."""


class TextFormat(Struct, kw_only=True):
    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(Struct, kw_only=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Struct, kw_only=True):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class FunctionTool(Struct, kw_only=True):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    output_schema: Any = None
    is_async: bool | None = msgspec.field(default=None, name="async")


class ResponseStreamOptions(Struct, kw_only=True):
    include_obfuscation: bool | None = None


class BackgroundOptions(Struct, kw_only=True):
    completion_window: str | None = None
    continuation_id: str | None = None


class ResponseRequest(Struct, kw_only=True):
    """OpenAI's fields, then those of a chat that are passed on. `Any`: checked where they are used, or refused."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    background_options: BackgroundOptions | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    access_programs: Any = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    moderation: Any = None
    prompt: Any = None
    # Of the chat endpoint.
    seed: Any = None
    stop: Any = None
    stop_token_ids: Any = None
    top_k: Any = None
    min_p: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    bad_words: Any = None
    priority: Any = None
    timeout: Any = None
    chat_template_kwargs: Any = None


PASSED_ON = (
    *("temperature", "top_p", "seed", "stop", "stop_token_ids", "top_k", "min_p", "min_tokens", "ignore_eos"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "bad_words", "priority"),
    *("timeout", "chat_template_kwargs", "user", "parallel_tool_calls"),
)
"""Fields of a chat with the same name and meaning."""

_UNSERVED: dict[str, tuple[Any, ...]] = {
    "access_programs": ({},),
    "context_management": ([],),
    "conversation": (),
    "image": ({},),
    "moderation": (),
    "prompt": (),
}
"""Fields that are refused, and what each may be without asking for anything."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "truncation": ("auto", "disabled"),
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": ("in_memory", "24h", "in-memory"),
    "text.verbosity": ("medium",),
    "text.format.type": ("text", "json_object", "json_schema"),
    "reasoning.summary": ("auto",),
    "reasoning.generate_summary": ("auto",),
    "reasoning.context": ("auto", "current_turn"),
    "reasoning.mode": ("standard",),
    "background_options.completion_window": ("soonest",),
}
"""Fields with words that are allowed. What is not among them would change the answer."""


def decode_response_request(body: bytes) -> ResponseRequest:
    """The request of a body. Raises ApiError."""
    request = decode_body(body, ResponseRequest)
    for name, neutral in _UNSERVED.items():
        value = getattr(request, name)
        if value is not None and value not in neutral:
            raise unsupported(name, ["null", *(msgspec.json.encode(one).decode() for one in neutral)])
    for name, words in _CHOICES.items():
        word = _value(request, name)
        if word is not None and word not in words:
            raise unsupported(name, words, word)
    for name in request.include or ():
        if name != LOGPROBS and name not in EFFECTLESS_INCLUDES:
            raise unsupported("include", (LOGPROBS, *EFFECTLESS_INCLUDES), name)
    for index, tool in enumerate(request.tools or ()):
        if tool.type != "function":
            raise unsupported(f"tools[{index}].type", ("function",), tool.type)
        if not tool.name:
            raise ApiError(400, f"tools[{index}].name is missing", param=f"tools[{index}].name")
        for name, asks, allowed in (
            ("allowed_callers", tool.allowed_callers not in (None, [], ["direct"]), '["direct"]'),
            ("defer_loading", tool.defer_loading, "false"),
            ("async", tool.is_async, "false"),
            ("output_schema", tool.output_schema is not None, "null"),
        ):
            if asks:
                raise unsupported(f"tools[{index}].{name}", (allowed,))
    if request.max_tool_calls is not None:  # of built-in tools, of which there are none
        check(request.max_tool_calls >= 1, "max_tool_calls", request.max_tool_calls, "at least 1")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only allowed with stream: true", param="stream_options")
    if request.background and request.store is False:
        text = "background: true needs store: true, or nobody could ask for the response"
        raise ApiError(400, text, param="background", code="invalid_value")
    if request.background_options is not None and not request.background:
        text = "background_options is only allowed with background: true"
        raise ApiError(400, text, param="background_options")
    check_metadata(request.metadata)
    return request


def check_metadata(metadata: dict[str, str] | None) -> None:
    """Raises ApiError for more or longer entries than OpenAI's API allows."""
    given = metadata or {}
    check(len(given) <= MAX_METADATA, "metadata", f"{len(given)} entries", f"up to {MAX_METADATA}")
    for key, value in given.items():
        allowed = f"keys of up to {MAX_METADATA_KEY} characters, values of up to {MAX_METADATA_VALUE}"
        ok = len(key) <= MAX_METADATA_KEY and len(value) <= MAX_METADATA_VALUE
        check(ok, "metadata", f"an object with a longer entry ({key[:20]!r})", allowed)


def unsupported(name: str, allowed: Any, value: str | None = None) -> ApiError:
    """The refusal of what is known and not served."""
    shown = "" if value is None else f" {value[:64]!r}"
    text = f"{name}{shown} is not supported by this server; allowed: {', '.join(allowed)}"
    return ApiError(400, text, param=name, code="unsupported_parameter")


def _value(request: ResponseRequest, path: str) -> str | None:
    value: Any = request
    for name in path.split("."):
        value = getattr(value, name) if value is not None else None
    return value
