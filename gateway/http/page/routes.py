"""The page at `/` and the stream of events that feeds it. Mounted by app.py unless `--no-page` was given.

Reads what the front has in memory; must never wait for a world, nor load anything from another host.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from pathlib import Path

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from gateway.http.errors import ApiError
from gateway.http.operations import Operations

PAGE = Path(__file__).parent / "page.html"
LOOK_S = 0.05
"""How often a stream of events looks whether a world, a rank or a fault has changed: that is told at once."""
BEAT_S = 0.5
"""How often it tells steps, heartbeats and figures, which change all the time."""
MAX_VIEWERS = 64


def content_security_policy(html: str) -> str:
    """Nothing but the page's own inline style and script, named by their hashes, and this server for data (CSP
    level 3, section 2.3.1)."""

    def hashes(tag: str) -> str:
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in contents]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; style-src {hashes('style')}; script-src {hashes('script')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Page:
    """The page, read once, and its events."""

    def __init__(self, operations: Operations) -> None:
        html = PAGE.read_text()
        self._operations = operations
        self._body = html.encode()
        self._viewers = 0
        self._headers = {
            "cache-control": "no-cache",  # kept by the browser, and asked for by its tag
            "etag": f'"{hashlib.sha256(self._body).hexdigest()[:20]}"',
            "content-security-policy": content_security_policy(html),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
        }

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/", self.page, methods=["GET", "HEAD"], include_in_schema=False)
        router.add_api_route("/cluster/events", self.events, methods=["GET"], include_in_schema=False)
        return router

    async def page(self, http: Request) -> Response:
        tags = [tag.strip().removeprefix("W/") for tag in http.headers.get("if-none-match", "").split(",")]
        if self._headers["etag"] in tags:
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, media_type="text/html", headers=self._headers)

    async def events(self) -> Response:
        """Server-sent events, each what `/cluster` answers with `figures` beside it: at every change of a world or
        a fault, and every half second. Raises ApiError when too many listen."""
        if self._viewers >= MAX_VIEWERS:
            text = f"{MAX_VIEWERS} viewers follow the cluster already; ask /cluster instead"
            raise ApiError(503, text, code="too_many_viewers")
        return _Events(self)

    async def stream(self, send: Send, gone: asyncio.Future[None]) -> None:
        """Sends events until the viewer is gone or the front drains."""
        self._viewers += 1
        try:
            seen: object = None
            sent_at = 0.0
            while not gone.done():
                now = time.monotonic()
                state = self._state()
                if state != seen or now - sent_at >= BEAT_S:
                    seen, sent_at = state, now
                    body = b"data: " + msgspec.json.encode(await self._snapshot()) + b"\n\n"
                    draining = self._operations.requests.draining
                    await send({"type": "http.response.body", "body": body, "more_body": not draining})
                    if draining:
                        return
                await asyncio.wait((gone,), timeout=LOOK_S)
        finally:
            self._viewers -= 1

    def _state(self) -> object:
        """What is told at once when it changes."""
        table = self._operations.worlds.table
        serving = self._operations.worlds.serving_epoch
        draining = self._operations.requests.draining
        if table is None:
            return serving, draining
        worlds = [
            (w.epoch, w.state, [(r.rank, r.pid, r.state == "parked") for r in w.ranks]) for w in table.worlds
        ]
        faults = [
            (fault.epoch, fault.at, fault.recover_s, fault.resume_s, fault.abort_s) for fault in table.faults
        ]
        return serving, draining, worlds, faults, table.notice

    async def _snapshot(self) -> dict[str, object]:
        metrics, requests = self._operations.metrics, self._operations.requests
        stats = metrics.stats
        running = stats.num_running if stats else 0
        figures = {
            "at": time.time(),
            "model": metrics.model,
            "ready": self._operations.why_not_ready(),
            "draining": requests.draining,
            "generation_tokens": metrics.generation_tokens,
            "prompt_tokens": metrics.prompt_tokens,
            "accepted": metrics.accepted,
            "replays": metrics.replays,
            "live": metrics.live,
            "running": running,
            "waiting": max(metrics.live - running, 0),
            "kv_blocks_used": stats.kv_blocks_used if stats else 0,
            "kv_blocks_total": stats.kv_blocks_total if stats else 0,
        }
        return {**self._operations.describe(), "figures": figures}


class _Events(Response):
    """One viewer's stream."""

    def __init__(self, page: Page) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.headers["x-accel-buffering"] = "no"
        del self.headers["content-length"]
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await self._page.stream(send, gone)
        finally:
            gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
