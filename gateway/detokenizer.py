"""From token ids back to text, one token at a time: incremental detokenizing and stop strings.

Used by the front for each running request. What is emitted is final: it never ends inside a character and
never contains (the beginning of) a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_HELD_TOKENS = 8
"""A character has at most four bytes; more tokens without a complete one are not going to make one."""


class Detokenizer(Protocol):
    """The text of one sequence. The pieces together are what decoding all its ids at once gives."""

    def push(self, token_id: int) -> str:
        """The text that is complete with this token; often empty for a part of a character."""
        ...

    def finish(self) -> str:
        """What was held back; an incomplete character becomes U+FFFD."""
        ...

    @property
    def is_holding(self) -> bool:
        """Whether a part of a character is held back."""
        ...


class ByteTable:
    """The bytes of each token of a byte-level BPE vocabulary (GPT-2's mapping of bytes to printable
    characters), looked up once a token id. Special tokens have none. Shared by all sequences."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = special_token_ids(tokenizer)
        self._bytes: dict[int, bytes] = {}
        self._byte_of = {character: byte for byte, character in enumerate(_byte_level_alphabet())}

    def name(self, token_id: int) -> bytes:
        """What a special token is called."""
        return str(self._tokenizer.id_to_token(token_id)).encode()

    def __getitem__(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._look_up(token_id)
        return found

    def _look_up(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes([self._byte_of[character] for character in token])
        except KeyError:  # an added token, which is plain text
            return token.encode()


_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class ByteLevelDetokenizer:
    """For byte-level BPE (SmolLM2, Llama 3, Qwen, GPT-2): one table look-up a token."""

    def __init__(self, table: ByteTable, shown: frozenset[int] = frozenset()) -> None:
        """`shown`: special tokens that have text."""
        self._table = table
        self._decoder = _Utf8Decoder("replace")
        self._shown = shown

    def push(self, token_id: int) -> str:
        if token_id in self._shown:
            return self._decoder.decode(self._table.name(token_id))
        return self._decoder.decode(self._table[token_id])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)

    @property
    def is_holding(self) -> bool:
        return bool(self._decoder.getstate()[0])


class WindowDetokenizer:
    """For every other kind of tokenizer: decodes a short window of tokens with and without the new one and
    takes the difference, since the text of a token may depend on its neighbours (spaces, byte fallback)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        special: frozenset[int],
        context: Sequence[int] = (),
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """`shown`: special tokens that have text. `context`: the tokens before the first one, of which the last few
        count. SentencePiece drops the space before the first word of a text: an answer that goes on with one has to
        keep it."""
        self._tokenizer = tokenizer
        self._special = special - shown
        self._window = self._context(context)
        self._text = self._decode(self._window)  # text of the window's tokens that is out
        self._emitted = len(self._window)  # tokens of the window whose text is out

    def push(self, token_id: int) -> str:
        if token_id in self._special or self._tokenizer.id_to_token(token_id) is None:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._emitted < MAX_HELD_TOKENS:
            return ""
        return self._emit(text)

    def finish(self) -> str:
        return self._emit(self._decode(self._window)) if self._window else ""

    @property
    def is_holding(self) -> bool:
        return len(self._window) > self._emitted

    def _context(self, token_ids: Sequence[int]) -> list[int]:
        """The last tokens of these that begin and end with whole characters; none if they end inside one."""
        for length in range(MAX_HELD_TOKENS, 0, -1):
            window = [token_id for token_id in token_ids[-length:] if token_id not in self._special]
            if REPLACEMENT not in self._decode(window):
                return window
        return []

    def _emit(self, text: str) -> str:
        new = text[len(self._text) :]
        # The tokens just emitted stay as context of the next ones; those before them have done their work.
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        self._text = self._decode(self._window)
        return new

    def _decode(self, token_ids: list[int]) -> str:
        """The special tokens among them are those that are shown."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))


class StopStrings:
    """Finds stop strings in a stream of text, wherever the stream is cut into pieces.

    The match that is complete first wins (of those that end together, the longest), so that the outcome does
    not depend on how the text arrives. The text from the beginning of the match on is never given out.
    """

    def __init__(self, stops: Sequence[str], shows_match: bool = False) -> None:
        """`shows_match`: the text ends with the match."""
        self._shows_match = shows_match
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that is certainly no part of a stop string. Nothing after a match."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, start, self.matched = min(ends)
            self._held = ""
            return text[: start + len(self.matched)] if self._shows_match else text[:start]
        keep = next(
            (
                length
                for length in range(min(self._longest - 1, len(text)), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stops)
            ),
            0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back in the hope of a match."""
        held, self._held = self._held, ""
        return held


HELD = -1
"""In a trace: the token's text ends with a character that is not complete yet."""


class TextStream:
    """The text of one request as it grows: detokenizer, then stop strings."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = (), shows_stop: bool = False) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops, shows_stop)
        self._trace: list[int] | None = None
        self._num_characters = 0

    @property
    def matched_stop(self) -> str | None:
        return self._stops.matched

    def push(self, token_id: int) -> str:
        """The text that this token settles."""
        text = self._detokenizer.push(token_id)
        if self._trace is not None:
            self._num_characters += len(text)
            self._trace.append(HELD if self._detokenizer.is_holding else self._num_characters)
        return self._stops.push(text)

    def finish(self) -> str:
        """The text held back, at the end of the request. A stop string may still be found in it."""
        return self._stops.push(self._detokenizer.finish()) + self._stops.finish()

    def start_trace(self) -> None:
        """From now on `take_trace` says where the text of each token ends; costs a little for each token."""
        self._trace = []

    def take_trace(self) -> list[int]:
        """For each token pushed since the last call: the characters of text up to its end, or HELD. Text that the
        stop strings hold back counts."""
        trace, self._trace = self._trace, []
        return trace or []


def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that never appear in text."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)


def _byte_level_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2, encoder.py)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    alphabet, shifted = [], 256
    for byte in range(256):
        if byte in printable:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(shifted))
            shifted += 1
    return alphabet
