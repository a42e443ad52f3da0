"""A small asynchronous HTTP/1.1 client over the standard library: POSTs of JSON on connections that are kept, with
answers read whole or as server-sent events. Used by `phalanx bench` and `batch`, which must not be what is
measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from launcher.errors import LauncherError
from launcher.http_client import base_url

READ_BYTES = 1 << 16
CONNECT_TIMEOUT_S = 10.0


class StreamBroken(Exception):
    """The connection failed before the answer was complete."""


@dataclass
class Answer:
    """The head of an answer; its content is read by `body` or `events`."""

    status: int
    headers: dict[str, str]
    _connection: _Connection
    _done: bool = field(default=False)

    async def body(self) -> bytes:
        """All of it. Raises StreamBroken."""
        return b"".join([part async for part in self._parts()])

    async def events(self) -> AsyncGenerator[tuple[str | None, bytes]]:
        """Id and data of each event, several of one read without a pause between them. Raises StreamBroken."""
        rest, event_id = b"", None
        async for part in self._parts():
            lines = (rest + part).split(b"\n")
            rest = lines.pop()
            for line in lines:
                if line.startswith(b"data:"):
                    yield event_id, line[5:].strip()
                elif line.startswith(b"id:"):
                    event_id = line[3:].strip().decode()

    async def _parts(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._connection.content(self.headers):
                yield part
            self._done = True
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise StreamBroken(str(error) or type(error).__name__) from None
        finally:
            keeps = self._done and self.headers.get("connection", "").lower() != "close"
            self._connection.release(keeps)


class _Connection:
    def __init__(self, pool: HttpPool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._pool = pool
        self._reader = reader
        self.writer = writer

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers, behind any 1xx. Raises OSError, ValueError, IncompleteReadError."""
        while True:
            try:
                head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            except asyncio.LimitOverrunError:
                raise ValueError("the head of the answer is too long") from None
            first, *lines = head.split("\r\n")
            status = int(first.split(" ", 2)[1])
            if status >= 200:
                pairs = (line.split(":", 1) for line in lines if ":" in line)
                return status, {name.strip().lower(): value.strip() for name, value in pairs}

    async def content(self, headers: dict[str, str]) -> AsyncIterator[bytes]:
        """As chunks, of a known length, or up to the end of the connection (RFC 9112, section 6.3)."""
        if "chunked" in headers.get("transfer-encoding", "").lower():
            while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            while await self._reader.readuntil(b"\r\n") != b"\r\n":
                pass  # trailers
        elif "content-length" in headers:
            yield await self._reader.readexactly(int(headers["content-length"]))
        else:
            while part := await self._reader.read(READ_BYTES):
                yield part
            headers["connection"] = "close"

    def release(self, keeps: bool) -> None:
        self._pool.release(self, keeps)

    @property
    def is_usable(self) -> bool:
        return not (self._reader.at_eof() or self.writer.is_closing())


class HttpPool:
    """Connections to one server. Raises LauncherError if made with what is not a URL."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(base_url(url))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LauncherError(f"--url {url}: not a URL; write it like http://127.0.0.1:8000")
        self._prefix = parts.path
        self._host, self._secure = parts.hostname, parts.scheme == "https"
        try:
            self._port = parts.port or (443 if self._secure else 80)
        except ValueError as error:
            raise LauncherError(f"--url {url}: {error}") from None
        self._name = parts.netloc.rpartition("@")[2]
        self._api_key = api_key
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()

    async def post(self, path: str, body: object, headers: dict[str, str] | None = None) -> Answer:
        """POST of JSON. Raises OSError or StreamBroken before there is a status."""
        return await self._call("POST", path, json.dumps(body).encode(), headers)

    async def get(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        """Raises OSError or StreamBroken."""
        return await self._call("GET", path, b"", headers)

    async def _call(self, method: str, path: str, content: bytes, headers: dict[str, str] | None) -> Answer:
        lines = [f"{method} {self._prefix}{path} HTTP/1.1", f"Host: {self._name}", "Accept: */*"]
        if method == "POST":
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        if self._api_key:
            lines.append(f"Authorization: Bearer {self._api_key}")
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        request = "\r\n".join([*lines, "", ""]).encode() + content
        while True:
            reused = self._take_idle()
            connection = reused or await self._connect()
            try:
                connection.writer.write(request)
                await connection.writer.drain()
                status, found = await connection.head()
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                connection.release(keeps=False)
                # The server closed a connection that was kept, before it had seen this request.
                if reused is not None and isinstance(error, (ConnectionError, asyncio.IncompleteReadError)):
                    continue
                raise StreamBroken(str(error) or type(error).__name__) from None
            except BaseException:
                connection.release(keeps=False)
                raise
            return Answer(status, found, connection)

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
            self.release(connection, keeps=False)
        return None

    async def _connect(self) -> _Connection:
        context = ssl.create_default_context() if self._secure else None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                streams = await asyncio.open_connection(self._host, self._port, ssl=context, limit=1 << 22)
        except TimeoutError:
            raise ConnectionError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        connection = _Connection(self, *streams)
        self._all.add(connection)
        return connection

    def release(self, connection: _Connection, keeps: bool) -> None:
        if keeps:
            self._idle.append(connection)
        else:
            self._all.discard(connection)
            connection.writer.close()

    async def close(self) -> None:
        """Closes every connection, also those in use."""
        for connection in list(self._all):
            connection.writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await asyncio.wait_for(connection.writer.wait_closed(), 1.0)
        self._all.clear()
        self._idle.clear()
