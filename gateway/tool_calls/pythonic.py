"""The parser of the formats that write calls as Python does: `[f(a=1), g(b="x")]` (Llama 4, some of Llama 3.2), and
in a block of the language `tool_code` (Gemma).

Each call is handed out when it is complete. Nothing is evaluated: literals are turned into JSON, which must be valid.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from gateway.tool_calls.pieces import MAX_NAME_CHARACTERS, ContentWriter, Kind, MarkerFinder, Piece, slices

_LEXEME = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
    r"""|(?P<number>-?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)|(?P<word>[^\W\d]\w*)|(?P<mark>[\[\](){},:=]))""",
    re.DOTALL,
)
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_EQUALS = re.compile(r"\s*=")
_NAME = re.compile(r"[^\W\d][\w.-]*")


class PythonicParser:
    """Calls between `open` and `close`, with `is_bare` also a list of them at the very beginning."""

    def __init__(
        self, opens: tuple[str, ...], close: str, *, known: Collection[str], is_bare: bool = False
    ) -> None:
        """`known`: the names of the functions; only these make a call that has no marker."""
        self._finder = MarkerFinder(opens)
        self._opens = opens
        self._close = close
        self._known = known
        self._is_bare = is_bare
        self._content = ContentWriter()
        self._held = ""
        self._in_calls = False
        self._has_marker = False
        self._raw: list[str] = []
        """Read since the marker, or since the last call, and not handed out."""
        self._depth = 0
        self._quote = ""
        self._escaped = False
        self._call: list[str] = []
        self._num_calls = 0
        self._has_called = False

    def feed(self, text: str, out: list[Piece]) -> None:
        for part in slices(text):
            rest = part
            while rest:
                rest = self._read_calls(rest, out) if self._in_calls else self._read_text(rest, out)

    def finish(self, out: list[Piece]) -> None:
        if self._in_calls:
            if self._call or not self._has_called:
                self._content.write("".join(self._raw), out)
        else:
            self._content.write(self._held, out)
        self._content.finish(out)

    def _read_text(self, text: str, out: list[Piece]) -> str:
        text, self._held = self._held + text, ""
        if self._is_bare and not self._content.has_text:
            stripped = text.lstrip()
            if stripped.startswith("["):
                self._enter(text[: len(text) - len(stripped) + 1], has_marker=False)
                return stripped[1:]
            if stripped:
                longest = max(map(len, self._opens), default=0)
                self._is_bare = bool(self._opens) and self._finder.may_become(stripped[:longest])
        start, end, found = self._finder.find(text, 0)
        self._content.write(text[:start], out)
        if not found:
            self._held = text[start:]
            return ""
        self._enter(text[start:end], has_marker=True)
        return text[end:]

    def _enter(self, raw: str, *, has_marker: bool) -> None:
        self._in_calls, self._has_marker, self._has_called = True, has_marker, False
        self._raw, self._call = [raw], []

    def _leave(self, out: list[Piece], more: str = "") -> None:
        self._in_calls, self._is_bare = False, False
        raw = "".join(self._raw) if self._call or not self._has_called else more
        self._content.write(raw, out)
        self._raw, self._call = [], []

    def _read_calls(self, text: str, out: list[Piece]) -> str:
        """Reads one call, or what is between them; what is left of the text."""
        for at, character in enumerate(text):
            self._raw.append(character)
            if not self._call:
                tail = "".join(self._raw[-len(self._close) :]) if self._close else ""
                if self._close and tail == self._close:
                    self._leave(out)
                    return text[at + 1 :]
                if character.isalpha() or character == "_":
                    self._call, self._depth, self._quote = [character], 0, ""
                elif character == "]" and self._has_called and not self._has_marker:
                    self._leave(out)
                    return text[at + 1 :]
                elif character not in " \t\r\n[],`":
                    self._leave(out, character)
                    return text[at + 1 :]
                continue
            self._call.append(character)
            if self._quote:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == self._quote:
                    self._quote = ""
            elif self._depth == 0 and not (character.isalnum() or character in "_.-("):
                self._leave(out)
                return text[at + 1 :]
            elif character in "\"'":
                self._quote = character
            elif character in "([{":
                self._depth += 1
            elif character in ")]}":
                self._depth -= 1
                if self._depth == 0 and not self._end_call(out):
                    self._leave(out)
                    return text[at + 1 :]
        return ""

    def _end_call(self, out: list[Piece]) -> bool:
        """Hands the call out; False if it is none."""
        name, _, inner = "".join(self._call).partition("(")
        arguments = json_arguments(inner[:-1])
        ok = _NAME.fullmatch(name) and len(name) <= MAX_NAME_CHARACTERS and arguments is not None
        if not ok or not (self._has_marker or name in self._known):
            return False
        assert arguments is not None
        out.append(Piece(Kind.CALL, name, self._num_calls))
        out.append(Piece(Kind.ARGUMENTS, arguments, self._num_calls))
        self._num_calls += 1
        self._has_called = True
        self._content.drop_spaces()
        self._raw, self._call = [], []
        return True


def json_arguments(text: str) -> str | None:
    """`a=1, b='x'` as a JSON object; None if it is no list of named literals."""
    parts: list[str] = []
    at, depth, end = 0, 0, len(text.rstrip())
    while at < end:
        found = _LEXEME.match(text, at, end)
        if found is None:
            return None
        at = found.end()
        kind, lexeme = found.lastgroup, found.group(found.lastgroup or 0)
        if kind == "string":
            parts.append(json.dumps(_unquoted(lexeme), ensure_ascii=False))
        elif kind == "number":
            parts.append(lexeme + "0" if lexeme.endswith(".") else lexeme)
        elif kind == "word":
            if depth == 0 and _EQUALS.match(text, at, end):
                parts.append(json.dumps(lexeme))
            elif lexeme in _WORDS:
                parts.append(_WORDS[lexeme])
            else:
                return None
        else:
            if lexeme in ")]}" and parts and parts[-1] == ",":
                parts.pop()
            depth += (lexeme in "([{") - (lexeme in ")]}")
            parts.append({"(": "[", ")": "]", "=": ":"}.get(lexeme, lexeme))
    if parts and parts[-1] == ",":
        parts.pop()
    written = "{" + "".join(part + " " if part in ":," else part for part in parts) + "}"
    try:
        return written if isinstance(json.loads(written), dict) else None
    except (ValueError, RecursionError):
        return None


def _unquoted(lexeme: str) -> str:
    def plain(found: re.Match[str]) -> str:
        code = found[1] or found[2]
        return chr(int(code, 16)) if code else _CONTROLS.get(found[3], found[3])

    return _ESCAPE.sub(plain, lexeme[1:-1])
