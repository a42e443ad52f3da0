"""From the items of the responses endpoint to the messages of a chat, and to the body that asks for it.

Pure functions between schema.py and the chat endpoint, whose checks then hold for what is made here.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from gateway.http.errors import ApiError
from gateway.http.responses.schema import LOGPROBS, PASSED_ON, ResponseRequest, unsupported

Item = dict[str, Any]
Message = dict[str, Any]

MAX_ID_LENGTH = 128

_TEXT_PARTS = ("input_text", "output_text", "text")
_ROLES = ("user", "assistant", "system", "developer")


def input_items(request: ResponseRequest, response_id: str) -> list[Item]:
    """The items of a request, each with an id and in the long form of the API. Raises ApiError."""
    given: list[Item] = (
        [{"role": "user", "content": request.input}] if isinstance(request.input, str) else request.input
    )
    if not given:
        raise ApiError(400, "input is empty; at least one item is needed", param="input")
    number = response_id.partition("_")[2]
    return [_item(item, f"input[{index}]", f"{number}{index:04x}") for index, item in enumerate(given)]


def _item(item: Item, place: str, number: str) -> Item:
    kind = item.get("type", "message")
    if not isinstance(item.get("id", ""), str | None) or len(item.get("id") or "") > MAX_ID_LENGTH:
        text = f"{place}.id has to be a string of up to {MAX_ID_LENGTH} characters"
        raise ApiError(400, text, param=f"{place}.id")
    if kind == "message":
        return _message_item(item, place, number)
    if kind == "function_call":
        found = {name: _string(item, name, place) for name in ("call_id", "name", "arguments")}
        item_id = item.get("id") or f"fc_{number}"
        return {"id": item_id, "type": kind, **found, "status": "completed"}
    if kind == "function_call_output":
        output = item.get("output")
        text = output if isinstance(output, str) else _text(output, f"{place}.output")
        call_id = _string(item, "call_id", place)
        item_id = item.get("id") or f"fco_{number}"
        return {"id": item_id, "type": kind, "call_id": call_id, "output": text, "status": "completed"}
    if kind == "reasoning":
        item_id = item.get("id") or f"rs_{number}"
        summary = _text_parts(item.get("summary"), f"{place}.summary", "summary_text")
        content = _text_parts(item.get("content"), f"{place}.content", "reasoning_text")
        return {"id": item_id, "type": kind, "summary": summary, "content": content}
    allowed = ("message", "function_call", "function_call_output", "reasoning")
    raise unsupported(f"{place}.type", allowed, str(kind))


def _message_item(item: Item, place: str, number: str) -> Item:
    role = item.get("role")
    if role not in _ROLES:
        text = f"{place}.role is {str(role)[:64]!r}; allowed: {', '.join(_ROLES)}"
        raise ApiError(400, text, param=f"{place}.role")
    content = item.get("content")
    text = content if isinstance(content, str) else _text(content, f"{place}.content")
    part: Item = {"type": "input_text", "text": text}
    if role == "assistant":
        part = {"type": "output_text", "text": text, "annotations": []}
    item_id = item.get("id") or f"msg_{number}"
    return {"id": item_id, "type": "message", "role": role, "status": "completed", "content": [part]}


def _text(content: Any, place: str) -> str:
    """The text of content parts."""
    texts = []
    for index, part in enumerate(_parts(content, place)):
        kind = part.get("type")
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind not in (*_TEXT_PARTS, "refusal"):
            raise ApiError(
                400,
                f"{place}[{index}] has type {str(kind)[:64]!r}; this model takes parts of type input_text and "
                "output_text only",
                param=f"{place}[{index}].type",
                code="unsupported_content",
            )
        if not isinstance(text, str):
            raise ApiError(400, f"{place}[{index}] has no text", param=f"{place}[{index}]")
        texts.append(text)
    return "\n".join(texts)


def _text_parts(content: Any, place: str, kind: str) -> list[Item]:
    """The parts of thoughts, all of one type."""
    parts = _parts(content or [], place)
    for index, part in enumerate(parts):
        if part.get("type") != kind or not isinstance(part.get("text"), str):
            text = f"{place}[{index}] has to be of the type {kind}, with a text"
            raise ApiError(400, text, param=f"{place}[{index}]")
    return [{"type": kind, "text": part["text"]} for part in parts]


def _parts(content: Any, place: str) -> list[Item]:
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ApiError(400, f"{place} has to be a string or a list of parts", param=place)
    return content


def _string(item: Item, name: str, place: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ApiError(400, f"{place}.{name} has to be a string", param=f"{place}.{name}")
    return value


def chat_messages_of(items: list[Item]) -> list[Message]:
    """The messages of a conversation. Thoughts, text and calls that follow each other are one message of the
    assistant; thoughts that nothing follows are left out."""
    messages: list[Message] = []
    turn: Message | None = None  # of the assistant, while nobody else has spoken
    for item in items:
        kind = item["type"]
        if kind not in ("reasoning", "function_call") and item.get("role") != "assistant":
            turn = None
            if kind == "function_call_output":
                message = {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
            else:
                message = {"role": item["role"], "content": _text_of(item)}
            messages.append(message)
            continue
        has_spoken = turn is not None and ("content" in turn or "tool_calls" in turn)
        if turn is None or (has_spoken and kind != "function_call"):
            turn = {"role": "assistant"}
            messages.append(turn)
        if kind == "reasoning":
            turn["reasoning_content"] = turn.get("reasoning_content", "") + _text_of(item)
        elif kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)
        else:
            turn["content"] = _text_of(item)
    return [message for message in messages if message.keys() - {"role", "reasoning_content"}]


def _text_of(item: Item) -> str:
    return "".join(part.get("text", "") for part in item["content"])


def chat_body(request: ResponseRequest, messages: list[Message]) -> bytes:
    """The body of the chat that gives this response."""
    body: dict[str, Any] = {name: getattr(request, name) for name in PASSED_ON}
    system = [] if request.instructions is None else [{"role": "system", "content": request.instructions}]
    body["messages"] = [*system, *messages]
    body["max_completion_tokens"] = request.max_output_tokens
    body["stream"] = request.stream
    if request.top_logprobs or LOGPROBS in (request.include or ()):
        body["logprobs"], body["top_logprobs"] = True, request.top_logprobs or 0
    if request.reasoning is not None:
        body["reasoning_effort"] = request.reasoning.effort
    if request.tools:
        body["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters or {"type": "object", "properties": {}},
                    "strict": tool.strict,
                },
            }
            for tool in request.tools
        ]
    body["tool_choice"] = _chat_tool_choice(request.tool_choice)
    wanted = request.text.format if request.text is not None else None
    if wanted is not None and wanted.type != "text":
        body["response_format"] = {"type": wanted.type}
        if wanted.type == "json_schema":
            schema = {"name": wanted.name, "schema": wanted.schema, "strict": wanted.strict}
            body["response_format"]["json_schema"] = schema
    return msgspec.json.encode({name: value for name, value in body.items() if value is not None})


def _chat_tool_choice(choice: Any) -> Any:
    """The chat's way to say the same."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        tools = [_chat_tool_choice(tool) for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return choice


_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}
_NAME = re.compile(rf"\b({'|'.join(map(re.escape, _NAMES))})\b")
_MESSAGES = re.compile(r"^messages\b")


def in_own_words(error: ApiError) -> ApiError:
    """An error of the chat endpoint with the names that the fields have here."""
    error.message = _MESSAGES.sub("input", _NAME.sub(lambda match: _NAMES[match[1]], error.message))
    if error.param is not None:
        error.param = _MESSAGES.sub("input", _NAME.sub(lambda match: _NAMES[match[1]], error.param))
    return error
