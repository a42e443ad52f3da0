"""How one HTTP client reads a call: from which place on, with which log-probabilities, and under which event ids.

Between calls.py and the streams and answers. What a client reads after a place depends on the tokens of the call
alone, never on how they came: on their batches, on the front that sends them, or on who read them before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.detokenizer import TextStream
from gateway.errors import RequestFailed
from gateway.http.logprobs import LogprobStream, Placed
from gateway.journal import JournalCall, JournalEntry
from gateway.protocol import Output
from gateway.reading import TextReader, whole_output
from gateway.text import TextModel

MAX_EVENT_ID_LENGTH = 16_384
_NOTHING: list[Placed] = []
_PLACE = re.compile(r"(\d{1,9})(e?)", re.ASCII)


class Target(Protocol):
    """Who gets what a client reads."""

    def put(self, index: int, output: Output, placed: list[Placed]) -> None: ...
    def fail(self, error: RequestFailed) -> None: ...


@dataclass(slots=True)
class Place:
    """How far a client has read one choice."""

    tokens: int = 0
    """Tokens whose text, if they have any, it has."""
    begun: bool = False
    """It has the choice's first event, which may come before any token."""
    ended: bool = False
    """It has the finish reason."""


class EventId:
    """The place of a client in a whole stream, and its text in the `id:` of an event: for each choice the number of
    its tokens, with an `e` once it has ended, nothing before its first event; joined by dots; `.usage` behind that
    after the chunk of the usage, `.done` after the last event."""

    def __init__(self, num_choices: int) -> None:
        self.places = [Place() for _ in range(num_choices)]
        self.has_usage = False
        self.is_done = False
        self._texts = [b""] * num_choices

    @classmethod
    def parse(cls, text: str, num_choices: int) -> EventId:
        """Raises ValueError for what is no id of a stream of so many choices."""
        if len(text) > MAX_EVENT_ID_LENGTH:
            raise ValueError("it is too long")
        found = cls(num_choices)
        parts = text.split(".")
        if len(parts) == num_choices + 1 and parts[-1] in ("usage", "done"):
            found.has_usage = True
            found.is_done = parts.pop() == "done"
        if len(parts) != num_choices:
            raise ValueError(f"it names {len(parts)} choices, the request has {num_choices}")
        for index, part in enumerate(parts):
            if part:
                match = _PLACE.fullmatch(part)
                if match is None:
                    raise ValueError(f"{part[:20]!r} is not a number of tokens")
                found.places[index] = Place(int(match[1]), True, bool(match[2]))
                found._texts[index] = part.encode()
        if found.has_usage and not all(place.ended for place in found.places):
            raise ValueError("it is of the end of a stream some of whose choices have not ended")
        return found

    def begin(self, index: int) -> bytes:
        """The id after the first event of a choice."""
        self.places[index].begun = True
        return self._encode(index)

    def advance(self, index: int, num_tokens: int, ended: bool) -> bytes:
        """The id after so many more tokens of a choice."""
        place = self.places[index]
        place.begun = True
        place.tokens += num_tokens
        place.ended = ended
        return self._encode(index)

    def usage(self) -> bytes:
        """The id after the chunk of the usage."""
        self.has_usage = True
        return self.encoded() + b".usage"

    def done(self) -> bytes:
        """The id of the last event."""
        return self.encoded() + b".done"

    def encoded(self) -> bytes:
        return b".".join(self._texts)

    def _encode(self, index: int) -> bytes:
        place = self.places[index]
        self._texts[index] = b"%d%b" % (place.tokens, b"e" if place.ended else b"")
        return self._texts[0] if len(self._texts) == 1 else self.encoded()


class _ChoiceReader:
    """One choice, read from a place on."""

    def __init__(
        self,
        entry: JournalEntry,
        text: TextStream,
        eos_token_ids: Sequence[int],
        place: Place,
        *,
        shows_logprobs: bool,
    ) -> None:
        self._ended = place.ended
        self._reader = TextReader(entry, text, eos_token_ids, place.tokens)
        self._logprobs = LogprobStream(text) if shows_logprobs else None

    def read(
        self, output: Output, on_known: Callable[[str], None] | None = None
    ) -> tuple[Output, list[Placed]] | None:
        """An output as the client reads it, with the log-probabilities that come with its text; None if the client
        has all of it. `on_known` gets the text of what the client has."""
        if self._ended:
            return None
        found = None
        for is_new, shown in self._reader.read(output):
            placed = _NOTHING if self._logprobs is None else self._logprobs.take(shown)
            if is_new:
                found = shown, placed
            elif on_known is not None and shown.text:
                on_known(shown.text)
        return found


class Reading:
    """Listens to a call for one client. From its beginning and without log-probabilities it hands on the text that
    the front has made already; else it makes its own."""

    def __init__(
        self,
        record: JournalCall,
        target: Target,
        text: TextModel,
        eos_token_ids: Sequence[int],
        *,
        shows_logprobs: bool,
        places: Sequence[Place] | None = None,
        on_known: Callable[[int, str], None] | None = None,
    ) -> None:
        """`places`: where the client goes on; None for a call that has just begun. `on_known` gets the text of
        each choice that is not handed on, since the client has it."""
        self._on_known = on_known
        self._record = record
        self._target = target
        self._readers: list[_ChoiceReader] | None = None
        if places is not None or shows_logprobs:
            self._readers = [
                _ChoiceReader(
                    entry,
                    text.stream(entry.stop, entry.prompt_token_ids, entry.params),
                    eos_token_ids,
                    places[index] if places is not None else Place(),
                    shows_logprobs=shows_logprobs,
                )
                for index, entry in enumerate(record.entries)
            ]

    def catch_up(self) -> None:
        """Hands over what the call has brought already, from the client's place on."""
        for index, entry in enumerate(self._record.entries):
            output = whole_output(entry)
            if output.token_ids or output.finish_reason is not None:
                self.put(index, output)
        error = self._record.error
        if error is not None:
            self.fail(RequestFailed(*error))

    def put(self, index: int, output: Output) -> None:
        if self._readers is None:
            self._target.put(index, output, _NOTHING)
        elif (found := self._readers[index].read(output, self._known_of(index))) is not None:
            self._target.put(index, *found)

    def fail(self, error: RequestFailed) -> None:
        self._target.fail(error)

    def _known_of(self, index: int) -> Callable[[str], None] | None:
        on_known = self._on_known
        return None if on_known is None else lambda text: on_known(index, text)
