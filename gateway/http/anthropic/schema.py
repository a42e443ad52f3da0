"""What clients of Anthropic's API send to /v1/messages, and the chat request that asks for the same.

Types are msgspec structs, as in gateway/http/schema.py. What cannot be honoured is refused by its name.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from gateway.http.errors import ApiError
from gateway.http.schema import ChatMessage, ChatRequest
from gateway.http.structured import JsonSchemaFormat, ResponseFormat
from gateway.http.tools import CalledFunction, FunctionDefinition, MessageToolCall, Tool

Block = dict[str, Any]
_SWITCHES = ("enable_thinking", "thinking")


class InputMessage(Struct):
    role: str
    content: str | list[Block]


class InputTool(Struct):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: Any = None
    defer_loading: Any = None
    input_examples: Any = None


class CountRequest(Struct, kw_only=True):
    """What makes a prompt."""

    model: str
    messages: list[InputMessage]
    system: str | list[Block] | None = None
    tools: list[InputTool] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class MessagesRequest(CountRequest, kw_only=True):
    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Any = None
    service_tier: Any = None
    container: Any = None
    mcp_servers: Any = None
    context_management: Any = None
    compaction: Any = None
    fallbacks: Any = None
    thread: Any = None


_REFUSED = ("container", "mcp_servers", "context_management", "compaction", "fallbacks", "thread")
"""What Anthropic's servers do around a message: other answers than ours would come of it."""


def as_chat(request: CountRequest) -> ChatRequest:
    """The chat that gives this message. Raises ApiError."""
    messages: list[ChatMessage] = []
    if request.system:
        messages.append(ChatMessage("system", _text(request.system, "system")))
    for index, message in enumerate(request.messages):
        messages += _messages(message, f"messages[{index}]")
    choice, one_call = _tool_choice(request.tool_choice)
    # The answer goes on with what the client has put into the assistant's mouth.
    last = messages[-1] if messages else None
    continues = last is not None and last.role == "assistant" and not last.tool_calls
    chat = ChatRequest(
        model=request.model,
        messages=messages,
        tools=[_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())] or None,
        tool_choice=choice,
        parallel_tool_calls=False if one_call else None,
        continue_final_message=continues or None,
        chat_template_kwargs=dict.fromkeys(_SWITCHES, _thinks(request.thinking)),
        response_format=_response_format(request.output_config),
    )
    effort = (request.output_config or {}).get("effort")
    if isinstance(effort, str):
        chat.reasoning_effort = effort
    if isinstance(request, MessagesRequest):
        for name in _REFUSED:
            if getattr(request, name):
                raise ApiError(400, f"{name} is not supported by this server; leave it out", param=name)
        chat.max_tokens, chat.stream = request.max_tokens, request.stream
        chat.stop = request.stop_sequences
        chat.temperature, chat.top_p, chat.top_k = request.temperature, request.top_p, request.top_k
    return chat


def _messages(message: InputMessage, place: str) -> list[ChatMessage]:
    """One message may be several of a chat: the results of tools have a role of their own."""
    if message.role not in ("user", "assistant", "system"):
        text = f"{place}.role is {message.role[:40]!r}; allowed: user, assistant"
        raise ApiError(400, text, param=f"{place}.role")
    if isinstance(message.content, str):
        return [ChatMessage(message.role, message.content)]
    if message.role == "assistant":
        return [_assistant(message.content, f"{place}.content")]
    found: list[ChatMessage] = []
    texts: list[str] = []
    for number, block in enumerate(message.content):
        at = f"{place}.content[{number}]"
        if block.get("type") == "tool_result":
            content = block.get("content")
            text = "" if content is None else _text(content, f"{at}.content")
            call_id = _string(block, "tool_use_id", at)
            found.append(ChatMessage("tool", text, tool_call_id=call_id))
        else:
            texts.append(_block_text(block, at))
    if texts:
        found.append(ChatMessage(message.role, "\n".join(texts)))
    return found


def _assistant(blocks: list[Block], place: str) -> ChatMessage:
    texts, thoughts, calls = [], [], []
    for number, block in enumerate(blocks):
        at = f"{place}[{number}]"
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(_string(block, "thinking", at))
        elif kind == "tool_use":
            given = block.get("input")
            function = CalledFunction(_string(block, "name", at), given if isinstance(given, dict) else {})
            calls.append(MessageToolCall(_string(block, "id", at), "function", function))
        elif kind != "redacted_thinking":
            texts.append(_block_text(block, at))
    return ChatMessage(
        "assistant",
        "".join(texts),
        tool_calls=calls or None,
        reasoning_content="\n".join(thoughts) or None,
    )


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise ApiError(400, f"{place} has to be a string or a list of blocks", param=place)
    return "\n".join(_block_text(block, f"{place}[{number}]") for number, block in enumerate(content))


def _block_text(block: Block, place: str) -> str:
    if block.get("type") != "text":
        kind = str(block.get("type"))[:40]
        text = f"{place}.type is {kind!r}; this model takes blocks of type text, tool_use and tool_result"
        raise ApiError(400, text, param=f"{place}.type", code="unsupported_content")
    return _string(block, "text", place)


def _string(block: Block, name: str, place: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise ApiError(400, f"{place}.{name} has to be a string", param=f"{place}.{name}")
    return value


def _tool(tool: InputTool, place: str) -> Tool:
    if tool.type not in (None, "custom"):
        text = f"{place}.type is {str(tool.type)[:40]!r}; this server runs no tools itself; allowed: custom"
        raise ApiError(400, text, param=f"{place}.type", code="unsupported_parameter")
    for name in ("defer_loading", "input_examples"):
        if getattr(tool, name):
            text = f"{place}.{name} is not supported by this server; leave it out"
            raise ApiError(400, text, param=f"{place}.{name}", code="unsupported_parameter")
    if tool.allowed_callers not in (None, ["direct"]):
        text = f"{place}.allowed_callers names callers that this server has not; allowed: ['direct']"
        raise ApiError(400, text, param=f"{place}.allowed_callers", code="unsupported_parameter")
    function = FunctionDefinition(tool.name, tool.description, tool.input_schema, tool.strict)
    return Tool("function", function)


def _tool_choice(choice: dict[str, Any] | None) -> tuple[str | dict[str, Any] | None, bool]:
    if choice is None:
        return None, False
    one_call = choice.get("disable_parallel_tool_use") is True
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}, one_call
    names = {"auto": "auto", "any": "required", "none": "none"}
    if kind not in names:
        text = f"tool_choice.type is {str(kind)[:40]!r}; allowed: auto, any, tool, none"
        raise ApiError(400, text, param="tool_choice.type")
    return names[kind], one_call


def _thinks(thinking: dict[str, Any] | None) -> bool:
    kind = "disabled" if thinking is None else thinking.get("type")
    if kind not in ("enabled", "adaptive", "disabled"):
        text = f"thinking.type is {str(kind)[:40]!r}; allowed: enabled, adaptive, disabled"
        raise ApiError(400, text, param="thinking.type")
    return kind != "disabled"


def _response_format(config: dict[str, Any] | None) -> ResponseFormat | None:
    wanted = (config or {}).get("format")
    if wanted is None:
        return None
    schema = wanted.get("schema") if isinstance(wanted, dict) else None
    if not isinstance(schema, dict) or wanted.get("type") != "json_schema":
        text = "output_config.format has to be of type json_schema, with a schema"
        raise ApiError(400, text, param="output_config.format")
    return ResponseFormat("json_schema", JsonSchemaFormat("output", schema))


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic's clients read it."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
             413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def encoded_error(error: ApiError) -> bytes:
    return msgspec.json.encode(error_body(error))
