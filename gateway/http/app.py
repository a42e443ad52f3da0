"""The HTTP application of the front: routes, errors, request ids.

Made by front.py, served by uvicorn. Nothing here runs once a token.
"""

from __future__ import annotations

import uuid

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http.embeddings import Embeddings
from gateway.http.errors import ApiError
from gateway.http.openai import OpenAI
from gateway.http.operations import Operations
from gateway.http.v2.routes import InferenceV2
from gateway.inference.repository import Repository
from gateway.log import Logger
from gateway.metrics import FrontMetrics

MAX_REQUEST_ID = 128


def make_app(
    openai: OpenAI, operations: Operations, repository: Repository, metrics: FrontMetrics, log: Logger
) -> ASGIApp:
    """The application. Its own documentation pages are off: they would load from hosts of others."""
    app = FastAPI(title="Phalanx", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(openai.router())
    app.include_router(Embeddings(openai).router())
    app.include_router(openai.resumable.router())
    app.include_router(operations.router())
    app.include_router(InferenceV2(repository).router())

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        is_v2 = request.url.path == "/v2" or request.url.path.startswith("/v2/")
        return Response(
            error.encoded_v2() if is_v2 else error.encoded(),
            status_code=error.status,
            headers=error.headers(),
            media_type="application/json",
        )

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = f"{request.method} {request.url.path}: {error.detail}"
        answer = await api_error(request, ApiError(error.status_code, text))
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
    return RequestIds(app, metrics)


class RequestIds:
    """Echoes x-request-id, or makes one, and counts responses."""

    def __init__(self, app: ASGIApp, metrics: FrontMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = next(
            (value[:MAX_REQUEST_ID] for name, value in scope["headers"] if name == b"x-request-id"),
            None,
        )
        header = (b"x-request-id", request_id or uuid.uuid4().hex.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.http_responses[message["status"]] += 1
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await self._app(scope, receive, send_with_id)
