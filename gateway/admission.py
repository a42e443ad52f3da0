"""The waiting room of the front: how many requests, and how many tokens of prompts, may wait for their first token.

Owned by requests.py, which tells it of everything that comes in and leaves. It decides; it holds no request. With
several fronts the limits are those of all together.
"""

from __future__ import annotations

import math
from collections import deque

from gateway.errors import RequestFailed
from gateway.shared_counts import SharedCounts

MAX_WAITING = 1024
MAX_WAITING_TOKENS = 2**22
"""Some 160 MiB of the front's memory at most."""

WINDOW_S = 60.0
WINDOW_DEPARTURES = 512
"""What has left lately tells how fast the room empties."""
UNKNOWN_RETRY_S = 5
MAX_RETRY_S = 60


class WaitingRoom:
    """Requests without a first token, counted, not held."""

    def __init__(
        self,
        max_requests: int = MAX_WAITING,
        max_tokens: int = MAX_WAITING_TOKENS,
        shared: SharedCounts | None = None,
    ) -> None:
        """`shared`: where several fronts count together. Two that look in the same microseconds may let one call each
        in where there was room for one."""
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_requests = 0
        self.num_tokens = 0
        self._shared = shared
        self._departures: deque[tuple[float, int]] = deque(maxlen=WINDOW_DEPARTURES)
        """(monotonic time, tokens), oldest first."""

    def check(self, num_requests: int, num_tokens: int, now: float) -> None:
        """Raises RequestFailed if so much more may not come in: `invalid_request` if it never may, `overloaded` with
        a time to wait if it may later."""
        if num_requests > self.max_requests:
            text = f"{num_requests} prompts and choices in one request; allowed: {self.max_requests} (--max-waiting)"
            raise RequestFailed("invalid_request", text)
        if num_tokens > self.max_tokens:
            text = f"{num_tokens} prompt tokens in one request, over all prompts and choices"
            raise RequestFailed(
                "invalid_request", f"{text}; allowed: {self.max_tokens} (--max-waiting-tokens)"
            )
        num_waiting, num_waiting_tokens = self.num_requests, self.num_tokens
        if self._shared is not None:
            elsewhere, elsewhere_tokens = self._shared.waiting_elsewhere()
            num_waiting, num_waiting_tokens = num_waiting + elsewhere, num_waiting_tokens + elsewhere_tokens
        excess_requests = num_waiting + num_requests - self.max_requests
        excess_tokens = num_waiting_tokens + num_tokens - self.max_tokens
        if excess_requests <= 0 and excess_tokens <= 0:
            return
        retry_s = self._retry_s(excess_requests, excess_tokens, now)
        waiting = f"{num_waiting} requests with {num_waiting_tokens} prompt tokens are waiting already"
        allowed = f"allowed: {self.max_requests} and {self.max_tokens}"
        text = f"{waiting}; {allowed}; try again in {retry_s} s"
        raise RequestFailed("overloaded", text, retry_after_s=retry_s)

    def enter(self, num_tokens: int) -> None:
        self.num_requests += 1
        self.num_tokens += num_tokens
        self._publish()

    def leave(self, num_tokens: int, now: float) -> None:
        """A request has its first token, or has ended without one."""
        self.num_requests -= 1
        self.num_tokens -= num_tokens
        self._publish()
        self._departures.append((now, num_tokens))

    def _publish(self) -> None:
        if self._shared is not None:
            self._shared.set_waiting(self.num_requests, self.num_tokens)

    def _retry_s(self, excess_requests: int, excess_tokens: int, now: float) -> int:
        """Whole seconds in which the excess leaves, at the pace of what left lately; 1 to MAX_RETRY_S."""
        departures = self._departures
        while departures and departures[0][0] < now - WINDOW_S:
            departures.popleft()
        elapsed_s = now - departures[0][0] if departures else 0.0
        tokens = sum(tokens for _, tokens in departures)
        if elapsed_s <= 0.0 or not tokens:
            return UNKNOWN_RETRY_S
        wait_s = elapsed_s * max(excess_requests / len(departures), excess_tokens / tokens)
        return max(1, min(MAX_RETRY_S, math.ceil(wait_s)))
