"""The parser of the formats that write calls as JSON: Hermes and Qwen, Llama 3, Mistral, Phi-4, Granite.

Made by formats.py with the markers of a format. Text that only looks like a call becomes content, as it was written.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from enum import Enum

from gateway.tool_calls.json_call import JsonCall, State
from gateway.tool_calls.pieces import MAX_NAME_CHARACTERS, ContentWriter, Kind, MarkerFinder, Piece, slices

_BETWEEN_CALLS = " \t\r\n[],;"
_NAMED_CALL = re.compile(r"\s*([\w.:/-]+)\s*(\[CALL_ID\]\w*)?(\[ARGS\])?\s*", re.ASCII)


class _Place(Enum):
    TEXT = 0
    BETWEEN = 1
    """Behind a marker, or behind a call."""
    CALL = 2
    NAME = 3


class JsonCallsParser:
    """Calls between `opens` and `closes`; with `is_bare` also at the very beginning without a marker; with
    `takes_names` also as a name and its arguments: `name{...}`, `name[ARGS]{...}`."""

    def __init__(
        self,
        opens: tuple[str, ...],
        closes: tuple[str, ...] = (),
        *,
        known: Collection[str],
        is_bare: bool = False,
        takes_names: bool = False,
    ) -> None:
        """`known`: the names of the functions; only these make a call that has no marker."""
        self._opens, self._closes = opens, closes
        self._finder = MarkerFinder(opens)
        self._tags = (*opens, *closes)
        self._known = known
        self._is_bare, self._takes_names = is_bare, takes_names
        self._place = _Place.TEXT
        self._content = ContentWriter()
        self._held = ""
        """The beginning of what may be a marker, or a name."""
        self._raw = ""
        """What has been read behind the last marker, and the marker: content if no call comes of it."""
        self._has_marker = False
        self._has_called = False
        """Since the last marker."""
        self._call: JsonCall | None = None
        self._num_calls = 0

    def feed(self, text: str, out: list[Piece]) -> None:
        for part in slices(text):
            rest: str | None = part
            while rest:
                rest = self._step(rest, out)

    def finish(self, out: list[Piece]) -> None:
        if self._call is not None:
            self._call.finish()
            if self._call.state is State.BAD:
                self._content.write(self._raw + self._call.raw, out)
        elif self._place is not _Place.BETWEEN or not self._has_called:
            self._content.write(self._raw + self._held, out)
        self._content.finish(out)

    def _step(self, text: str, out: list[Piece]) -> str:
        """Reads some of the text; what is left of it."""
        if self._place is _Place.CALL:
            return self._read_call(text, out)
        text, self._held = self._held + text, ""
        if self._place is _Place.TEXT:
            return self._read_text(text, out)
        if self._place is _Place.NAME:
            return self._read_name(text, out)
        return self._read_between(text, out)

    def _read_text(self, text: str, out: list[Piece]) -> str:
        if self._is_bare and not self._content.has_text:
            stripped = text.lstrip()
            if stripped[:1] in ("{", "["):
                self._enter(text[: len(text) - len(stripped)], has_marker=False)
                return stripped
            if stripped:
                self._is_bare = self._finder.may_become(stripped[: max(map(len, self._opens))])
        start, end, found = self._finder.find(text, 0)
        self._content.write(text[:start], out)
        if not found:
            self._held = text[start:]
            return ""
        self._enter(text[start:end], has_marker=True)
        return text[end:]

    def _enter(self, raw: str, *, has_marker: bool) -> None:
        self._place, self._raw = _Place.BETWEEN, raw
        self._has_marker, self._has_called = has_marker, False

    def _leave(self, out: list[Piece], more: str = "") -> None:
        """Back to text; what was read behind the marker without a call is content."""
        self._place, self._is_bare = _Place.TEXT, False
        self._content.write(self._raw + more, out)
        self._raw = ""

    def _read_between(self, text: str, out: list[Piece]) -> str:
        for at, character in enumerate(text):
            rest = text[at:]
            if any(tag.startswith(character) for tag in self._tags):
                tag = next((tag for tag in self._tags if rest.startswith(tag)), None)
                if tag is not None:
                    return self._read_tag(tag, text[:at], rest, out)
                if any(tag.startswith(rest) for tag in self._tags):
                    self._raw += self._unless_called(text[:at])
                    self._held = rest
                    return ""
            if character in _BETWEEN_CALLS:
                continue
            if character == "{":
                self._raw += self._unless_called(text[:at])
                self._begin(JsonCall(self._num_calls, None if self._has_marker else self._known))
                return rest
            self._raw += self._unless_called(text[:at])
            if self._takes_names and self._has_marker:
                self._place = _Place.NAME
            else:
                self._leave(out)
            return rest
        self._raw += self._unless_called(text)
        return ""

    def _unless_called(self, text: str) -> str:
        """What stands between calls is lost; before the first it may turn out to be content."""
        return "" if self._has_called else text

    def _read_tag(self, tag: str, before: str, rest: str, out: list[Piece]) -> str:
        if tag in self._closes:
            self._leave(out, self._unless_called(before + tag))
        else:
            self._content.write(self._raw + self._unless_called(before), out)
            self._enter(tag, has_marker=True)
        return rest[len(tag) :]

    def _read_name(self, text: str, out: list[Piece]) -> str:
        end = text.find("{")
        if 0 <= end <= 2 * MAX_NAME_CHARACTERS:
            found = _NAMED_CALL.fullmatch(text, 0, end)
            if found is not None and len(found[1]) <= MAX_NAME_CHARACTERS:
                call = JsonCall(self._num_calls, name=found[1])
                self._begin(call)
                self._began(call)
                out.append(Piece(Kind.CALL, found[1], self._num_calls - 1))
                return text[end:]
        elif end < 0 and len(text) <= 2 * MAX_NAME_CHARACTERS:
            self._held = text
            return ""
        self._leave(out)
        return text

    def _begin(self, call: JsonCall) -> None:
        self._place, self._call = _Place.CALL, call

    def _began(self, call: JsonCall) -> None:
        """It is certain to be a call."""
        self._num_calls += 1
        self._raw, self._has_called = "", True
        self._content.drop_spaces()

    def _read_call(self, text: str, out: list[Piece]) -> str:
        call = self._call
        assert call is not None
        had_begun = call.has_begun
        at = call.feed(text, 0, out)
        if call.has_begun and not had_begun:
            self._began(call)
        if call.ended:
            self._call = None
            self._place = _Place.BETWEEN
            if call.state is State.BAD:
                self._leave(out, call.raw)
        return text[at:]
