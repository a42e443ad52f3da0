"""What the text of an answer is made of, and what all parsers of tool calls have in common.

A parser is fed the text as it comes and hands out pieces. What it has handed out after some text depends on that text
alone, never on how it was cut: a stream that is taken up again, on another front, goes on exactly where it was.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Protocol

SLICE_CHARACTERS = 4096
"""Parsers look at so much at a time: what they put back to be read again is never long."""
MAX_NAME_CHARACTERS = 256


class Kind(Enum):
    """What a piece adds to."""

    REASONING = "reasoning"
    CONTENT = "content"
    CALL = "call"
    ARGUMENTS = "arguments"


class Piece(NamedTuple):
    """Some text of one part of an answer."""

    kind: Kind
    text: str
    """Of a CALL, with which a tool call begins, the name of its function."""
    call: int = -1
    """Which tool call it belongs to, counted from 0."""


class ToolParser(Protocol):
    """Finds the tool calls in the text of one answer."""

    def feed(self, text: str, out: list[Piece]) -> None:
        """More text; what is certain of it is appended to `out`."""

    def finish(self, out: list[Piece]) -> None:
        """The text has ended: what was held back comes out, a call that was cut off stays one."""


class ContentWriter:
    """The content around tool calls: spaces between it and a call belong to nobody."""

    def __init__(self, kind: Kind = Kind.CONTENT, *, skips_first_spaces: bool = False) -> None:
        self._kind = kind
        self._spaces: list[str] = []
        self._skips_spaces = skips_first_spaces
        self.has_text = False

    def write(self, text: str, out: list[Piece]) -> None:
        if self._skips_spaces:
            text = text.lstrip()
        if not text:
            return
        self._skips_spaces = False
        solid = text.rstrip()
        if solid:
            self.has_text = True
            out.append(Piece(self._kind, "".join(self._spaces) + solid))
            self._spaces = []
        if len(solid) < len(text):
            self._spaces.append(text[len(solid) :])

    def drop_spaces(self) -> None:
        """A call stands here."""
        self._spaces = []
        self._skips_spaces = True

    def finish(self, out: list[Piece]) -> None:
        if self._spaces:
            out.append(Piece(self._kind, "".join(self._spaces)))
            self._spaces = []


class MarkerFinder:
    """Finds the first of some markers in text that comes in parts."""

    def __init__(self, markers: Sequence[str]) -> None:
        """None may be the beginning of another."""
        for one in markers:
            assert not any(other.startswith(one) for other in markers if other != one), markers
        self._markers = markers
        self._pattern = re.compile("|".join(map(re.escape, markers))) if markers else None
        self._longest = max(map(len, markers), default=0)

    def find(self, text: str, start: int) -> tuple[int, int, bool]:
        """Where text before a marker ends, where the marker ends, and whether there is one. Without a marker both
        are where something begins that may become one."""
        found = self._pattern.search(text, start) if self._pattern is not None else None
        if found is not None:
            return found.start(), found.end(), True
        for length in range(min(self._longest - 1, len(text) - start), 0, -1):
            if self.may_become(text[len(text) - length :]):
                return len(text) - length, len(text) - length, False
        return len(text), len(text), False

    def may_become(self, text: str) -> bool:
        return any(marker.startswith(text) for marker in self._markers)


def slices(text: str) -> Sequence[str]:
    """The text in parts that are not long."""
    if len(text) <= SLICE_CHARACTERS:
        return (text,)
    return [text[at : at + SLICE_CHARACTERS] for at in range(0, len(text), SLICE_CHARACTERS)]
