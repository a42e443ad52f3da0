"""Who may ask: API keys, their limits, and the Host that a request is for. One layer around the application, made by
app.py only where a deployment asks for it; nothing here runs once a token.
"""

from __future__ import annotations

import math

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http.errors import ApiError
from gateway.keys import Holder, KeyRing, current

OPEN_PATHS = frozenset(
    {
        "/",
        "/ping",
        "/health",
        "/health/live",
        "/health/ready",
        "/health/accepting",
        "/v2/health/live",
        "/v2/health/ready",
    }
)
"""What probes ask, and the page, which is a file without anything of the deployment in it."""


class Gate:
    """Lets requests with a good key through, and counts them for its holder."""

    def __init__(self, app: ASGIApp, keys: KeyRing, *, open_metrics: bool) -> None:
        self._app = app
        self._keys = keys
        self._open = OPEN_PATHS | ({"/metrics"} if open_metrics else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["path"] in self._open and scope["method"] in ("GET", "HEAD")):
            await self._app(scope, receive, send)
            return
        holder = self._keys.find(key_of(scope["headers"]))
        if holder is None:
            text = (
                "there is no good API key with this request; send one as `Authorization: Bearer KEY` "
                "or as `x-api-key: KEY`"
            )
            error = ApiError(401, text, code="invalid_api_key", should_retry=False)
            await send_error(scope, send, error, [(b"www-authenticate", b"Bearer")])
            return
        current.set(holder)
        if not holder.is_limited:
            await self._app(scope, receive, send)
            return
        refused = holder.take_request() if scope["method"] == "POST" else None
        if refused is not None:
            await send_error(scope, send, over_limit(holder, *refused), holder.headers())
            return

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *holder.headers()]
            await send(message)

        await self._app(scope, receive, send_with_limits)


class Hosts:
    """Refuses requests for hosts that this is not: a name that somebody else points here is no way in."""

    def __init__(self, app: ASGIApp, allowed: frozenset[str]) -> None:
        """`allowed`: names in lower case, without ports."""
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS - {"/"}:
            host = next((value for name, value in scope["headers"] if name == b"host"), b"")
            if without_port(host.decode("latin-1")) not in self._allowed:
                text = f"this server does not answer for the host {host[:100]!r}; see --allowed-hosts"
                await send_error(scope, send, ApiError(421, text, code="host_not_allowed"))
                return
        await self._app(scope, receive, send)


def key_of(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The key that a request brings: bearer, or Anthropic's header; empty without one."""
    other = b""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                return key.strip()
        elif name == b"x-api-key":
            other = value.strip()
    return other


def over_limit(holder: Holder, kind: str, wait_s: float) -> ApiError:
    """The error of a request that its holder may not make yet."""
    bucket = holder.requests if kind == "requests" else holder.tokens
    limit = bucket.limit if bucket is not None else 0
    text = f"the key {holder.name!r} may use {limit} {kind} a minute; try again in {wait_s:.1f} s"
    return ApiError(
        429,
        text,
        type=kind,
        code="rate_limit_exceeded",
        retry_after_s=max(1, math.ceil(wait_s)),
        should_retry=True,
    )


def without_port(host: str) -> str:
    """The name in a Host header."""
    name = host.lower()
    if name.startswith("["):
        return name.partition("]")[0] + "]"
    return name.partition(":")[0]


async def send_error(
    scope: Scope, send: Send, error: ApiError, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    """An error in the words of whoever the path is for."""
    path: str = scope["path"]
    if path.startswith("/v1/messages"):
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(error.status, "invalid_request_error")
        body = msgspec.json.encode(
            {"type": "error", "error": {"type": kind, "message": error.message}},
        )
    elif path.startswith("/v2/") and path != "/v2/rerank":
        body = error.encoded_v2()
    else:
        body = error.encoded()
    own = [(name.encode(), value.encode()) for name, value in error.headers().items()]
    start = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    message = {
        "type": "http.response.start",
        "status": error.status,
        "headers": [*start, *own, *(headers or [])],
    }
    await send(message)
    await send({"type": "http.response.body", "body": body})
