"""One tool call as a JSON object, read while it is being written: the name first, then each part of its arguments.

Used by the parsers of the formats that write calls so. It checks no more of the JSON than where its parts end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import Enum

from gateway.tool_calls.pieces import MAX_NAME_CHARACTERS, Kind, Piece

_BRACKET_OR_STRING = re.compile(r'["{}\[\]]')
_END_OF_STRING = re.compile(r'["\\]')
_SPACES = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


class State(Enum):
    OPEN = 0
    KEY = 1
    IN_KEY = 2
    COLON = 3
    VALUE = 4
    IN_VALUE = 5
    AFTER_VALUE = 6
    DONE = 7
    BAD = 8
    """It is no call; nothing of it has been handed out, and `raw` is its text."""


class JsonCall:
    """`{"name": ..., "arguments": {...}}`, in any order, with `parameters` for `arguments`, and whatever else."""

    def __init__(self, number: int, known: Collection[str] | None = None, name: str | None = None) -> None:
        """`number`: of the call. `known`: the only names that make a call. With `name` what comes is the arguments
        alone, `{...}`."""
        self.state = State.OPEN
        self.has_begun = False
        self._number = number
        self._known = known
        self._only_arguments = name is not None
        self._raw: list[str] = []
        self._key: list[str] = []
        self._value: list[str] = []
        self._value_kind = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._streams = False
        self._pending: str | None = None
        self._has_arguments = False
        if name is not None:
            self.state, self.has_begun, self._key = State.VALUE, True, ['"arguments"']

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    @property
    def ended(self) -> bool:
        return self.state in (State.DONE, State.BAD)

    def feed(self, text: str, start: int, out: list[Piece]) -> int:
        """Reads on at `start`; where it stopped."""
        at = start
        while at < len(text) and not self.ended:
            if self.state is State.IN_VALUE:
                at = self._read_value(text, at, out)
            elif self.state is State.IN_KEY:
                at = self._read_key(text, at)
            elif text[at] in _SPACES:
                at += 1
            else:
                at = self._read_structure(text[at], at, out)
        if not self.has_begun or self.state is State.BAD:
            self._raw.append(text[start:at])
        else:
            self._raw = []
        return at

    def finish(self) -> None:
        """The text has ended within it."""
        if not self.ended and not self.has_begun:
            self.state = State.BAD

    def _read_structure(self, character: str, at: int, out: list[Piece]) -> int:
        """One character between the parts; where to go on."""
        state = self.state
        if state is State.OPEN and character == "{":
            self.state = State.KEY
        elif state is State.KEY and character == '"':
            self.state, self._key, self._escaped = State.IN_KEY, [character], False
        elif state is State.COLON and character == ":":
            self.state = State.VALUE
        elif state is State.VALUE and (not self._only_arguments or character == "{"):
            self._begin_value(character)
            return at
        elif state is State.AFTER_VALUE and character == ",":
            self.state = State.KEY
        elif state in (State.KEY, State.AFTER_VALUE) and character == "}":
            self._end(out)
        elif self.has_begun:
            self.state = State.DONE  # broken behind its name: what was handed out stays a call
            return at
        else:
            self.state = State.BAD
            return at
        return at + 1

    def _read_key(self, text: str, at: int) -> int:
        end, closed = self._string_end(text, at)
        self._key.append(text[at:end])
        if closed:
            self.state = State.COLON
        return end

    def _string_end(self, text: str, at: int) -> tuple[int, bool]:
        """Where the string that is open at `at` ends, or the text does."""
        if self._escaped:
            self._escaped = False
            return at + 1, False
        found = _END_OF_STRING.search(text, at)
        if found is None:
            return len(text), False
        self._escaped = found.group() == "\\"
        return found.end(), not self._escaped

    def _begin_value(self, character: str) -> None:
        self.state, self._value = State.IN_VALUE, []
        self._depth, self._in_string, self._escaped = 0, False, False
        self._value_kind = character if character in '{["' else "plain"
        is_arguments = _decoded("".join(self._key)) in _ARGUMENTS
        self._streams = is_arguments and self.has_begun and character in "{[" and not self._has_arguments

    def _read_value(self, text: str, start: int, out: list[Piece]) -> int:
        at, complete = start, False
        while at < len(text) and not complete:
            if self._in_string:
                at, closed = self._string_end(text, at)
                self._in_string = not closed
                complete = closed and self._depth == 0
            elif self._value_kind == "plain":
                complete = text[at] in ",}" or text[at] in _SPACES
                at += not complete
            else:
                found = _BRACKET_OR_STRING.search(text, at)
                if found is None:
                    at = len(text)
                    break
                at, character = found.end(), found.group()
                if character == '"':
                    self._in_string = True
                else:
                    self._depth += 1 if character in "{[" else -1
                    complete = self._depth <= 0
        if at > start:
            if self._streams:
                out.append(Piece(Kind.ARGUMENTS, text[start:at], self._number))
            else:
                self._value.append(text[start:at])
        if complete:
            self._end_value(out)
        return at

    def _end_value(self, out: list[Piece]) -> None:
        self.state = State.DONE if self._only_arguments else State.AFTER_VALUE
        key, value = _decoded("".join(self._key)), "".join(self._value)
        if key == "name" and not self.has_begun:
            name = _decoded(value)
            ok = isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARACTERS
            if not ok or (self._known is not None and name not in self._known):
                self.state = State.BAD
                return
            self.has_begun = True
            out.append(Piece(Kind.CALL, str(name), self._number))
            if self._pending is not None:
                out.append(Piece(Kind.ARGUMENTS, self._pending, self._number))
        elif key in _ARGUMENTS and not self._has_arguments:
            self._has_arguments = True
            if self._streams:
                return
            if self._value_kind == '"':  # arguments as OpenAI writes them
                inner = _decoded(value)
                value = inner if isinstance(inner, str) else value
            elif value == "null":
                value = "{}"
            if self.has_begun:
                out.append(Piece(Kind.ARGUMENTS, value, self._number))
            else:
                self._pending = value

    def _end(self, out: list[Piece]) -> None:
        if not self.has_begun:
            self.state = State.BAD
            return
        self.state = State.DONE
        if not self._has_arguments:
            out.append(Piece(Kind.ARGUMENTS, "{}", self._number))


def _decoded(text: str) -> object:
    """What a piece of JSON stands for; None if it is none."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
