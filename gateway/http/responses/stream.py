"""A response as a stream of typed server-sent events, from any event on.

Made by routes.py. It writes the events of the whole response anew and leaves out what its client has, so that a
stream can be taken up at any front that has the journal.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from gateway.http.answers import KEEP_ALIVE
from gateway.http.errors import from_failure
from gateway.http.responses.answer import ResponseWriter
from gateway.http.streams import HEAD_S, KEEP_ALIVE_S, OUTAGE_CHECK_S, EventQueue, Reader, disconnected

_encode = msgspec.json.Encoder().encode


class ResponseStream(Response):
    """Server-sent events of one response, behind the event `starting_after`."""

    def __init__(
        self,
        reader: Reader,
        queue: EventQueue,
        writer: ResponseWriter,
        *,
        starting_after: int = -1,
        begins_at_once: bool,
    ) -> None:
        """`begins_at_once`: its head waits for no world, since nothing can change its status any more."""
        super().__init__(media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        del self.headers["content-length"]
        self._reader = reader
        self._queue = queue
        self._writer = writer
        self._starting_after = starting_after
        self._begins_at_once = begins_at_once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.ensure_future(disconnected(receive))
        watcher.add_done_callback(lambda _: self._queue.wake())
        try:
            await self._send_events(send, watcher)
        finally:
            watcher.cancel()
            self._reader.cancel()

    async def _send_events(self, send: Send, watcher: asyncio.Future[None]) -> None:
        writer, queue, started = self._writer, self._queue, False
        wait_s, sent_at = (0.0 if self._begins_at_once else HEAD_S), 0.0
        while True:
            outputs = await queue.take(wait_s)
            wait_s = OUTAGE_CHECK_S
            if watcher.done():
                return
            for output in outputs:
                writer.put(*output)
            if queue.error is not None:
                if not started and not self._begins_at_once:
                    raise from_failure(queue.error)
                writer.fail(queue.error)
            if not started:
                if not outputs and not self._begins_at_once and not self._reader.is_in_world:
                    continue
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            body = b"".join(
                [_event(event) for event in writer.take() if event["sequence_number"] > self._starting_after]
            )
            if not body and time.monotonic() >= sent_at + KEEP_ALIVE_S:
                body = KEEP_ALIVE
            if body or writer.ended:
                await send({"type": "http.response.body", "body": body, "more_body": not writer.ended})
                sent_at = time.monotonic()
            if writer.ended:
                return
            wait_s = max(0.0, sent_at + KEEP_ALIVE_S - time.monotonic())


def _event(event: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), _encode(event))
