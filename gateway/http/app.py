"""The HTTP application of the front: routes, errors, request ids.

Made by front.py, served by uvicorn. Nothing here runs once a token.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import uuid

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.access import Access
from gateway.http.access_log import AccessLog
from gateway.http.anthropic.routes import PATH as MESSAGES_PATH
from gateway.http.anthropic.routes import Messages
from gateway.http.anthropic.schema import encoded_error
from gateway.http.batches.routes import Batches
from gateway.http.compat import Compat, package_version
from gateway.http.description import description_router
from gateway.http.direct import DirectRoutes
from gateway.http.embeddings import Embeddings
from gateway.http.errors import ApiError
from gateway.http.gate import Gate, Hosts
from gateway.http.openai import OpenAI
from gateway.http.operations import Operations
from gateway.http.page.routes import Page
from gateway.http.ranking import Ranking
from gateway.http.responses.routes import Responses
from gateway.http.v2.routes import InferenceV2
from gateway.inference.repository import Repository
from gateway.keys import KeyRing
from gateway.log import Logger, request_id_of_log
from gateway.metrics import FrontMetrics
from gateway.tracing import TraceContexts

MAX_REQUEST_ID = 128
LARGE_BODY_BYTES = 65536
COLLECT_AFTER_S = 0.1
"""When the answer to a large body that was refused has been sent."""
KSERVE_PREFIX = "/openai"
"""Servers behind KServe have OpenAI's endpoints under /openai/v1, too."""


def make_app(
    openai: OpenAI,
    operations: Operations,
    repository: Repository,
    batches: Batches,
    metrics: FrontMetrics,
    log: Logger,
    with_page: bool = True,
    access: Access | None = None,
    keys: KeyRing | None = None,
) -> ASGIApp:
    """The application. FastAPI's own documentation pages are off: they would load from hosts of others."""
    app = FastAPI(title="Phalanx", version=package_version(), docs_url=None, redoc_url=None, openapi_url=None)
    embeddings = Embeddings(openai)
    of_openai = [
        openai.router(),
        embeddings.router(),
        openai.resumable.router(),
        Responses(openai).router(),
        Messages(openai).router(),
        batches.router(),
    ]
    for router in of_openai:
        app.include_router(router)
    app.include_router(Compat(openai, operations).router())
    app.include_router(Ranking(embeddings).router())
    app.include_router(operations.router())
    if with_page:
        app.include_router(Page(operations).router())
    access = access or Access()
    app.include_router(InferenceV2(repository, access.max_body_bytes).router())
    app.include_router(description_router(app, KSERVE_PREFIX))
    for router in of_openai:  # last, since routes are tried in their order
        app.include_router(router, prefix=KSERVE_PREFIX)

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return Response(
            _encoded(error, request.url.path),
            status_code=error.status,
            headers=error.headers(),
            media_type="application/json",
        )

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = f"{error.detail} ({request.method} {request.url.path})"
        if error.status_code == 404 and not _is_inference_v2(request.url.path):
            text = f"Invalid URL ({request.method} {request.url.path})"
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        answer = await api_error(request, ApiError(error.status_code, text, code=code))
        answer.headers.update(error.headers or {})
        return answer

    async def server_error(request: Request, error: Exception) -> Response:
        log.error("http", path=request.url.path, exc_info=error)
        return await api_error(
            request, ApiError(500, "the server failed; its log says why", type="server_error")
        )

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, server_error)
    batches.start(app)
    endpoints = {
        prefix + path: endpoint
        for prefix in ("", KSERVE_PREFIX)
        for path, endpoint in (
            ("/v1/chat/completions", openai.chat_completions),
            ("/v1/completions", openai.completions),
        )
    }
    direct = DirectRoutes(app, endpoints, api_error, server_error)
    return _guarded(direct, metrics, log, access, keys)


def _guarded(
    app: ASGIApp, metrics: FrontMetrics, log: Logger, access: Access, keys: KeyRing | None
) -> ASGIApp:
    """The application with the layers that the deployment asks for; what it does not ask for costs nothing."""
    if keys is not None:
        app = Gate(app, keys, open_metrics=access.open_metrics)
    if access.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=access.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
            max_age=600,
        )
    if access.allowed_hosts:
        app = Hosts(app, access.allowed_hosts)
    if access.otlp_endpoint:
        app = TraceContexts(app)
    app = RequestIds(app, metrics)
    return AccessLog(app, log) if access.access_log else app


def _encoded(error: ApiError, path: str) -> bytes:
    """As the clients of this path expect errors."""
    if path.removeprefix(KSERVE_PREFIX).startswith(MESSAGES_PATH):
        return encoded_error(error)
    return error.encoded_v2() if _is_inference_v2(path) else error.encoded()


def _is_inference_v2(path: str) -> bool:
    """Whether errors there are {"error": "text"}."""
    return (path == "/v2" or path.startswith("/v2/")) and path != "/v2/rerank"


def _is_large(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a body is so long that it should not wait for the next collection; one of unknown length may be."""
    length = next((value for name, value in headers if name == b"content-length"), None)
    if length is None:
        return any(name == b"transfer-encoding" for name, _ in headers)
    return not length.isdigit() or int(length) > LARGE_BODY_BYTES


class RequestIds:
    """Echoes x-request-id, or makes one, and counts responses."""

    def __init__(self, app: ASGIApp, metrics: FrontMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._collects = False
        front = uuid.uuid4().hex[:16].encode()
        self._own_ids = (b"%b%016x" % (front, number) for number in itertools.count(1))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = b""
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                request_id = value[:MAX_REQUEST_ID]
                break
        header = (b"x-request-id", request_id or next(self._own_ids))
        request_id_of_log.set(header[1])

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.http_responses[message["status"]] += 1
                if message["status"] >= 400 and _is_large(scope["headers"]):
                    self._collect_soon()
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await self._app(scope, receive, send_with_id)

    def _collect_soon(self) -> None:
        """The frames of an error hold on to the body, and may hold on to each other."""
        if not self._collects:
            self._collects = True
            asyncio.get_running_loop().call_later(COLLECT_AFTER_S, self._collect)

    def _collect(self) -> None:
        self._collects = False
        gc.collect(1)
