"""The REST side of the Open Inference Protocol V2: everything under /v2.

What a model is and does is in gateway/inference; this turns HTTP into requests of it and back. Errors are
{"error": "text"} here, see app.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from gateway.http.answers import KEEP_ALIVE
from gateway.http.errors import ApiError
from gateway.http.openai import MAX_BODY_BYTES, read_body
from gateway.http.schema import decode_body
from gateway.http.v2.bodies import (
    HEADER_LENGTH,
    Parameters,
    decompress,
    generate_answer,
    infer_answer,
    read_generate,
    read_infer,
)
from gateway.inference.models import NO_SETTINGS, NO_SHARED_MEMORY, InferRequest, Part
from gateway.inference.repository import Repository, server_metadata

_T = TypeVar("_T")
_Handler = Callable[..., Awaitable[Response]]
_CLIENT_GONE = 499
_POSTED = ("/infer", "/generate", "/generate_stream")


class IndexBody(msgspec.Struct):
    ready: bool = False


class LoadBody(msgspec.Struct):
    parameters: Parameters | None = None


@dataclass(frozen=True)
class InferenceV2:
    """The endpoints. Each is there with and without a slash at its end."""

    repository: Repository
    max_body_bytes: int = MAX_BODY_BYTES

    def router(self) -> APIRouter:
        router = APIRouter()

        def add(method: str, path: str, handler: _Handler) -> None:
            for end in ("", "/"):
                router.add_api_route(path + end, handler, methods=[method])

        add("GET", "/v2", self.server)
        add("GET", "/v2/health/live", self.live)
        add("GET", "/v2/health/ready", self.ready)
        add("GET", "/v2/models", self.list_models)
        add("GET", "/v2/models/stats", self.all_statistics)
        add("POST", "/v2/repository/index", self.index)
        add("POST", "/v2/repository/models/{name:path}/load", self.load)
        add("POST", "/v2/repository/models/{name:path}/unload", self.unload)
        for kind in ("systemsharedmemory", "cudasharedmemory"):
            for method in ("GET", "POST"):
                router.add_api_route(f"/v2/{kind}/{{rest:path}}", self.shared_memory, methods=[method])
        for method in ("GET", "POST"):
            add(method, "/v2/trace/setting", self.settings)
            add(method, "/v2/models/{name:path}/trace/setting", self.model_settings)
            add(method, "/v2/logging", self.settings)
        for model in ("/v2/models/{name:path}/versions/{version}", "/v2/models/{name:path}"):
            add("GET", f"{model}/ready", self.model_ready)
            add("GET", f"{model}/config", self.config)
            add("GET", f"{model}/stats", self.statistics)
            add("POST", f"{model}/infer", self.infer)
            add("POST", f"{model}/generate", self.generate)
            add("POST", f"{model}/generate_stream", self.generate_stream)
        add("GET", "/v2/models/{name:path}/versions/{version}", self.model)
        router.add_api_route("/v2/models/{name:path}", self.model, methods=["GET"])
        return router

    # ----------------------------------------------------------------------- the server

    async def server(self) -> Response:
        return _json(server_metadata())

    async def live(self) -> Response:
        return _json({"live": True})

    async def ready(self) -> Response:
        ready = self.repository.is_ready
        return _json({"ready": ready}, 200 if ready else 503)

    async def list_models(self) -> Response:
        return _json({"models": self.repository.names})

    async def all_statistics(self) -> Response:
        return _json(self.repository.statistics())

    async def index(self, http: Request) -> Response:
        body = await self._body(http)
        only_ready = decode_body(body, IndexBody).ready if body else False
        return _json(self.repository.index(only_ready=only_ready))

    async def load(self, name: str, http: Request) -> Response:
        body = await self._body(http)
        parameters = decode_body(body, LoadBody).parameters if body else None
        self.repository.load(name, with_parameters=bool(parameters))
        return _json({})

    async def unload(self, name: str) -> Response:
        self.repository.unload(name)
        return _json({})

    async def shared_memory(self, rest: str) -> Response:
        raise ApiError(400, NO_SHARED_MEMORY)

    async def settings(self) -> Response:
        raise ApiError(400, NO_SETTINGS)

    async def model_settings(self, name: str) -> Response:
        raise ApiError(400, NO_SETTINGS)

    # ----------------------------------------------------------------------- a model

    async def model(self, name: str, version: str = "") -> Response:
        if name.rstrip("/").endswith(_POSTED):
            raise ApiError(405, f"Method Not Allowed: {name[:128]} is asked with POST")
        return _json(self.repository.find(name.rstrip("/"), version).spec.metadata)

    async def model_ready(self, name: str, version: str = "") -> Response:
        ready = self.repository.is_model_ready(name, version)
        return _json({"name": name, "ready": ready}, 200 if ready else 503)

    async def config(self, name: str, version: str = "") -> Response:
        return _json(self.repository.find(name, version).spec.config)

    async def statistics(self, name: str, version: str = "") -> Response:
        return _json(self.repository.statistics(name, version))

    async def infer(self, http: Request, name: str, version: str = "") -> Response:
        body = await self._body(http)
        spec = self.repository.find(name, version).spec
        request, wishes = read_infer(body, http.headers.get(HEADER_LENGTH), spec)
        outputs = await while_connected(http, self.repository.infer(name, version, request))
        if outputs is None:
            return Response(status_code=_CLIENT_GONE)
        content, headers = infer_answer(name, request, outputs, wishes)
        return Response(content, headers=headers)

    async def generate(self, http: Request, name: str, version: str = "") -> Response:
        request = await self._read_generate(http, name, version)
        outputs = await while_connected(http, self.repository.infer(name, version, request))
        if outputs is None:
            return Response(status_code=_CLIENT_GONE)
        return Response(generate_answer(name, request, outputs), media_type="application/json")

    async def generate_stream(self, http: Request, name: str, version: str = "") -> Response:
        request = await self._read_generate(http, name, version)
        return GenerateStream(name, request, self.repository.stream(name, version, request))

    # ----------------------------------------------------------------------- inside

    async def _body(self, http: Request) -> bytes:
        body = await read_body(http, self.max_body_bytes)
        encoding = http.headers.get("content-encoding", "").strip().lower()
        return decompress(body, encoding, self.max_body_bytes)

    async def _read_generate(self, http: Request, name: str, version: str) -> InferRequest:
        spec = self.repository.find(name, version).spec
        if all(tensor.name != "text_input" for tensor in spec.inputs):
            raise ApiError(400, f"model '{name}' has no input 'text_input'; ask it with infer")
        return read_generate(await self._body(http))


class GenerateStream(Response):
    """A response of server-sent events, one JSON object each. What fails before the first of them has the status of
    its error; what fails later becomes an event with an `error`."""

    def __init__(self, name: str, request: InferRequest, parts: AsyncGenerator[Part | None, None]) -> None:
        super().__init__(media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        del self.headers["content-length"]
        self._name = name
        self._request = request
        self._parts = parts
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        await _unless_disconnected(sending, receive)

    async def _send_all(self, send: Send) -> None:
        async with contextlib.aclosing(self._parts) as parts:
            try:
                async for part in parts:
                    await self._send(send, KEEP_ALIVE if part is None else self._event(part))
            except ApiError as error:
                if not self._started:
                    raise
                await self._send(send, _event(msgspec.json.encode({"error": error.message})))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})

    def _event(self, part: Part) -> bytes:
        return _event(generate_answer(self._name, self._request, part.outputs))


async def while_connected(http: Request, work: Awaitable[_T]) -> _T | None:
    """What the work brings; None, and the work is cancelled, if the client goes before."""
    task = asyncio.ensure_future(work)
    return task.result() if await _unless_disconnected(task, http.receive) else None


async def _unless_disconnected(task: asyncio.Future[Any], receive: Receive) -> bool:
    """Whether a task has come to its end before the client was gone; else it is cancelled. Raises what it raised."""
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False
        task.result()
        return True
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(data: bytes) -> bytes:
    return b"data: %b\n\n" % data


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")
