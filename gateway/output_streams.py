"""The outputs of one request as its caller reads them: AsyncStream in asyncio, Stream in a thread that may wait.

Made by AsyncClient and Client, which put in what arrives; nothing here talks to anybody. Users import both from
gateway/client.py.
"""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from gateway.errors import RequestTimeout
from gateway.generation import Generation
from gateway.protocol import Output

Event = Output | Exception
"""What a request brings; an exception is its last."""


class _RequestEvents:
    """What both streams know of their request: how it is cancelled, and that it has ended."""

    def __init__(self, request_id: str, timeout_s: float, cancel: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._timeout_s = timeout_s
        self._cancel = cancel
        self._ended = False
        self._on_read: Callable[[str, int], None] | None = None
        self._report_every = 0
        self._num_read = 0
        self._num_reported = 0

    def _report(self, on_read: Callable[[str, int], None], every: int) -> None:
        """`on_read` is called with the id and the number of tokens that were read, when it has grown by `every`."""
        self._on_read = on_read
        self._report_every = max(1, every)

    def cancel(self) -> None:
        """Ends the request; what the server sends until it knows still arrives, then finish_reason
        "cancelled". Does nothing when it has ended."""
        self._cancel(self.request_id)

    def _take(self, event: Event) -> Output:
        """The output that arrived. Raises what arrived in its place."""
        if isinstance(event, Exception):
            self._ended = True
            raise event
        self._ended = event.finish_reason is not None
        self._num_read += len(event.token_ids)
        if self._on_read is not None and self._num_read - self._num_reported >= self._report_every:
            self._num_reported = self._num_read
            self._on_read(self.request_id, self._num_read)
        return event

    def _give_up(self) -> RequestTimeout:
        """Cancels the request; what its reader is told, who has waited too long."""
        self.cancel()
        self._ended = True
        return RequestTimeout(
            f"request {self.request_id} brought no token for {self._timeout_s:g} s; it was cancelled"
        )


class AsyncStream(_RequestEvents, AsyncIterator[Output]):
    """The outputs of one request. Ends after the output with a finish_reason.

    Raises RequestFailed, ConnectionLost, or RequestTimeout (no output for `timeout_s`, the request is then
    cancelled).
    """

    def __init__(self, request_id: str, timeout_s: float, cancel: Callable[[str], None]) -> None:
        super().__init__(request_id, timeout_s, cancel)
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()

    async def __anext__(self) -> Output:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            self._arrived.clear()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._arrived.wait()
            except TimeoutError:
                raise self._give_up() from None
        return self._take(self._events.popleft())

    async def collect(self) -> Generation:
        """Waits for the end."""
        generation = Generation(self.request_id)
        async for output in self:
            generation.add(output)
        return generation

    def _put(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()


class Stream(_RequestEvents, Iterator[Output]):
    """The outputs of one request; like AsyncStream, for a thread that may wait."""

    def __init__(self, request_id: str, timeout_s: float, cancel: Callable[[str], None]) -> None:
        super().__init__(request_id, timeout_s, cancel)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def __next__(self) -> Output:
        if self._ended:
            raise StopIteration
        try:
            event = self._events.get(timeout=self._timeout_s)
        except queue.Empty:
            raise self._give_up() from None
        return self._take(event)

    def collect(self) -> Generation:
        """Waits for the end."""
        generation = Generation(self.request_id)
        for output in self:
            generation.add(output)
        return generation

    def _put(self, event: Event) -> None:
        self._events.put(event)
