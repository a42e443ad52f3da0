"""What clients send to the OpenAI endpoints, and the checks that come before anything else.

Types are msgspec structs: wrong types are refused with their place, unknown fields are allowed. A field
that is known and not served yet is refused by name when it asks for something, never ignored.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from gateway.chat_template import Message
from gateway.http.errors import ApiError
from gateway.http.structured import StructuredFields
from gateway.http.tools import MessageToolCall, Tool, template_tool_calls

MAX_PROMPTS = 1024
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions."""


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class CommonRequest(StructuredFields, kw_only=True):
    """Fields that both endpoints know. `Any`: not served yet, see _UNSERVED."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    user: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    priority: int | None = None
    timeout: float | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: list[int] | None = None
    custom_logit_processor: Any = None
    include_stop_str_in_output: bool | None = None
    logits_processors: Any = None
    lora_path: Any = None
    no_stop_trim: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    typical_p: Any = None
    use_beam_search: Any = None


class ContentPart(Struct):
    type: str
    text: str | None = None


class ChatMessage(Struct):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    function_call: Any = None


class ChatRequest(CommonRequest, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: Any = None
    continue_final_message: bool | None = None
    documents: Any = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    moderation: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None
    # Hints and labels of the client's own: no answer depends on them.
    metadata: dict[str, Any] | None = None
    prediction: Any = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    web_search_options: Any = None


class CompletionRequest(CommonRequest, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | bool | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: Any = None
    add_special_tokens: Any = None


# What each unserved field may be without asking for anything, besides null.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"], []),
    "moderation": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "audio": (),
    "web_search_options": (),
    "suffix": ("",),
    # Of vLLM and SGLang: what asks for other tokens or another text than the answer would have without it.
    "add_special_tokens": (True,),
    "chat_template": (),
    "custom_logit_processor": (),
    "documents": ([],),
    "logits_processors": ([],),
    "lora_path": (),
    "no_stop_trim": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "typical_p": (1.0,),
    "use_beam_search": (False,),
}

_Request = TypeVar("_Request", bound=CommonRequest)
_Body = TypeVar("_Body", bound=Struct)


def decode_request(body: bytes, kind: type[_Request]) -> _Request:
    """The request of a body. Raises ApiError for broken JSON or UTF-8, wrong types, unserved fields."""
    request = decode_body(body, kind)
    _refuse_unserved(request)
    return request


def decode_body(body: bytes, kind: type[_Body]) -> _Body:
    """The struct of a body. Raises ApiError for broken JSON or UTF-8 and wrong types."""
    try:
        body.decode()  # msgspec does not look into the fields that it skips
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        place = re.search(r"`\$\.([^`]*)`", text)
        missing = re.search(r"missing required field `([^`]*)`", text)
        param = place[1] if place else missing[1] if missing else None
        raise ApiError(400, text, param=param, code="invalid_type" if place else None) from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid UTF-8: {error}", code="invalid_utf8") from None
    except msgspec.DecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    return request


def _refuse_unserved(request: CommonRequest) -> None:
    for name, neutral in _UNSERVED.items():
        value = getattr(request, name, None)
        if value is None or any(value == allowed and _same_kind(value, allowed) for allowed in neutral):
            continue
        allowed_text = ", ".join(["null", *(msgspec.json.encode(allowed).decode() for allowed in neutral)])
        raise ApiError(
            400,
            f"{name} is not supported by this server yet; allowed: {allowed_text}",
            param=name,
            code="unsupported_parameter",
        )


def _same_kind(value: Any, allowed: Any) -> bool:
    # In Python False == 0: `logprobs: 0` does ask for something.
    return isinstance(value, bool) == isinstance(allowed, bool)


def check_common(request: CommonRequest, model: str) -> None:
    """Raises ApiError for another model and for options without their meaning."""
    check_model(request.model, model)
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only allowed with stream: true", param="stream_options")


def check_model(asked: str | None, model: str) -> None:
    """Raises ApiError for another model than the one that is served."""
    if asked is not None and asked != model:
        raise unknown_model(asked, model)


def unknown_model(asked: str, model: str) -> ApiError:
    """OpenAI's error for another model than the one that is served."""
    text = (
        f"The model `{asked[:256]}` does not exist or you do not have access to it; this server has {model!r}"
    )
    return ApiError(404, text, param="model", code="model_not_found")


def asked_max_tokens(value: int | None, param: str) -> int | None:
    """A limit that the client gave. Raises ApiError."""
    if value is not None:
        check(value >= 1, param, value, "at least 1")
    return value


def chat_messages(request: ChatRequest) -> list[Message]:
    """The conversation as the chat template reads it. Raises ApiError."""
    if not request.messages:
        raise ApiError(400, "messages is empty; at least one message is needed", param="messages")
    messages: list[Message] = []
    for index, message in enumerate(request.messages):
        messages.append(_template_message(message, index, messages))
    return messages


def _template_message(message: ChatMessage, index: int, earlier: list[Message]) -> Message:
    place = f"messages[{index}]"
    role = "system" if message.role == "developer" else message.role
    if role not in ("system", "user", "assistant", "tool"):
        raise ApiError(
            400,
            f"{place}.role is {message.role!r}; allowed: system, developer, user, assistant, tool",
            param=f"{place}.role",
        )
    if message.function_call:
        text = f"{place}.function_call is not supported by this server; use tool_calls"
        raise ApiError(400, text, param=f"{place}.function_call", code="unsupported_parameter")
    if message.content is None and role != "assistant":
        raise ApiError(
            400, f"{place}.content is missing; give a string or text parts", param=f"{place}.content"
        )
    result: Message = {"role": role, "content": _text(message.content, f"{place}.content")}
    if message.name is not None:
        result["name"] = message.name
    if message.tool_calls:
        if role != "assistant":
            text = f"{place}.tool_calls is only allowed in messages of the assistant"
            raise ApiError(400, text, param=f"{place}.tool_calls")
        result["tool_calls"] = template_tool_calls(message.tool_calls, f"{place}.tool_calls")
    if role == "tool":
        _describe_answer(message, result, earlier, place)
    if role == "assistant" and (thoughts := message.reasoning_content or message.reasoning):
        result["reasoning_content"] = thoughts
    return result


def _describe_answer(message: ChatMessage, result: Message, earlier: list[Message], place: str) -> None:
    """What templates read of a tool's answer: which call it is to, and of which function. Raises ApiError."""
    if message.tool_call_id is None:
        text = f"{place}.tool_call_id is missing; give the id of the call that this answers"
        raise ApiError(400, text, param=f"{place}.tool_call_id")
    result["tool_call_id"] = message.tool_call_id
    for before in reversed(earlier):
        for call in before.get("tool_calls", ()):
            if call["id"] == message.tool_call_id:
                result.setdefault("name", call["function"]["name"])
                return


def _text(content: str | list[ContentPart] | None, place: str) -> str:
    if not isinstance(content, list):
        return content or ""
    for number, part in enumerate(content):
        if part.type not in ("text", "refusal") or part.text is None:
            raise ApiError(
                400,
                f"{place}[{number}] has type {part.type!r}; this model takes parts of type text only",
                param=place,
                code="unsupported_content",
            )
    return "\n".join(part.text or "" for part in content)


def completion_prompts(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a completion. Raises ApiError."""
    return texts_or_token_ids(request.prompt, "prompt", MAX_PROMPTS)


def texts_or_token_ids(
    given: str | list[str | int | list[int]], param: str, at_most: int
) -> list[str | list[int]]:
    """One string, many, one list of token ids, or many, as a list. Raises ApiError."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError(400, f"{param} is empty", param=param)
    if all(isinstance(part, int) for part in given):
        return [_token_ids(given, param)]
    check(len(given) <= at_most, param, f"{len(given)} prompts", f"up to {at_most}")
    prompts: list[str | list[int]] = []
    for part in given:
        if isinstance(part, int) or isinstance(part, str) != isinstance(given[0], str):
            text = f"{param} mixes kinds; give strings, token ids, or lists of token ids"
            raise ApiError(400, text, param=param)
        prompts.append(part if isinstance(part, str) else _token_ids(part, param))
    return prompts


def _token_ids(prompt: list[Any], param: str) -> list[int]:
    if not all(0 <= token < 2**31 for token in prompt):
        raise ApiError(400, f"{param} has a negative or too large token id", param=param)
    return prompt


def check(ok: bool, param: str, value: Any, allowed: str) -> None:
    """Raises ApiError with the allowed range."""
    if not ok:
        raise ApiError(400, f"{param} is {value}; allowed: {allowed}", param=param, code="invalid_value")
