"""/openapi.json and /docs: what the routes take and answer, made from the types that read the bodies.

Mounted by app.py. The page loads its scripts from this server (they come with a package), never from another host.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fastapi_offline
import msgspec
from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse

from gateway.http.answer_bodies import ChatAnswer, TextAnswer
from gateway.http.anthropic.schema import CountRequest, MessagesRequest
from gateway.http.batches.routes import BatchRequest
from gateway.http.compat import DetokenizeRequest, TokenizeAnswer, TokenizeRequest
from gateway.http.embeddings import EmbeddingRequest
from gateway.http.ranking import RerankRequest, ScoreRequest
from gateway.http.responses.schema import ResponseRequest
from gateway.http.schema import ChatRequest, CompletionRequest
from gateway.http.v2.bodies import GenerateBody, InferBody
from gateway.http.v2.routes import IndexBody, LoadBody

DOCS_PATH = "/docs"
OPENAPI_PATH = "/openapi.json"
_ASSETS = Path(fastapi_offline.__file__).parent / "static"
_ASSET_TYPES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}

_BODIES: dict[str, type] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/responses": ResponseRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/v1/batches": BatchRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/score": ScoreRequest,
    "/v1/score": ScoreRequest,
    "/rerank": RerankRequest,
    "/v1/rerank": RerankRequest,
    "/v2/rerank": RerankRequest,
}
_V2_BODIES: dict[str, type] = {
    "infer": InferBody,
    "generate": GenerateBody,
    "generate_stream": GenerateBody,
    "index": IndexBody,
    "load": LoadBody,
}
_ANSWERS: dict[str, type] = {
    "/v1/chat/completions": ChatAnswer,
    "/v1/completions": TextAnswer,
    "/tokenize": TokenizeAnswer,
}
_STREAMS = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
    "/v1/responses/{response_id}",
}
_OTHER_ANSWERS = {
    "/metrics": "text/plain",
    "/v1/files/{file_id}/content": "application/octet-stream",
    "/v1/requests/{call_id}/stream": "text/event-stream",
}
_EMPTY_ANSWERS = {"/health", "/ping"}
_LIST = [("limit", "integer"), ("after", "string")]
_QUERIES: dict[str, list[tuple[str, str]]] = {
    "/v1/responses/{response_id}": [("stream", "boolean"), ("starting_after", "integer")],
    "/v1/responses/{response_id}/input_items": [*_LIST, ("order", "string")],
    "/v1/files": [*_LIST, ("order", "string"), ("purpose", "string")],
    "/v1/batches": _LIST,
    "/v1/requests/{call_id}/stream": [("last_event_id", "string")],
}
_KEYED = {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"}
"""POSTs with an Idempotency-Key."""
_UPLOAD = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer"},
    },
    "required": ["file", "purpose"],
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_ERROR_V2 = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
_TEMPLATE = "#/components/schemas/{name}"


def description_router(app: FastAPI, prefix: str) -> APIRouter:
    """The routes. `prefix`: under which OpenAI's endpoints are once more."""
    router = APIRouter()
    described: list[bytes] = []

    async def show_openapi() -> Response:
        """The OpenAPI document of this server."""
        if not described:  # made once, and only where somebody asks
            described.append(msgspec.json.encode(describe(app, prefix)))
        return Response(described[0], media_type="application/json")

    async def show_docs() -> Response:
        """The same as a page."""
        return get_swagger_ui_html(
            openapi_url=OPENAPI_PATH.lstrip("/"),  # relative, so that it also works behind a proxy's prefix
            title="Phalanx",
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon.png",
        )

    def asset(name: str) -> None:
        async def show_asset() -> Response:
            return FileResponse(_ASSETS / name, media_type=_ASSET_TYPES[name])

        router.add_api_route(f"{DOCS_PATH}/{name}", show_asset, methods=["GET"], include_in_schema=False)

    router.add_api_route(OPENAPI_PATH, show_openapi, methods=["GET"], include_in_schema=False)
    router.add_api_route(DOCS_PATH, show_docs, methods=["GET"], include_in_schema=False)
    for name in _ASSET_TYPES:
        asset(name)
    return router


def describe(app: FastAPI, prefix: str) -> dict[str, Any]:
    """The OpenAPI document of the application's routes."""
    document = app.openapi()
    types = sorted(
        {*_BODIES.values(), *_V2_BODIES.values(), *_ANSWERS.values()}, key=lambda kind: kind.__name__
    )
    references, components = msgspec.json.schema_components(types, ref_template=_TEMPLATE)
    schema_of = dict(zip(types, references, strict=True))
    document["components"] = {"schemas": {**components, "Error": _ERROR, "ErrorV2": _ERROR_V2}}
    for full_path, operations in document["paths"].items():
        path = full_path.removeprefix(prefix)
        for method, operation in operations.items():
            _describe_operation(path, method, operation, schema_of)
    return document


def _describe_operation(
    path: str, method: str, operation: dict[str, Any], schema_of: dict[type, dict[str, Any]]
) -> None:
    operation["summary"] = re.sub(r"`", "", operation.pop("description", operation["summary"]))
    is_post = method == "post"
    if path == "/v1/files" and is_post:
        operation["requestBody"] = _body(_UPLOAD, "multipart/form-data")
    elif path in _BODIES and is_post:
        operation["requestBody"] = _body(schema_of[_BODIES[path]])
    elif is_post and path.startswith("/v2/"):
        end = path.rstrip("/").rpartition("/")[2]
        schema = schema_of[_V2_BODIES[end]] if end in _V2_BODIES else {"type": "object"}
        operation["requestBody"] = _body(schema)
    parameters = operation.setdefault("parameters", [])
    for parameter in parameters:
        parameter.setdefault("schema", {"type": "string"})
    if method == "get":
        for name, kind in _QUERIES.get(path, ()):
            parameters.append({"name": name, "in": "query", "schema": {"type": kind}})
    if is_post and path in _KEYED:
        header = {"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "maxLength": 255}}
        parameters.append(header)
    operation["responses"] = _responses(path, method, schema_of)


def _responses(path: str, method: str, schema_of: dict[type, dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if (kind := _OTHER_ANSWERS.get(path)) is not None:
        content[kind] = {"schema": {"type": "string"}}
    elif path not in _EMPTY_ANSWERS:
        answer = _ANSWERS.get(path) if method == "post" else None
        content["application/json"] = {"schema": schema_of[answer] if answer is not None else {}}
    if path in _STREAMS:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    if path.rstrip("/").endswith("/generate_stream"):
        content = {"text/event-stream": {"schema": {"type": "string"}}}
    if path.rstrip("/").endswith("/infer"):
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    responses: dict[str, Any] = {"200": {"description": "What was asked for."}}
    if content:
        responses["200"]["content"] = content
    if path == "/v1/requests/{call_id}/stream":
        responses["204"] = {"description": "The client has all of it."}
    if path in ("/health/ready", "/health/accepting"):
        responses["503"] = {"description": "Why not.", "content": {"application/json": {"schema": {}}}}
    if path in _EMPTY_ANSWERS:
        responses["503"] = {"description": "No world serves."}
        return responses
    is_v2 = path.startswith("/v2") and path != "/v2/rerank"
    error = {"$ref": f"#/components/schemas/{'ErrorV2' if is_v2 else 'Error'}"}
    responses["default"] = {
        "description": "An error.",
        "content": {"application/json": {"schema": error}},
    }
    return responses


def _body(schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
    return {"required": True, "content": {kind: {"schema": schema}}}
