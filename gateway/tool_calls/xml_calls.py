"""The parser of Qwen3-Coder: `<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>`.

A value is text; what type it has, the function's schema says. Each parameter is handed out when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

from gateway.tool_calls.pieces import MAX_NAME_CHARACTERS, ContentWriter, Kind, MarkerFinder, Piece, slices

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"


class _Place(Enum):
    TEXT = 0
    BEFORE_FUNCTION = 1
    IN_FUNCTION = 2
    IN_VALUE = 3


class XmlCallsParser:
    """With `types`: of each function, of each parameter, its type in the schema."""

    def __init__(self, types: Mapping[str, Mapping[str, str]]) -> None:
        self._types = types
        self._texts = MarkerFinder((_OPEN, _FUNCTION))
        self._values = MarkerFinder((_END_PARAMETER,))
        self._content = ContentWriter()
        self._place = _Place.TEXT
        self._held = ""
        self._raw = ""
        """The marker, and what has been read behind it, as long as there is no call."""
        self._has_called = False
        self._name = ""
        self._key = ""
        self._value: list[str] = []
        self._num_parameters = 0
        self._num_calls = 0

    def feed(self, text: str, out: list[Piece]) -> None:
        for part in slices(text):
            rest = part
            while rest:
                text, self._held = self._held + rest, ""
                rest = self._step(text, out)

    def finish(self, out: list[Piece]) -> None:
        if self._place is _Place.TEXT or (self._place is _Place.BEFORE_FUNCTION and not self._has_called):
            self._content.write(self._raw + self._held, out)
        self._content.finish(out)

    def _step(self, text: str, out: list[Piece]) -> str:
        if self._place is _Place.TEXT:
            start, end, found = self._texts.find(text, 0)
            self._content.write(text[:start], out)
            if not found:
                self._held = text[start:]
                return ""
            self._place, self._has_called = _Place.BEFORE_FUNCTION, False
            if text[start:end] == _FUNCTION:
                return text[start:]
            self._raw = text[start:end]
            return text[end:]
        if self._place is _Place.IN_VALUE:
            start, end, found = self._values.find(text, 0)
            self._value.append(text[:start])
            if not found:
                self._held = text[start:]
                return ""
            self._end_parameter(out)
            return text[end:]
        return self._read_tags(text, out)

    def _read_tags(self, text: str, out: list[Piece]) -> str:
        """Between the parts: spaces, and one tag."""
        in_function = self._place is _Place.IN_FUNCTION
        start = len(text) - len(text.lstrip())
        if not in_function and not self._has_called:
            self._raw += text[:start]
        rest = text[start:]
        opening, closing = (_PARAMETER, _END_FUNCTION) if in_function else (_FUNCTION, _CLOSE)
        if rest.startswith(closing):
            if in_function:
                self._end_function(out)
            else:
                self._leave(out, closing)
            return rest[len(closing) :]
        if rest.startswith(opening):
            end = rest.find(">", 0, MAX_NAME_CHARACTERS + 20)
            if end > len(opening):
                self._begin(rest[len(opening) : end].strip(), in_function, out)
                return rest[end + 1 :]
            may_go_on = end < 0 and len(rest) < MAX_NAME_CHARACTERS + 20
        else:
            may_go_on = opening.startswith(rest) or closing.startswith(rest)
        if may_go_on:
            self._held = rest
            return ""
        if in_function:
            self._end_function(out)  # broken behind its name: what was handed out stays a call
        self._leave(out)
        # Its first character, so that the same tag does not come again.
        self._content.write(rest[:1], out)
        return rest[1:]

    def _begin(self, name: str, in_function: bool, out: list[Piece]) -> None:
        if in_function:
            self._place, self._key, self._value = _Place.IN_VALUE, name, []
            return
        self._place, self._name, self._num_parameters = _Place.IN_FUNCTION, name, 0
        self._has_called, self._raw = True, ""
        self._content.drop_spaces()
        out.append(Piece(Kind.CALL, name, self._num_calls))

    def _end_parameter(self, out: list[Piece]) -> None:
        self._place = _Place.IN_FUNCTION
        value = _trimmed("".join(self._value))
        kind = self._types.get(self._name, {}).get(self._key, "string")
        written = f"{json.dumps(self._key, ensure_ascii=False)}: {_as_json(value, kind)}"
        out.append(Piece(Kind.ARGUMENTS, (", " if self._num_parameters else "{") + written, self._num_calls))
        self._num_parameters += 1

    def _end_function(self, out: list[Piece]) -> None:
        self._place = _Place.BEFORE_FUNCTION
        out.append(Piece(Kind.ARGUMENTS, "}" if self._num_parameters else "{}", self._num_calls))
        self._num_calls += 1

    def _leave(self, out: list[Piece], more: str = "") -> None:
        self._place = _Place.TEXT
        if not self._has_called:
            self._content.write(self._raw + more, out)
        self._raw = ""


def parameter_types(parameters: Mapping[str, Any]) -> dict[str, str]:
    """The type of each parameter in a function's schema, where it says one."""
    properties = parameters.get("properties")
    if not isinstance(properties, dict):
        return {}
    types = {}
    for name, schema in properties.items():
        kind = schema.get("type") if isinstance(schema, dict) else None
        if isinstance(kind, list):
            kind = next((one for one in kind if one != "null"), None)
        types[name] = (
            kind if isinstance(kind, str) else "string" if kind is None and _is_text(schema) else "any"
        )
    return types


def _is_text(schema: Any) -> bool:
    return isinstance(schema, dict) and all(isinstance(value, str) for value in schema.get("enum", [None]))


def _trimmed(value: str) -> str:
    """Without the line ends next to the tags."""
    value = value.removeprefix("\n")
    return value.removesuffix("\n")


def _as_json(value: str, kind: str) -> str:
    if kind == "string":
        return json.dumps(value, ensure_ascii=False)
    lowered = value.strip()
    if lowered in ("True", "False", "None"):
        return {"True": "true", "False": "false", "None": "null"}[lowered]
    try:
        json.loads(lowered, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(value, ensure_ascii=False)
    return lowered.replace("\n", " ")


def _refuse(constant: str) -> None:
    raise ValueError(constant)
