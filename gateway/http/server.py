"""uvicorn as the front runs it: without its signal handlers, logs and sockets, with limits and TLS of ours.

Made by front.py.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from gateway.http.connections import ConnectionLimits, limited_protocol
from gateway.log import Logger
from gateway.tls import Certificates

KEEP_CONNECTION_S = 75
"""An idle HTTP connection stays open longer than clients keep one, so that none is closed under a request."""


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the front has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(
    app: ASGIApp, limits: ConnectionLimits, certificates: Certificates | None, log: Logger, shutdown_s: int
) -> HttpServer:
    """To be served on a socket that listens already."""

    def context(config: uvicorn.Config, default: object) -> ssl.SSLContext:
        assert certificates is not None
        return certificates.context

    return HttpServer(
        uvicorn.Config(
            app,
            loop="none",
            http=limited_protocol(limits, log),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_CONNECTION_S,
            timeout_graceful_shutdown=shutdown_s,
            ssl_context_factory=None if certificates is None else context,
        )
    )
