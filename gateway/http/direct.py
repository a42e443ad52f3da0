"""The way of a request past the framework: the endpoints that carry the load are called by path, without the layers,
the search for a route and the dependencies of FastAPI, which take three times as long as a bare endpoint.

Made by app.py, inside of everything that decides who may ask. FastAPI has the same routes, for their documentation
and for other methods.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http.errors import ApiError

Endpoint = Callable[[Request], Awaitable[Response]]
OnError = Callable[[Request, Exception], Awaitable[Response]]


class DirectRoutes:
    """Calls the endpoint of a POST to a known path, else the application."""

    def __init__(
        self, app: ASGIApp, endpoints: Mapping[str, Endpoint], on_api_error: OnError, on_failure: OnError
    ) -> None:
        """`endpoints` by path. `on_api_error` and `on_failure` make the answers to what endpoints raise."""
        self._app = app
        self._endpoints = dict(endpoints)
        self._on_api_error = on_api_error
        self._on_failure = on_failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"]) if scope["type"] == "http" else None
        if endpoint is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        request = Request(scope, receive)
        try:
            response = await endpoint(request)
            await response(scope, receive, watched_send)
        except ClientDisconnect:
            return  # nobody waits for an answer
        except Exception as error:
            if started:
                raise
            answer = self._on_api_error if isinstance(error, ApiError) else self._on_failure
            await (await answer(request, error))(scope, receive, send)
