"""One line for each HTTP request that was answered, where `--access-log` asks for it. Made by app.py.

It has no headers, no query and no body: secrets and prompts are never in it.
"""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.keys import current
from gateway.log import Logger


class AccessLog:
    """Outermost, so that it sees what the client sees."""

    def __init__(self, app: ASGIApp, log: Logger) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status, size = 0, 0

        async def send_and_note(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            client, holder = scope.get("client"), current.get()
            self._log.info(
                "answered",
                client=client[0] if client else None,
                method=scope["method"],
                path=scope["path"],
                status=status or None,  # None: the client was gone before
                bytes=size,
                seconds=round(time.monotonic() - began, 6),
                key=holder.name if holder is not None else None,
            )
