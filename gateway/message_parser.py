"""The parts of an answer: thoughts, then content and tool calls, found in its text as it comes.

One for each answer that a client reads, made by the HTTP answers. What it has said after some text depends on that
text alone, so that a stream can be taken up anywhere, after the death of a rank or of a front.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.reasoning import REASONING_FORMATS
from gateway.tool_calls.formats import FORMATS
from gateway.tool_calls.pieces import ContentWriter, Kind, MarkerFinder, Piece, ToolParser

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

MAX_SPACES = 256
"""Before the marker that opens thoughts; behind more of them it is content."""


@dataclass
class Parsing:
    """What is to be found in an answer. Kept in the journal."""

    tool_format: str | None = None
    """A name in FORMATS; None if there are no tools to call."""
    tools: dict[str, dict[str, str]] = field(default_factory=dict)
    """The functions, and the types of their parameters."""
    only_one_call: bool = False
    reasoning: str | None = None
    """A name in REASONING_FORMATS; None for a model that does not think aloud."""
    is_thinking: bool = False
    """The answer begins within thoughts."""
    shows_reasoning: bool = True

    @property
    def is_needed(self) -> bool:
        return self.tool_format is not None or self.reasoning is not None

    def call_id(self, answer_id: str, choice: int, call: int) -> str:
        """The id of a tool call: the same whoever reads it, and whenever."""
        form = FORMATS[self.tool_format or "hermes"]
        digest = hashlib.blake2b(f"{answer_id}/{choice}/{call}".encode(), digest_size=24).digest()
        return form.id_prefix + "".join(_DIGITS[byte % len(_DIGITS)] for byte in digest[: form.id_length])


class MessageParser:
    """Reads one answer."""

    def __init__(self, parsing: Parsing) -> None:
        self._parsing = parsing
        self._reasoning = _ReasoningParser(parsing)
        self._body = _body_parser(parsing)
        self.num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """More text; what is certain of it."""
        out: list[Piece] = []
        rest = self._reasoning.feed(text, out) if self._reasoning.is_running else text
        if rest:
            self._feed_body(rest, out)
        return self._shown(out)

    def finish(self) -> list[Piece]:
        """The text has ended."""
        out: list[Piece] = []
        if self._reasoning.is_running:
            rest = self._reasoning.finish(out)
            if rest:
                self._feed_body(rest, out)
        self._body.finish(out)
        return self._shown(out)

    def _feed_body(self, text: str, out: list[Piece]) -> None:
        if self._reasoning.has_thought:
            self._reasoning.has_thought = False
            text = text.lstrip()
            if not text:  # the space between the thoughts and the answer is in neither
                self._reasoning.has_thought = True
                return
        self._body.feed(text, out)

    def _shown(self, out: list[Piece]) -> list[Piece]:
        parsing = self._parsing
        if out:
            if parsing.only_one_call:
                out = [piece for piece in out if piece.call <= 0]
            if not parsing.shows_reasoning:
                out = [piece for piece in out if piece.kind is not Kind.REASONING]
            self.num_calls += sum(piece.kind is Kind.CALL for piece in out)
        return out


class _PlainParser:
    """For an answer without tools: all of it is content."""

    def feed(self, text: str, out: list[Piece]) -> None:
        out.append(Piece(Kind.CONTENT, text))

    def finish(self, out: list[Piece]) -> None:
        pass


class _ReasoningParser:
    """The thoughts before an answer."""

    def __init__(self, parsing: Parsing) -> None:
        self.is_running = parsing.reasoning is not None
        self.has_thought = False
        form = REASONING_FORMATS[parsing.reasoning or "think"]
        self._opening = form.opening
        self._finder = MarkerFinder((form.closing,))
        self._writer = ContentWriter(Kind.REASONING, skips_first_spaces=True)
        self._is_thinking = parsing.is_thinking
        self._may_open = True
        self._held = ""

    def feed(self, text: str, out: list[Piece]) -> str:
        """What is behind the thoughts."""
        text, self._held = self._held + text, ""
        if self._may_open:
            stripped = text.lstrip()
            is_far = len(text) - len(stripped) > MAX_SPACES
            if not is_far and len(stripped) < len(self._opening) and self._opening.startswith(stripped):
                self._held = text
                return ""
            self._may_open = False
            if not is_far and stripped.startswith(self._opening):
                self._is_thinking = True
                text = stripped[len(self._opening) :]
            elif not self._is_thinking:
                self.is_running = False
                return text
        start, end, found = self._finder.find(text, 0)
        self._writer.write(text[:start], out)
        if not found:
            self._held = text[start:]
            return ""
        self.is_running, self.has_thought = False, True
        return text[end:]

    def finish(self, out: list[Piece]) -> str:
        """What turns out to be no thought."""
        self.is_running = False
        if not self._is_thinking:
            return self._held
        self._writer.write(self._held, out)
        self._writer.finish(out)
        return ""


def _body_parser(parsing: Parsing) -> ToolParser:
    if parsing.tool_format is None:
        return _PlainParser()
    types: Mapping[str, Mapping[str, str]] = parsing.tools
    return FORMATS[parsing.tool_format].make_parser(types)
