"""Clients for Python: AsyncClient for asyncio, Client for everybody else.

They speak gateway/protocol.py to the front or straight to rank 0. Client is AsyncClient in a thread of its
own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

from gateway.async_client import (
    CONNECT_TIMEOUT_S,
    RECONNECT_S,
    TOKEN_TIMEOUT_S,
    WINDOW_TOKENS,
    AsyncClient,
)
from gateway.connection import SERVER_SILENCE_S
from gateway.errors import ConnectionLost, GatewayError, RequestFailed, RequestTimeout
from gateway.generation import Generation, Prompt, numbers_of, scored
from gateway.output_streams import AsyncStream, Stream
from gateway.protocol import Output, Pooling, SamplingParams, Stats, Welcome

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Client",
    "ConnectionLost",
    "GatewayError",
    "Generation",
    "Output",
    "Pooling",
    "RequestFailed",
    "RequestTimeout",
    "SamplingParams",
    "Stream",
]

_T = TypeVar("_T")


class Client:
    """AsyncClient for synchronous code; may be used by several threads at once.

        with Client("tcp://127.0.0.1:5555") as client:
            print(client.generate("Once upon a time", SamplingParams(max_tokens=32)).text)

    A thread of its own keeps the connection alive while the caller is busy with something else.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        name: str = "",
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        token_timeout_s: float = TOKEN_TIMEOUT_S,
        silence_s: float = SERVER_SILENCE_S,
        reconnect_s: float = RECONNECT_S,
        window_tokens: int = WINDOW_TOKENS,
        server_key: str | Path | None = None,
        client_key: str | Path | None = None,
    ) -> None:
        """As AsyncClient; nothing is connected yet."""
        self._client = AsyncClient(
            endpoint,
            name=name,
            connect_timeout_s=connect_timeout_s,
            token_timeout_s=token_timeout_s,
            silence_s=silence_s,
            reconnect_s=reconnect_s,
            window_tokens=window_tokens,
            server_key=server_key,
            client_key=client_key,
        )
        self._token_timeout_s = token_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def endpoint(self) -> str:
        return self._client.endpoint

    @property
    def welcome(self) -> Welcome:
        """What the server said of itself. Raises ConnectionLost when not connected."""
        return self._client.welcome

    @property
    def stats(self) -> Stats | None:
        """The last state of the engine that rank 0 sent."""
        return self._client.stats

    def connect(self) -> Welcome:
        """Connects, also again after a loss; raises as AsyncClient.connect does."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="phalanx-client", daemon=True)
            self._thread.start()
        try:
            return asyncio.run_coroutine_threadsafe(self._client.connect(), self._loop).result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the connection and ends its thread."""
        if self._loop is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None

    def __enter__(self) -> Client:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        output_token_ids: Sequence[int] = (),
        request_id: str | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        continuation: str | None = None,
    ) -> Stream:
        """Sends a request and returns its stream of outputs, see AsyncClient.submit."""
        wait_s = self._token_timeout_s if timeout_s is None else timeout_s
        stream = Stream(request_id or self._client._new_id(), wait_s, self._cancel)
        stream._report(self._note_read, self._client._window_tokens // 2)
        self._call(
            lambda: self._client._submit(
                stream.request_id,
                prompt,
                params,
                stop,
                output_token_ids,
                stream._put,
                priority,
                deadline_s,
                continuation,
            )
        )
        return stream

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> Generation:
        """Sends a request and waits for its end. Raises as Stream does."""
        stream = self.submit(prompt, params, stop=stop, timeout_s=timeout_s)
        try:
            return stream.collect()
        except KeyboardInterrupt:
            stream.cancel()
            raise

    def embed(
        self,
        prompt: Prompt,
        *,
        kind: Literal["last", "mean"] = "last",
        normalize: bool = True,
        timeout_s: float | None = None,
    ) -> list[float]:
        """The prompt as `hidden_size` numbers, see AsyncClient.embed."""
        params = SamplingParams(pooling=Pooling(kind, normalize))
        return numbers_of(self.generate(prompt, params, timeout_s=timeout_s))

    def score(self, prompt: Prompt, continuation: Prompt, *, timeout_s: float | None = None) -> list[float]:
        """The log-probability of each token of `continuation`, see AsyncClient.score."""
        return numbers_of(self.submit(**scored(prompt, continuation), timeout_s=timeout_s).collect())

    def _cancel(self, request_id: str) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._client._cancel, request_id)

    def _note_read(self, request_id: str, num_read: int) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._client._note_read, request_id, num_read)

    def _call(self, function: Callable[[], _T]) -> _T:
        """Runs a function in the client's thread and waits for it; it never waits itself."""
        if self._loop is None:
            raise ConnectionLost("the client is not connected; call connect()")
        result: Future[_T] = Future()

        def run() -> None:
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return result.result()
