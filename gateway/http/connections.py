"""What one HTTP connection may do: how long it may take to send its request and to read its answer, how large the
head may be, and how many there may be.

uvicorn bounds none of these: it waits for ever for a head or a body, takes any head, and keeps what a client does
not read. It calls `limited_protocol` for a connection; nothing here runs once a token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.http.errors import ApiError
from gateway.log import Logger

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 128
LEAST_BODY_RATE = 2048
"""Bytes a second that a body must come with, beyond the time that every one has."""
REPORT_EVERY_S = 60.0
TOO_SLOW = "too_slow"
"""Key of the request's `state`: its client did not read, see streams.py."""
HANGUP = "hangup"
"""Key of the request's `state`: the Hangup of its connection."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Of every connection; of all of them together the last one."""

    read_timeout_s: float = 30.0
    """For a head, from the connection or from the end of the answer before; and for a body."""
    slow_client_s: float = 60.0
    """How long a client may read nothing of what is ready for it."""
    max_connections: int = 4096


def limited_protocol(limits: ConnectionLimits, log: Logger) -> type[HttpToolsProtocol]:
    """For uvicorn's `http`."""
    return type("LimitedConnection", (_LimitedConnection,), {"limits": limits, "log": _Rarely(log)})


class _Rarely:
    """A logger that says the same thing once a minute at most: what strangers do must not fill a disk."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        self._counts: dict[str, int] = {}
        self._said_at: dict[str, float] = {}

    def warning(self, event: str, **fields: Any) -> None:
        self._counts[event] = self._counts.get(event, 0) + 1
        now = time.monotonic()
        if now >= self._said_at.get(event, -REPORT_EVERY_S) + REPORT_EVERY_S:
            self._said_at[event] = now
            self._log.warning(event, times=self._counts.pop(event), **fields)


class Hangup:
    """Tells whoever waits for an answer that its client is gone. A task that waits for ASGI's message of that costs a
    tenth of a short request."""

    __slots__ = ("_callbacks", "has_come")

    def __init__(self) -> None:
        self.has_come = False
        self._callbacks: set[Callable[[], None]] = set()

    def add(self, callback: Callable[[], None]) -> None:
        """It is called once, at once if the client is gone already."""
        if self.has_come:
            callback()
        else:
            self._callbacks.add(callback)

    def discard(self, callback: Callable[[], None]) -> None:
        self._callbacks.discard(callback)

    def come(self) -> None:
        self.has_come = True
        callbacks, self._callbacks = self._callbacks, set()
        for callback in callbacks:
            callback()


class _LimitedConnection(HttpToolsProtocol):
    limits: ConnectionLimits
    log: _Rarely

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timer: asyncio.TimerHandle | None = None
        """Runs while a head or a body is awaited."""
        self._in_body = False
        self._began = 0.0
        self._num_bytes = 0
        """Of the head or the body that is being read."""
        self._slow_timer: asyncio.TimerHandle | None = None
        self._hangup = Hangup()

    # ----------------------------------------------------------------------- of the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        most = self.limits.max_connections
        if len(self.connections) > most:
            self.log.warning("connection refused", detail=f"{most} are open; see --max-connections")
            text = f"the server has {most} connections open and takes no more; try again later"
            self._refuse(ApiError(503, text, type="service_unavailable", retry_after_s=1))
            return
        self._await(in_body=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_slow_timer()
        super().connection_lost(exc)
        self._hangup.come()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        between = self.cycle is None or self.cycle.response_complete
        if between and self._timer is None:
            self._await(in_body=False)
        self._num_bytes += len(data)
        super().data_received(data)
        if self._timer is not None and not self._in_body and self._num_bytes > MAX_HEAD_BYTES:
            self.log.warning("head refused", detail=f"longer than {MAX_HEAD_BYTES} bytes")
            self._refuse(_head_too_large())

    # ----------------------------------------------------------------------- of the parser

    def on_headers_complete(self) -> None:
        self._stop_timer()
        head_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head_bytes <= MAX_HEAD_BYTES and len(self.headers) <= MAX_HEADERS:
            self._await(in_body=True)
            super().on_headers_complete()
            self.scope["state"][HANGUP] = self._hangup
            return
        self.log.warning("head refused", detail=f"{len(self.headers)} headers of {head_bytes} bytes")
        app, self.app = self.app, _refuse_head
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def on_message_complete(self) -> None:
        self._stop_timer()
        super().on_message_complete()

    # ----------------------------------------------------------------------- a client that does not read

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._slow_timer is None:
            self._slow_timer = self.loop.call_later(self.limits.slow_client_s, self._too_slow)

    def resume_writing(self) -> None:
        self._stop_slow_timer()
        super().resume_writing()

    def _too_slow(self) -> None:
        self._slow_timer = None
        detail = f"it read nothing for {self.limits.slow_client_s:g} s; see --slow-client-timeout"
        self.log.warning("connection ended", detail=detail)
        if self.cycle is not None:
            self.cycle.scope["state"][TOO_SLOW] = True
        self.transport.abort()

    # ----------------------------------------------------------------------- inside

    def _await(self, *, in_body: bool) -> None:
        self._in_body = in_body
        self._began = self.loop.time()
        self._num_bytes = 0
        self._timer = self.loop.call_later(self.limits.read_timeout_s, self._check)

    def _check(self) -> None:
        """The time of a head or a body is over, if it was not a long body at a good pace."""
        self._timer = None
        if self.transport.is_closing():
            return
        allowed_s = self.limits.read_timeout_s
        if self._in_body:
            allowed_s += self._num_bytes / LEAST_BODY_RATE
            if self.flow.read_paused:  # it is we who do not read
                allowed_s += self.loop.time() - self._began
        left_s = self._began + allowed_s - self.loop.time()
        if left_s > 0:
            self._timer = self.loop.call_later(max(left_s, 0.05), self._check)
            return
        what = "body" if self._in_body else "head"
        if what == "head" and self._num_bytes == 0:
            self.transport.close()  # it asked for nothing
            return
        text = f"the {what} of the request had not come within {allowed_s:g} s"
        self.log.warning("request ended", detail=text)
        self._refuse(ApiError(408, text, type="timeout_error", code="request_timeout", should_retry=True))

    def _refuse(self, error: ApiError) -> None:
        """Answers, unless an answer has begun, and closes."""
        self._stop_timer()
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = error.encoded()
            lines = [f"{name}: {value}\r\n".encode() for name, value in error.headers().items()]
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(
                body
            )
            self.transport.write(b"".join([STATUS_LINE[error.status], *lines, head, b"\r\n", body]))
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_slow_timer(self) -> None:
        if self._slow_timer is not None:
            self._slow_timer.cancel()
            self._slow_timer = None


def _head_too_large() -> ApiError:
    text = f"the head of the request is too large; allowed: {MAX_HEADERS} headers and {MAX_HEAD_BYTES} bytes"
    return ApiError(431, text, code="head_too_large")


async def _refuse_head(scope: Scope, receive: Receive, send: Send) -> None:
    body = msgspec.json.encode(_head_too_large().body())
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send(
        {"type": "http.response.start", "status": 431, "headers": [*headers, (b"connection", b"close")]}
    )
    await send({"type": "http.response.body", "body": body})
