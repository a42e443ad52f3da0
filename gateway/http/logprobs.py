"""Log-probabilities as OpenAI's clients read them, and which of them belong to which piece of text.

Used by the streams and the answers of the OpenAI endpoints, only for requests that ask for log-probabilities.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from gateway.detokenizer import HELD, TextStream
from gateway.protocol import Output, TokenLogprobs
from gateway.text import TextModel

LOWEST = -9999.0
"""JSON has no minus infinity; OpenAI's and vLLM's number for it."""


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Struct):
    """Of one token of a chat answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[ChatLogprob]
    refusal: None = None


class TextLogprobs(Struct):
    """Of the tokens of a completion: four lists of one length. The first token of an echoed prompt has none."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]

    def __add__(self, more: TextLogprobs) -> TextLogprobs:
        return TextLogprobs(
            self.text_offset + more.text_offset,
            self.token_logprobs + more.token_logprobs,
            self.tokens + more.tokens,
            self.top_logprobs + more.top_logprobs,
        )


class PromptLogprob(Struct):
    """vLLM's entry for one token at one position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


@dataclass(slots=True)
class Placed:
    """A token's log-probabilities, and where in the answer its text begins."""

    entry: TokenLogprobs
    offset: int


@dataclass(slots=True)
class _Held:
    entry: TokenLogprobs
    start: int
    end: int | None
    """None while a character is incomplete."""


class LogprobStream:
    """Holds the log-probabilities of one request back as long as the text of their tokens is held back, so that
    they come with it. Those of a stop string never come; those of an end token come at the end."""

    def __init__(self, text: TextStream) -> None:
        """To be made before the request's first output."""
        self._text = text
        text.start_trace()
        self._held: deque[_Held] = deque()
        self._end = 0  # of the text of the tokens so far
        self._sent = 0  # characters that are out

    def take(self, output: Output) -> list[Placed]:
        """What comes with this output. Call it for each one, in order."""
        ends = self._text.take_trace()
        for index, entry in enumerate(output.logprobs or ()):
            # A token that was not made to text ended the request.
            self._hold(entry, ends[index] if index < len(ends) else self._end)
        self._sent += len(output.text or "")
        placed = []
        while self._held and (held := self._held[0]).end is not None and held.end <= self._sent:
            placed.append(Placed(held.entry, held.start))
            self._held.popleft()
        if output.finish_reason is not None:
            cut = self._text.matched_stop is not None
            placed += [Placed(h.entry, h.start) for h in self._held if not cut or h.start < self._sent]
            self._held.clear()
        return placed

    def _hold(self, entry: TokenLogprobs, end: int) -> None:
        self._held.append(_Held(entry, self._end, None))
        if end != HELD:
            self._end = end
            for held in reversed(self._held):
                if held.end is not None:
                    break
                held.end = end


@dataclass(frozen=True)
class PromptText:
    """A prompt as `echo` gives it back."""

    text: str
    token_ids: Sequence[int]
    offsets: list[int] = field(default_factory=list)
    """Where in the text each token begins."""


def lay_out(prompt: str | Sequence[int], token_ids: Sequence[int], text: TextModel) -> PromptText:
    """A prompt for `echo`: the text as it was given, or that of its tokens."""
    stream = text.stream()
    pieces, offsets, length = [], [], 0
    for token_id in token_ids:
        offsets.append(length)
        pieces.append(stream.push(token_id))
        length += len(pieces[-1])
    pieces.append(stream.finish())
    return PromptText(prompt if isinstance(prompt, str) else "".join(pieces), token_ids, offsets)


class Namer:
    """Names tokens and builds the entries of answers."""

    def __init__(self, text: TextModel) -> None:
        self._text = text

    def chat(self, placed: Sequence[Placed]) -> ChatLogprobs:
        """`choices[].logprobs` of a chat."""
        content = []
        for item in placed:
            entry = item.entry
            own = self._top(entry.token_id, entry.logprob)
            top = [
                self._top(token_id, logprob)
                for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
            ]
            content.append(ChatLogprob(own.token, own.logprob, own.bytes, top))
        return ChatLogprobs(content)

    def completion(self, placed: Sequence[Placed], shift: int = 0) -> TextLogprobs:
        """`choices[].logprobs` of a completion, whose text begins at `shift`."""
        return TextLogprobs(
            [item.offset + shift for item in placed],
            [max(item.entry.logprob, LOWEST) for item in placed],
            [self._name(item.entry.token_id) for item in placed],
            [self._alternatives(item.entry) for item in placed],
        )

    def echo(self, prompt: PromptText, entries: Sequence[TokenLogprobs], num_top: int) -> TextLogprobs:
        """The part of `choices[].logprobs` that belongs to an echoed prompt: nothing is known of its first token."""
        unknown = len(prompt.token_ids) - len(entries)  # 1, or all if the request ended before they came
        return TextLogprobs(
            list(prompt.offsets),
            [*[None] * unknown, *(max(entry.logprob, LOWEST) for entry in entries)],
            [self._name(token_id) for token_id in prompt.token_ids],
            [*[None] * unknown, *(self._alternatives(entry, num_top) for entry in entries)],
        )

    def prompt(self, entries: Sequence[TokenLogprobs], num_top: int) -> PromptLogprobs:
        """vLLM's `prompt_logprobs`: for each token of the prompt its alternatives and itself, by token id."""
        result: PromptLogprobs = [None]
        for entry in entries:
            alternatives = {
                str(token_id): PromptLogprob(max(logprob, LOWEST), rank, self._plain(token_id))
                for rank, (token_id, logprob) in enumerate(
                    zip(entry.top_token_ids[:num_top], entry.top_logprobs, strict=False), 1
                )
            }
            own = PromptLogprob(max(entry.logprob, LOWEST), entry.rank, self._plain(entry.token_id))
            alternatives.setdefault(str(entry.token_id), own)
            result.append(alternatives)
        return result

    def _alternatives(self, entry: TokenLogprobs, num_top: int | None = None) -> dict[str, float]:
        """By name, the most likely first; the token itself is always there. Of two with one name the likelier."""
        result: dict[str, float] = {}
        for token_id, logprob in zip(entry.top_token_ids[:num_top], entry.top_logprobs, strict=False):
            result.setdefault(self._name(token_id), max(logprob, LOWEST))
        result.setdefault(self._name(entry.token_id), max(entry.logprob, LOWEST))
        return result

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        content = self._text.token_bytes(token_id)
        return TopLogprob(content.decode("utf-8", "replace"), max(logprob, LOWEST), list(content))

    def _plain(self, token_id: int) -> str:
        return self._text.token_bytes(token_id).decode("utf-8", "replace")

    def _name(self, token_id: int) -> str:
        """Its text; of parts of characters their bytes, so that names stay apart (as OpenAI's completions do)."""
        content = self._text.token_bytes(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
