"""Tools in a chat request: which are offered, which must be called, and the messages that speak of them.

Types are msgspec structs, see schema.py. Everything that cannot be honoured is refused by its name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

from gateway.http.errors import ApiError

MAX_TOOLS = 128
_NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)


class FunctionDefinition(Struct, omit_defaults=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct):
    type: str
    function: FunctionDefinition | None = None


class CalledFunction(Struct):
    name: str
    arguments: str | dict[str, Any] | None = None


class MessageToolCall(Struct):
    """A call that the assistant made earlier in the conversation."""

    id: str | None = None
    type: str | None = None
    function: CalledFunction | None = None


@dataclass(frozen=True)
class ChatTools:
    """What a request wants with tools."""

    functions: list[FunctionDefinition] = field(default_factory=list)
    """Those that may be called; empty if none may."""
    must_call: bool = False
    only_one: bool = False

    @property
    def for_template(self) -> list[dict[str, Any]] | None:
        """As chat templates read them."""
        if not self.functions:
            return None
        return [{"type": "function", "function": _described(function)} for function in self.functions]

    @property
    def has_strict(self) -> bool:
        return any(function.strict for function in self.functions)


def chat_tools(
    tools: list[Tool] | None, choice: str | dict[str, Any] | None, parallel: bool | None
) -> ChatTools:
    """Reads `tools`, `tool_choice` and `parallel_tool_calls`. Raises ApiError."""
    functions = _functions(tools or [])
    mode, names = _choice(choice, functions)
    if names is not None:
        functions = [function for function in functions if function.name in names]
    if mode == "none":
        return ChatTools()
    if mode != "auto" and not functions:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
    return ChatTools(functions, mode != "auto", parallel is False or mode == "named")


def template_tool_calls(calls: list[MessageToolCall], place: str) -> list[dict[str, Any]]:
    """The calls of an assistant's message as templates read them: with their arguments as an object. Raises
    ApiError."""
    found = []
    for number, call in enumerate(calls):
        if call.function is None:
            kind = call.type or "none"
            text = f"{place}[{number}] has type {kind!r}; allowed: function"
            raise ApiError(400, text, param=place, code="unsupported_parameter")
        arguments = call.function.arguments
        function = {
            "name": call.function.name,
            "arguments": _arguments(arguments) if isinstance(arguments, str) else arguments or {},
        }
        found.append({"id": call.id or f"call_{number}", "type": "function", "function": function})
    return found


def _arguments(text: str) -> Any:
    """What a string of arguments says; the string itself if it was cut off."""
    try:
        return msgspec.json.decode(text) if text.strip() else {}
    except (msgspec.DecodeError, RecursionError):
        return text


def _described(function: FunctionDefinition) -> dict[str, Any]:
    described: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        described["description"] = function.description
    described["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return described


def _functions(tools: list[Tool]) -> list[FunctionDefinition]:
    if len(tools) > MAX_TOOLS:
        raise ApiError(400, f"tools has {len(tools)} tools; allowed: up to {MAX_TOOLS}", param="tools")
    functions: list[FunctionDefinition] = []
    for number, tool in enumerate(tools):
        place = f"tools[{number}]"
        if tool.type != "function":
            text = f"{place}.type is {tool.type[:40]!r}; allowed: function"
            raise ApiError(400, text, param=f"{place}.type", code="unsupported_parameter")
        if tool.function is None:
            raise ApiError(400, f"{place}.function is missing", param=f"{place}.function")
        if not _NAME.fullmatch(tool.function.name):
            text = f"{place}.function.name is {tool.function.name[:40]!r}"
            allowed = "1 to 128 letters, digits and _ - . : /"
            raise ApiError(400, f"{text}; allowed: {allowed}", param=f"{place}.function.name")
        if any(tool.function.name == other.name for other in functions):
            text = f"{place}.function.name is {tool.function.name!r}, which another tool has, too"
            raise ApiError(400, text, param=f"{place}.function.name")
        functions.append(tool.function)
    return functions


def _choice(
    choice: str | dict[str, Any] | None, functions: list[FunctionDefinition]
) -> tuple[str, set[str] | None]:
    """`none`, `auto`, `required` or `named`, and the names that are left; None for all."""
    if choice is None:
        return "auto", None
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise _bad_choice(f"tool_choice is {choice[:40]!r}")
        return choice, None
    kind = choice.get("type")
    if kind == "function":
        name = _name(choice)
        return "named", {_known(name, functions)}
    if kind == "allowed_tools":
        wanted = choice.get("allowed_tools")
        if not isinstance(wanted, dict) or wanted.get("mode") not in ("auto", "required"):
            raise _bad_choice("tool_choice.allowed_tools has no mode (auto or required)")
        entries = wanted.get("tools")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise _bad_choice("tool_choice.allowed_tools has no list of tools")
        return wanted["mode"], {_known(_name(entry), functions) for entry in entries}
    raise _bad_choice(f"tool_choice.type is {str(kind)[:40]!r}")


def _name(entry: dict[str, Any]) -> str:
    function = entry.get("function")
    name = function.get("name") if isinstance(function, dict) else entry.get("name")
    if not isinstance(name, str):
        raise _bad_choice("tool_choice names no function")
    return name


def _known(name: str, functions: list[FunctionDefinition]) -> str:
    if all(function.name != name for function in functions):
        raise ApiError(400, f"tool_choice names {name[:40]!r}, which is not in tools", param="tool_choice")
    return name


def _bad_choice(problem: str) -> ApiError:
    allowed = "none, auto, required, a function by its name, or allowed_tools"
    return ApiError(400, f"{problem}; allowed: {allowed}", param="tool_choice", code="invalid_value")
