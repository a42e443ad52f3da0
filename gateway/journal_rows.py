"""What goes into the journal's file and comes out of it: rows as plain data, and what can be wrong with the file.

Between journal_store.py, which reads and writes them, and those who say what is in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.errors import GatewayError


class JournalLocked(GatewayError):
    """Another front has this journal open."""


class StoreError(Exception):
    """The file could not be read or written; nothing of the transaction was. `damaged`: no retry can help, the
    file is not what it should be."""

    def __init__(self, message: str, *, damaged: bool = False) -> None:
        super().__init__(message)
        self.damaged = damaged


@dataclass(slots=True)
class Batch:
    """What one transaction writes."""

    calls: list[tuple[str, str | None, bytes]] = field(default_factory=list)
    """Id, key, content."""
    requests: list[tuple[int, str, bytes, int]] = field(default_factory=list)
    """Number, call, content, crashes."""
    step: tuple[int, bytes] | None = None
    chunks: list[tuple[int, int, bytes]] = field(default_factory=list)
    """Request, position of its first token, content."""
    endings: list[tuple[bytes, int]] = field(default_factory=list)
    """Content, request."""
    crashes: list[tuple[int, int]] = field(default_factory=list)
    """Number of crashes, request."""
    ended_calls: list[tuple[float, str | None, str]] = field(default_factory=list)
    """Unix time, key that it keeps, id."""

    def __bool__(self) -> bool:
        return self.step is not None or self.has_more

    @property
    def has_more(self) -> bool:
        """Whether there is something beside a step."""
        return bool(
            self.chunks or self.endings or self.calls or self.requests or self.ended_calls or self.crashes
        )


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """A row of `requests` with its chunks in order."""

    number: int
    content: bytes
    crashes: int
    ending: bytes | None
    chunks: list[tuple[int, bytes]]


@dataclass(frozen=True, slots=True)
class StoredCall:
    """A row of `calls` with its requests in order."""

    call_id: str
    key: str | None
    content: bytes
    ended_at: float | None
    requests: list[StoredRequest]
