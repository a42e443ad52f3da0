"""A load generator for HTTP that costs little: connections of plain bytes in one loop, no parser, no client library.

Used by benchmarks.front, in its own process. It knows the two shapes that it meets, a body with its length and a
chunked stream, and raises RuntimeError for any status but 200.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit


def post(path: str, body: dict[str, object]) -> bytes:
    """The bytes of a request."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


class Connection(asyncio.Protocol):
    """One connection that stays open, one request at a time."""

    def __init__(self, on_event: Callable[[float, int], None] | None = None) -> None:
        """`on_event(now, count)` is called when so many events of a stream have come."""
        self._on_event = on_event
        self._received = b""
        self._end = 0
        """Bytes of the answer; 0: not known yet, -1: a stream."""
        self._done: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, url: str, on_event: Callable[[float, int], None] | None = None) -> Connection:
        address = urlsplit(url)
        assert address.hostname is not None and address.port is not None
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(lambda: cls(on_event), address.hostname, address.port)
        return made

    def ask(self, request: bytes) -> asyncio.Future[None]:
        """Sends a request; done when its answer is complete."""
        self._received, self._end = b"", 0
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error or ConnectionError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        if self._end == 0:
            data = self._received = self._received + data
            head = data.find(b"\r\n\r\n")
            if head < 0:
                return
            if not data.startswith(b"HTTP/1.1 200"):
                self._finish(RuntimeError(data.decode(errors="replace")))
                return
            self._end = _length(data[:head].lower(), head + 4)
        elif self._end > 0:
            self._received += data
        if self._end > 0:
            if len(self._received) >= self._end:
                self._finish(None)
            return
        if self._on_event is not None and (count := data.count(b"data: {")):
            self._on_event(time.perf_counter(), count)
        if data.endswith(b"0\r\n\r\n"):
            self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error) if error is not None else self._done.set_result(None)


def _length(head: bytes, size: int) -> int:
    """Bytes of head and body together; -1 for a stream."""
    at = head.find(b"content-length: ")
    return -1 if at < 0 else size + int(head[at + 16 :].split(b"\r\n", 1)[0])


async def closed_loop(url: str, request: bytes, connections: int, seconds: float) -> float:
    """Answers per second of so many connections, each of which asks again as soon as it has its answer."""
    opened = [await Connection.open(url) for _ in range(connections)]
    ends = time.perf_counter() + seconds
    done = 0

    async def keep_asking(connection: Connection) -> None:
        nonlocal done
        while time.perf_counter() < ends:
            await connection.ask(request)
            done += 1

    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for connection in opened:
            tasks.create_task(keep_asking(connection))
    elapsed_s = time.perf_counter() - began
    for connection in opened:
        connection.close()
    return done / elapsed_s
