"""In which order requests go on in a new world: shortest first, so many tokens at a time.

Used by requests.py alone. New work is submitted beside it and queues behind one batch at most; what is here only
shrinks while a world lives, so that the longest one has its turn, too.
"""

from __future__ import annotations

from collections.abc import Iterable

from gateway.live_request import Request

BATCH_TOKENS = 8192
"""Tokens of context that replayed requests may have in the world before they bring new ones: a few steps of
prefill, so that a request that comes now has its first token after those, not after the whole backlog."""


def context_tokens(request: Request) -> int:
    """Tokens that a world computes before the request brings a new one."""
    return len(request.entry.prompt_token_ids) + len(request.entry.output_token_ids)


class ReplayQueue:
    """Requests that were in a world before and wait for their turn in this one."""

    def __init__(self, batch_tokens: int = BATCH_TOKENS) -> None:
        self._batch_tokens = batch_tokens
        self._waiting: list[Request] = []
        """The next one last."""
        self._computing: dict[Request, int] = {}

    def __len__(self) -> int:
        """Requests that have not had their turn."""
        return len(self._waiting)

    def add(self, requests: Iterable[Request]) -> None:
        """Those of a lower priority number first, then those with less to compute, then the older ones."""
        self._waiting[:] = [*reversed(self._waiting), *requests]
        self._waiting.sort(key=lambda request: (request.entry.priority, context_tokens(request)))
        self._waiting.reverse()

    def take(self) -> list[Request]:
        """The ones to be submitted now; one at least if none is being computed."""
        taken: list[Request] = []
        in_work = sum(self._computing.values())
        while self._waiting:
            tokens = context_tokens(self._waiting[-1])
            if self._computing and in_work + tokens > self._batch_tokens:
                break
            in_work += tokens
            request = self._waiting.pop()
            self._computing[request] = tokens
            taken.append(request)
        return taken

    def done(self, request: Request) -> bool:
        """It has brought a new token, or has ended. True if others may have their turn by that."""
        if self._computing.pop(request, None) is not None:
            return bool(self._waiting)
        if self._waiting and request in self._waiting:
            self._waiting.remove(request)
        return False

    def clear(self) -> None:
        """The world is gone, or is cleared."""
        self._waiting.clear()
        self._computing.clear()
