"""The two moments at which a live request has taken too long: without a world, and at its own timeout. Owned by
requests.py, which ends it then; nothing here looks at worlds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.errors import RequestFailed
from gateway.live_request import Request


class RequestTimers:
    """Timers of the running loop, kept in the requests."""

    def __init__(self, fail: Callable[[Request, RequestFailed], None]) -> None:
        """`fail` ends a request that has not ended."""
        self._fail = fail

    def start_deadline(self, request: Request, now: float) -> None:
        """At the moment that its entry has, if it has one; `now`: Unix time."""
        deadline_at = request.entry.deadline_at
        if deadline_at is not None:
            loop = asyncio.get_running_loop()
            request.deadline_timer = loop.call_later(
                max(0.0, deadline_at - now), self._pass_deadline, request
            )

    def start_wait(self, request: Request, wait_s: float, error: Callable[[], RequestFailed]) -> None:
        """`error`: of a request that no world has had after so many seconds. Whoever submits it ends the timer."""
        loop = asyncio.get_running_loop()
        request.wait_timer = loop.call_later(wait_s, lambda: self._fail(request, error()))

    def stop(self, request: Request) -> None:
        """Of one that has ended."""
        for timer in (request.wait_timer, request.deadline_timer):
            if timer is not None:
                timer.cancel()

    def _pass_deadline(self, request: Request) -> None:
        entry = request.entry
        count = len(entry.output_token_ids)
        timeout_s = entry.timeout_s or (entry.deadline_at or 0.0) - entry.accepted_at
        text = f"the request was cancelled at its timeout of {timeout_s:.6g} s, after {count} output tokens"
        self._fail(request, RequestFailed("timeout", text))
