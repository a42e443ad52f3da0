"""The journal: every accepted request and the tokens emitted for it.

Written by the front before a client sees anything. What it holds is all that a request needs to go on in
another world. In memory today; the interface is that of a store on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from gateway.errors import GatewayError
from gateway.protocol import FinishReason, SamplingParams


class PositionError(GatewayError):
    """Tokens that do not continue what the journal has: repeated ones, or a gap before them."""

    def __init__(self, request_id: str, expected: int, got: int) -> None:
        super().__init__(f"request {request_id}: tokens from position {got}, {expected} was expected")
        self.expected = expected
        self.got = got


@dataclass(slots=True)
class JournalEntry:
    """One accepted request. Everything but `output_token_ids` stays as it was accepted."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    """With the seed that is used: a request without one got it from the front."""
    stop: list[str]
    priority: int
    accepted_at: float
    """Unix time in seconds."""
    output_token_ids: list[int] = field(default_factory=list)
    crashes: int = 0
    """Worlds that died with this request in them, as `Journal.add_crash` counted."""


class Journal:
    """Entries by request id, in the order of acceptance. `flush` ends a group of changes: what was written
    before it is kept when it returns."""

    def __init__(self) -> None:
        self._entries: dict[str, JournalEntry] = {}

    def accept(self, entry: JournalEntry) -> None:
        """A new request. Raises ValueError for an id that is there already."""
        if entry.request_id in self._entries:
            raise ValueError(f"request {entry.request_id} is in the journal already")
        self._entries[entry.request_id] = entry

    def append(self, request_id: str, position: int, token_ids: list[int]) -> None:
        """New tokens of a request, the first at `position` among its output tokens. Raises PositionError and
        writes nothing if that is not where the journal ends; KeyError for a request that is not there."""
        output = self._entries[request_id].output_token_ids
        if position != len(output):
            raise PositionError(request_id, len(output), position)
        output += token_ids

    def finish(self, request_id: str, reason: FinishReason | None) -> None:
        """The request ended, with an error if there is no reason; nothing of it is needed any more."""
        self._entries.pop(request_id, None)

    def add_crash(self, request_ids: Iterable[str]) -> None:
        """One more world died with each of these requests in it. Written when this returns; ids that are not
        there are left out."""
        for request_id in request_ids:
            entry = self._entries.get(request_id)
            if entry is not None:
                entry.crashes += 1

    def flush(self) -> None:
        """Makes what was written last. Nothing to do in memory."""

    def unfinished(self) -> Iterator[JournalEntry]:
        """The requests that have not ended, oldest first."""
        yield from self._entries.values()

    def __len__(self) -> int:
        return len(self._entries)
