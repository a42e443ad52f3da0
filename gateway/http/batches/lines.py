"""The lines of a batch: reading them from its input file, and asking the server's own endpoints for each.

Used by runner.py. A line becomes a request like one of a client, with the lowest priority and a key by which it is
found again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from starlette.types import ASGIApp, Message

MAX_LINES = 50_000
MAX_LINE_BYTES = 16 * 2**20
MAX_ERRORS = 100
BATCH_PRIORITY = 1_000_000
"""Lower is served first: interactive requests have 0 unless they say otherwise."""
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


class BatchLine(Struct, kw_only=True):
    """One line of an input file."""

    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


_decode_line = msgspec.json.Decoder(BatchLine).decode


@dataclass(frozen=True)
class Answer:
    """What an endpoint said."""

    status: int
    body: bytes
    retry_after_s: float


class LineError(Exception):
    """What is wrong with a line."""

    def __init__(self, line: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.description = {"line": line, "code": code, "message": message, "param": param}


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, by their number from 1 on."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if line.strip():
                yield number, line


def check_lines(path: Path, endpoint: str) -> tuple[int, list[dict[str, Any]]]:
    """How many lines there are, and what is wrong with them. May take long."""
    errors: list[dict[str, Any]] = []
    ids: set[str] = set()
    total = 0
    for number, content in read_lines(path):
        total += 1
        try:
            if total > MAX_LINES:
                raise LineError(number, "too_many_lines", f"there are more than {MAX_LINES} lines")
            line = decode_line(number, content, endpoint)
            if line.custom_id in ids:
                text = f"the custom_id {line.custom_id[:64]!r} is there twice"
                raise LineError(number, "duplicate_custom_id", text, "custom_id")
            ids.add(line.custom_id)
        except LineError as error:
            errors.append(error.description)
            if len(errors) >= MAX_ERRORS or total > MAX_LINES:
                break
    if total == 0:
        errors.append({"line": None, "code": "empty_file", "message": "the file has no lines", "param": None})
    return total, errors


def decode_line(number: int, content: bytes, endpoint: str) -> BatchLine:
    """One request of a file. Raises LineError."""
    if len(content) > MAX_LINE_BYTES:
        raise LineError(number, "line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        content.decode()
        line = _decode_line(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise LineError(number, "invalid_json_line", f"the line is no request: {error}") from None
    if line.method != "POST":
        raise LineError(number, "invalid_method", f"method is {line.method[:20]!r}; allowed: POST", "method")
    if line.url != endpoint:
        text = f"url is {line.url[:64]!r}; the batch is for {endpoint}"
        raise LineError(number, "mismatched_url", text, "url")
    if line.body.get("stream") or line.body.get("background"):
        text = "a line of a batch has one answer: leave stream and background out"
        raise LineError(number, "invalid_request", text, "body.stream")
    return line


async def ask(app: ASGIApp, line: BatchLine, key: str) -> Answer:
    """The answer of the server's own endpoint. The same key finds a request again that runs or has ended."""
    body = dict(line.body)
    if not isinstance(body.get("priority"), int) or body["priority"] < BATCH_PRIORITY:
        body["priority"] = BATCH_PRIORITY
    headers = [
        (b"content-type", b"application/json"),
        (b"idempotency-key", key.encode()),
        (b"x-on-disconnect", b"cancel"),
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": line.url,
        "raw_path": line.url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
    }
    messages: list[Message] = [
        {"type": "http.request", "body": msgspec.json.encode(body), "more_body": False}
    ]
    status, parts, retry_after_s = 500, [], 0.0

    async def receive() -> Message:
        if not messages:
            await asyncio.get_running_loop().create_future()  # this client stays until it is cancelled
        return messages.pop()

    async def send(message: Message) -> None:
        nonlocal status, retry_after_s
        if message["type"] == "http.response.start":
            status = message["status"]
            given = dict(message["headers"]).get(b"retry-after", b"")
            retry_after_s = float(given) if given.isdigit() else 0.0
        elif message["type"] == "http.response.body":
            parts.append(bytes(message.get("body", b"")))

    with contextlib.suppress(Exception):  # it was logged, and answered with a 500
        await app(scope, receive, send)
    return Answer(status, b"".join(parts), retry_after_s)
