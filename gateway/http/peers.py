"""Several fronts on one port: a request of another front is passed on to it, over a socket in the run folder.

Made by front.py around the application where there are several fronts. A call belongs to the front whose journal
has it: its id names that front, and its Idempotency-Key picks one. What clients store (responses, files, batches) and
the models of the Open Inference Protocol are with the first front. Everything else is served where it arrives.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from pathlib import Path

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.control_messages import of_front
from gateway.http.errors import ApiError
from gateway.http.fronts_metrics import merge

PEER_SOCKET = "peer.sock"
WAIT_S = 15.0
"""How long a front that is being started again is waited for."""
RETRY_S = 0.05
METRICS_WAIT_S = 1.0
"""A front that takes longer is left out; its counters are back with its next answer."""
CHUNK_BYTES = 65536
MAX_BODY_BYTES = 512 * 2**20
"""The application that gets it knows its own bounds; this one only keeps memory in bounds."""

FIRST_FRONTS = ("/v1/responses", "/v1/files", "/v1/batches", "/v2")
"""Paths, and all below them, that the first front serves."""
_OPENAI_PREFIX = "/openai"
_CALL = re.compile(r"/v1/requests/[^/]*-([0-9a-f]{2})[0-9a-f]{30}(?:/stream)?")
_HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"transfer-encoding",
    b"expect",
    b"content-length",
    b"upgrade",
    b"te",
}
_FROM_ANSWER = {b"connection", b"keep-alive", b"transfer-encoding", b"date"}


def home(scope: Scope, fronts: int) -> int | None:
    """The front that a request belongs to; None: whichever gets it."""
    path: str = scope["path"].removeprefix(_OPENAI_PREFIX)
    if any(path == first or path.startswith(first + "/") for first in FIRST_FRONTS) and path != "/v2/rerank":
        return 0
    if found := _CALL.fullmatch(path):
        front = int(found[1], 16)
        return front if front < fronts else None
    if scope["method"] == "POST":
        for name, value in scope["headers"]:
            if name == b"idempotency-key":
                return int.from_bytes(hashlib.blake2b(value, digest_size=4).digest(), "big") % fronts
    return None


class Peers:
    """The application of one of several fronts."""

    def __init__(self, app: ASGIApp, front: int, fronts: int, run_dir: Path) -> None:
        self._app = app
        self._front = front
        self._fronts = fronts
        self._run_dir = run_dir

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        owner = home(scope, self._fronts) if scope["type"] == "http" else None
        if (
            owner is None
            and scope["type"] == "http"
            and (scope["method"], scope["path"]) == ("GET", "/metrics")
        ):
            await self._show_metrics(scope, receive, send)
            return
        if owner is None or owner == self._front:
            await self._app(scope, receive, send)
            return
        await _pass_on(scope, receive, send, self._run_dir / of_front(PEER_SOCKET, owner))

    async def _show_metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Those of all fronts that answer; what this one refuses is refused."""
        plain = {**scope, "headers": [header for header in scope["headers"] if header[0] != b"accept"]}
        own = _Kept()
        await self._app(plain, receive, own.send)
        if own.status == 200:
            paths = [
                self._run_dir / of_front(PEER_SOCKET, n) for n in range(self._fronts) if n != self._front
            ]
            others = await asyncio.gather(*(_fetch(plain, path) for path in paths))
            texts = [own.body.decode(), *(other.decode() for other in others if other)]
            own.body = merge(texts).encode()
        headers = [(name, value) for name, value in own.headers if name != b"content-length"]
        headers.append((b"content-length", b"%d" % len(own.body)))
        await send({"type": "http.response.start", "status": own.status, "headers": headers})
        await send({"type": "http.response.body", "body": own.body})


class _Kept:
    """An answer of the own application, kept."""

    def __init__(self) -> None:
        self.status = 500
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message["headers"])
        else:
            self.body += message.get("body", b"")


async def _fetch(scope: Scope, path: Path) -> bytes:
    """What another front answers; nothing if it does not, or refuses."""
    kept = _Kept()
    answer = _Answer()
    with contextlib.suppress(OSError, TimeoutError, httptools.HttpParserError):
        async with asyncio.timeout(METRICS_WAIT_S):
            reader, writer = await asyncio.open_unix_connection(str(path))
            with contextlib.closing(writer):
                writer.write(_head(scope, 0))
                while not answer.is_complete and (data := await reader.read(CHUNK_BYTES)):
                    answer.feed(data)
                    for message in answer.take():
                        await kept.send(message)
    return kept.body if answer.is_complete and kept.status == 200 else b""


async def _pass_on(scope: Scope, receive: Receive, send: Send, path: Path) -> None:
    """Asks the other front and hands over its answer as it comes. A connection that breaks in the middle of an
    answer breaks the client's, too."""
    body = await _read_body(receive)
    if body is None:
        return
    try:
        async with asyncio.timeout(WAIT_S):
            reader, writer = await _connect(path)
    except TimeoutError:
        await _refuse(send, "the front that has this does not answer; try again later")
        return
    gone = asyncio.ensure_future(_gone(receive))
    # Closed under the reader, when the client has gone.
    gone.add_done_callback(lambda _: writer.close())
    answer = _Answer()
    try:
        writer.write(_head(scope, len(body)) + body)
        while not answer.is_complete:
            data = await reader.read(CHUNK_BYTES)
            if not data:
                break
            answer.feed(data)
            for message in answer.take():
                await send(message)
        if not answer.started and not gone.done():
            await _refuse(send, "the front that has this went away; try again")
    except (OSError, httptools.HttpParserError):
        if not answer.started and not gone.done():
            await _refuse(send, "the front that has this went away; try again")
    finally:
        gone.cancel()
        writer.close()


async def _connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    while True:
        with contextlib.suppress(OSError):
            return await asyncio.open_unix_connection(str(path))
        await asyncio.sleep(RETRY_S)


class _Answer:
    """What came of an answer, as ASGI messages."""

    def __init__(self) -> None:
        self.started = False
        self.is_complete = False
        self._headers: list[tuple[bytes, bytes]] = []
        self._messages: list[Message] = []
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Raises httptools.HttpParserError."""
        self._parser.feed_data(data)

    def take(self) -> list[Message]:
        messages, self._messages = self._messages, []
        return messages

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() not in _FROM_ANSWER:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.started = True
        status = self._parser.get_status_code()
        self._messages.append({"type": "http.response.start", "status": status, "headers": self._headers})

    def on_body(self, data: bytes) -> None:
        self._messages.append({"type": "http.response.body", "body": data, "more_body": True})

    def on_message_complete(self) -> None:
        self.is_complete = True
        self._messages.append({"type": "http.response.body", "body": b"", "more_body": False})


def _head(scope: Scope, body_bytes: int) -> bytes:
    target: bytes = scope.get("raw_path") or scope["path"].encode()
    target = target.partition(b"?")[0]
    if scope["query_string"]:
        target += b"?" + scope["query_string"]
    lines = [b"%b %b HTTP/1.1" % (scope["method"].encode(), target)]
    lines += [b"%b: %b" % header for header in scope["headers"] if header[0] not in _HOP_BY_HOP]
    lines += [b"content-length: %d" % body_bytes, b"connection: close", b"", b""]
    return b"\r\n".join(lines)


async def _read_body(receive: Receive) -> bytes | None:
    """None if the client has gone."""
    parts: list[bytes] = []
    size = 0
    while size <= MAX_BODY_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if not message.get("more_body", False):
            break
    return b"".join(parts)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(send: Send, text: str) -> None:
    error = ApiError(503, text, type="server_error", code="front_away")
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": error.encoded()})
