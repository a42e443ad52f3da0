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
from gateway.protocol import SamplingParams

MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 256
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions."""


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class CommonRequest(Struct, kw_only=True):
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
    logit_bias: Any = None
    logprobs: Any = None


class ContentPart(Struct):
    type: str
    text: str | None = None


class ChatMessage(Struct):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Any = None
    function_call: Any = None


class ChatRequest(CommonRequest, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    top_logprobs: Any = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None


class CompletionRequest(CommonRequest, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: Any = None
    suffix: Any = None
    best_of: Any = None


# What each unserved field may be without asking for anything, besides null.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"], []),
    "audio": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}

_Request = TypeVar("_Request", bound=CommonRequest)


def decode_request(body: bytes, kind: type[_Request]) -> _Request:
    """The request of a body. Raises ApiError for broken JSON or UTF-8, wrong types, unserved fields."""
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
    _refuse_unserved(request)
    return request


def _refuse_unserved(request: CommonRequest) -> None:
    for name, neutral in _UNSERVED.items():
        value = getattr(request, name, None)
        if value is None or any(value == allowed and _same_kind(value, allowed) for allowed in neutral):
            continue
        if name == "best_of" and value == (request.n or 1):
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


def sampling_params(request: CommonRequest, max_tokens: int) -> SamplingParams:
    """The parameters of the first choice. Raises ApiError for values out of range."""
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    top_k = 0 if request.top_k is None else request.top_k
    stop_token_ids = request.stop_token_ids or []
    _check(0 <= temperature <= 2, "temperature", temperature, "from 0 to 2")
    _check(0 < top_p <= 1, "top_p", top_p, "above 0, at most 1")
    _check(-1 <= top_k < 2**31, "top_k", top_k, "at least 1, or 0 or -1 for all tokens")
    _check(request.seed is None or -(2**63) <= request.seed < 2**63, "seed", request.seed, "64-bit integers")
    _check(len(stop_token_ids) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", "a list", f"{MAX_STOP_TOKEN_IDS} ids")
    _check(all(0 <= token < 2**31 for token in stop_token_ids), "stop_token_ids", "an id", "token ids")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=max(top_k, 0),
        seed=request.seed,
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=stop_token_ids,
    )


def num_choices(request: CommonRequest) -> int:
    """How many answers to each prompt. Raises ApiError."""
    count = 1 if request.n is None else request.n
    _check(1 <= count <= MAX_CHOICES, "n", count, f"from 1 to {MAX_CHOICES}")
    return count


def stop_strings(request: CommonRequest) -> list[str]:
    """The stop strings. Raises ApiError."""
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    _check(len(stop) <= MAX_STOP_STRINGS, "stop", f"{len(stop)} strings", f"up to {MAX_STOP_STRINGS}")
    _check(all(stop), "stop", '""', "strings that are not empty")
    return stop


def check_common(request: CommonRequest, model: str) -> None:
    """Raises ApiError for another model and for options without their meaning."""
    if request.model is not None and request.model != model:
        raise ApiError(
            404,
            f"the model {request.model!r} does not exist; this server has {model!r}",
            param="model",
            code="model_not_found",
        )
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only allowed with stream: true", param="stream_options")


def asked_max_tokens(value: int | None, param: str) -> int | None:
    """A limit that the client gave. Raises ApiError."""
    if value is not None:
        _check(value >= 1, param, value, "at least 1")
    return value


def chat_messages(request: ChatRequest) -> list[Message]:
    """The conversation as the chat template reads it. Raises ApiError."""
    if not request.messages:
        raise ApiError(400, "messages is empty; at least one message is needed", param="messages")
    return [_template_message(message, index) for index, message in enumerate(request.messages)]


def _template_message(message: ChatMessage, index: int) -> Message:
    place = f"messages[{index}]"
    role = "system" if message.role == "developer" else message.role
    if role not in ("system", "user", "assistant"):
        raise ApiError(
            400,
            f"{place}.role is {message.role!r}; allowed: system, developer, user, assistant",
            param=f"{place}.role",
        )
    if message.tool_calls or message.function_call:
        raise ApiError(
            400,
            f"{place}.tool_calls is not supported by this server yet",
            param=f"{place}.tool_calls",
            code="unsupported_parameter",
        )
    if message.content is None and role != "assistant":
        raise ApiError(
            400, f"{place}.content is missing; give a string or text parts", param=f"{place}.content"
        )
    result: Message = {"role": role, "content": _text(message.content, f"{place}.content")}
    if message.name is not None:
        result["name"] = message.name
    return result


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
    """The prompts: one string, many, one list of token ids, or many. Raises ApiError."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt is empty", param="prompt")
    if all(isinstance(part, int) for part in prompt):
        return [_token_ids(prompt)]
    prompts: list[str | list[int]] = []
    for part in prompt:
        if isinstance(part, int) or isinstance(part, str) != isinstance(prompt[0], str):
            raise ApiError(
                400, "prompt mixes kinds; give strings, token ids, or lists of token ids", param="prompt"
            )
        prompts.append(part if isinstance(part, str) else _token_ids(part))
    _check(len(prompts) <= MAX_PROMPTS, "prompt", f"{len(prompts)} prompts", f"up to {MAX_PROMPTS}")
    return prompts


def _token_ids(prompt: list[Any]) -> list[int]:
    if not all(0 <= token < 2**31 for token in prompt):
        raise ApiError(400, "a prompt has a negative or too large token id", param="prompt")
    return prompt


def _check(ok: bool, param: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ApiError(400, f"{param} is {value}; allowed: {allowed}", param=param, code="invalid_value")
