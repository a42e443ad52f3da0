"""API keys over gRPC: the metadata `authorization: Bearer KEY` or `x-api-key: KEY`. Made by server.py."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from gateway.http.gate import key_of, over_limit
from gateway.keys import KeyRing, current

_OPEN = frozenset(
    {
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ServerReady",
    }
)
_COUNTED = ("/ModelInfer", "/ModelStreamInfer")
_NO_KEY = "there is no good API key with this call; send the metadata `authorization: Bearer KEY`"


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Lets calls with a good key through, and counts them for its holder."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if details.method in _OPEN or handler is None:
            return handler
        headers = [(name.encode(), _bytes(value)) for name, value in details.invocation_metadata or ()]
        holder = self._keys.find(key_of(headers))
        if holder is None:
            return _refusal(handler, grpc.StatusCode.UNAUTHENTICATED, _NO_KEY)
        current.set(holder)
        refused = holder.take_request() if details.method.endswith(_COUNTED) else None
        if refused is None:
            return handler
        text = over_limit(holder, *refused).message
        wait_s = max(1, math.ceil(refused[1]))
        return _refusal(handler, grpc.StatusCode.RESOURCE_EXHAUSTED, text, (("retry-after", str(wait_s)),))


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def _refusal(
    handler: Any, code: grpc.StatusCode, text: str, trailing: tuple[tuple[str, str], ...] = ()
) -> Any:
    """A handler of the same kind that ends the call."""

    async def refuse(request: Any, context: Any) -> None:
        await context.abort(code, text, trailing)

    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)
