"""AsyncClient: requests to the front, or straight to rank 0, from an asyncio loop.

It speaks gateway/protocol.py with many requests in flight on one connection. A front that was lost is found again,
and requests go on where they were; beyond that it retries nothing: an error says what happened, and what was received
stays valid. Users import it from gateway/client.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import zmq

from gateway.connection import SERVER_SILENCE_S, Connection
from gateway.curve import ClientKeys, CurveError
from gateway.errors import ConnectionLost, GatewayError, RequestFailed
from gateway.generation import Generation, Prompt, numbers_of, scored, submitted
from gateway.inflight import Inflight
from gateway.output_streams import AsyncStream, Event
from gateway.protocol import (
    Cancel,
    Credit,
    Failed,
    Output,
    Pooling,
    SamplingParams,
    ServerMessage,
    Stats,
    Submit,
    Tokens,
    Welcome,
)

CONNECT_TIMEOUT_S = 10.0
RECONNECT_S = 60.0
"""How long a lost front may take to come back, with a world behind it."""
FIRST_RETRY_S = 0.05
LAST_RETRY_S = 1.0
WINDOW_TOKENS = 1024
"""Default of how many tokens of a request may wait here to be read."""
TOKEN_TIMEOUT_S = 300.0
"""Default of how long a request may bring no token: longer than a world needs to come back."""


class AsyncClient:
    """A connection to the front or to rank 0, in the running asyncio loop.

        async with AsyncClient("tcp://127.0.0.1:5555") as client:
            async for output in client.submit("Once upon a time", SamplingParams(max_tokens=32)):
                print(output.text, end="")

    When the connection to a front is lost, a new one is made, for up to `reconnect_s`, and every request in flight
    goes on behind the tokens that have come. If no front comes back, and with a rank 0 at once, every request in
    flight raises ConnectionLost; `connect` makes a new connection.
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
        """`window_tokens`: how many tokens of a request may come before its stream is read on; the front keeps the
        rest until then. 0: it sends everything at once. `server_key`, `client_key`: for a server with CURVE, its
        public key (40 characters, or the file) and this client's secret file; default: what PHALANX_ZMQ_SERVER_KEY
        and PHALANX_ZMQ_CLIENT_KEY say. Raises CurveError. `reconnect_s`: how long a front that was lost may take to
        come back; 0: it is not waited for. `silence_s`: a server that answers nothing for so long is taken for dead.
        Raise it for a rank 0 whose single steps take seconds; the front always answers at once."""
        self.endpoint = endpoint
        self.stats: Stats | None = None
        """The last state of the engine that rank 0 sent."""
        self._name = name
        self._connect_timeout_s = connect_timeout_s
        self._token_timeout_s = token_timeout_s
        self._silence_s = silence_s
        self._reconnect_s = reconnect_s
        self._window_tokens = window_tokens
        self._has_credit = False
        if (server_key is None) != (client_key is None):
            raise CurveError("give both server_key and client_key, or neither")
        if server_key is not None and client_key is not None:
            self._curve: ClientKeys | None = ClientKeys.read(server_key, client_key)
        else:
            self._curve = ClientKeys.from_environment()
        self._resuming: asyncio.Task[None] | None = None
        self._keys = secrets.token_hex(16)
        """Begins the keys of this client's requests: nobody else can guess them."""
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._connection: Connection | None = None
        self._is_front = False
        self._lost_because = "it was never made"
        self._requests: dict[str, Inflight] = {}
        self._numbers = itertools.count(1)

    @property
    def welcome(self) -> Welcome:
        """What the server said of itself: model, world, limits. Raises ConnectionLost when not connected."""
        if self._connection is None or self._connection.welcome is None:
            raise self._lost_error()
        return self._connection.welcome

    async def connect(self) -> Welcome:
        """Connects, also again after a loss. Raises EndpointError, or ConnectionLost when nobody answers
        within `connect_timeout_s` or the server refuses."""
        await self.close()
        self._context = zmq.Context()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                return await self._open()
        except TimeoutError:
            await self.close()
            raise ConnectionLost(
                f"no answer from {self.endpoint} within {self._connect_timeout_s:g} s; is a server there?"
            ) from None
        except BaseException:
            await self.close()
            raise

    async def _open(self) -> Welcome:
        """Makes a connection and waits for its welcome, without end. Raises EndpointError and ConnectionLost."""
        assert self._context is not None
        welcomed: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()

        def lost(reason: str) -> None:
            if not welcomed.done():
                welcomed.set_exception(ConnectionLost(f"{self.endpoint} did not accept the client: {reason}"))
            else:
                self._lose(reason)

        def welcome(message: Welcome) -> None:
            if not welcomed.done():
                welcomed.set_result(message)

        connection = Connection(
            self._context,
            self.endpoint,
            on_welcome=welcome,
            on_message=self._receive,
            on_lost=lost,
            name=self._name,
            silence_s=max(self._silence_s, self._connect_timeout_s),
            curve=self._curve,
        )
        try:
            message = await welcomed
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._is_front = message.epoch == 0
        self._has_credit = "credit" in message.capabilities
        return message

    async def close(self) -> None:
        """Closes the connection. Requests in flight raise ConnectionLost; the server cancels them when it
        finds nobody to send their next token to."""
        if self._resuming is not None:
            self._resuming.cancel()
            self._resuming = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._give_up("the client closed it")
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    async def __aenter__(self) -> AsyncClient:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

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
    ) -> AsyncStream:
        """Sends a request and returns its stream of outputs.

        `prompt`: text (the front only) or token ids. `stop`: stop strings (the front only).
        `output_token_ids`: tokens that this request brought earlier; generation goes on behind them.
        `timeout_s`: how long it may bring no token, default `token_timeout_s` of the client.
        `priority`: lower is served first. `deadline_s`: how long it may take in all (the front only); then it ends
        as RequestFailed with the code "timeout". `continuation`: see `score`. Raises ConnectionLost.
        """
        wait_s = self._token_timeout_s if timeout_s is None else timeout_s
        stream = AsyncStream(request_id or self._new_id(), wait_s, self._cancel)
        stream._report(self._note_read, self._window_tokens // 2)
        self._submit(
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
        return stream

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> Generation:
        """Sends a request and waits for its end. Raises as AsyncStream does; cancelling the caller cancels
        the request."""
        stream = self.submit(prompt, params, stop=stop, timeout_s=timeout_s)
        try:
            return await stream.collect()
        except asyncio.CancelledError:
            stream.cancel()
            raise

    async def embed(
        self,
        prompt: Prompt,
        *,
        kind: Literal["last", "mean"] = "last",
        normalize: bool = True,
        timeout_s: float | None = None,
    ) -> list[float]:
        """The prompt as `hidden_size` numbers: the last token's hidden state, or the mean over all tokens, divided by
        its length if `normalize`. Raises as AsyncStream does."""
        params = SamplingParams(pooling=Pooling(kind, normalize))
        return numbers_of(await self.generate(prompt, params, timeout_s=timeout_s))

    async def score(
        self, prompt: Prompt, continuation: Prompt, *, timeout_s: float | None = None
    ) -> list[float]:
        """The log-probability of each token of `continuation` behind `prompt` and the tokens before it. Both are text
        (the front only), tokenized each by itself, or both are token ids. Raises as AsyncStream does."""
        stream = self.submit(**scored(prompt, continuation), timeout_s=timeout_s)
        try:
            return numbers_of(await stream.collect())
        except asyncio.CancelledError:
            stream.cancel()
            raise

    def _new_id(self) -> str:
        return f"{self._name or 'request'}-{next(self._numbers)}"

    def _submit(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None,
        stop: Sequence[str],
        output_token_ids: Sequence[int],
        deliver: Callable[[Event], None],
        priority: int = 0,
        deadline_s: float | None = None,
        continuation: str | None = None,
    ) -> None:
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is already in flight")
        resuming = self._connection is None and self._resuming is not None
        message = Submit(
            request_id,
            epoch=0 if resuming else self.welcome.epoch,
            **submitted(prompt),
            output_token_ids=list(output_token_ids),
            params=params or SamplingParams(),
            stop=list(stop),
            priority=priority,
            continuation=continuation,
            deadline_s=deadline_s,
            key=f"{self._keys}-{next(self._numbers)}" if self._is_front and self._reconnect_s > 0 else "",
            credit=self._window_tokens if self._has_credit and self._window_tokens else None,
        )
        request = Inflight(deliver, message)
        if not resuming:
            assert self._connection is not None  # welcome raises otherwise
            self._connection.send(message)
        self._requests[request_id] = request

    def _cancel(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        request.cancelled = True
        if self._connection is not None:
            with contextlib.suppress(ConnectionLost):
                self._connection.send(Cancel(request_id))

    def _note_read(self, request_id: str, num_read: int) -> None:
        """So many tokens of a request have been read: as many more may come."""
        request = self._requests.get(request_id)
        if request is None or request.message.credit is None:
            return
        more = request.allow(num_read + self._window_tokens)
        if self._connection is not None and more > 0:
            with contextlib.suppress(ConnectionLost):
                self._connection.send(Credit(request_id, more))

    def _receive(self, message: ServerMessage) -> None:
        if isinstance(message, Tokens):
            for output in message.outputs:
                self._deliver(output)
        elif isinstance(message, Failed) and message.request_id is not None:
            request = self._requests.pop(message.request_id, None)
            if request is not None:
                request.deliver(
                    RequestFailed(message.code, message.message, message.request_id, message.retry_after_s)
                )
        elif isinstance(message, Stats):
            self.stats = message

    def _deliver(self, output: Output) -> None:
        request = self._requests.get(output.request_id)
        if request is None:
            return
        if not request.take(output) or output.finish_reason is not None:
            del self._requests[output.request_id]

    def _lose(self, reason: str) -> None:
        """The connection is gone. A front may come back; so may the requests that have a key."""
        self._connection = None
        if not self._is_front or self._reconnect_s <= 0:
            self._give_up(reason)
        elif self._resuming is None:
            self._lost_because = reason
            self._resuming = asyncio.get_running_loop().create_task(self._resume(reason))

    async def _resume(self, reason: str) -> None:
        """Finds the front again, and submits again what is in flight, with what it has brought."""
        wait_s = FIRST_RETRY_S
        try:
            async with asyncio.timeout(self._reconnect_s):
                while True:
                    try:
                        await self._open()
                        self._submit_again()
                        break
                    except ConnectionLost:
                        await asyncio.sleep(wait_s)
                        wait_s = min(2 * wait_s, LAST_RETRY_S)
        except TimeoutError:
            self._resuming = None
            self._give_up(f"{reason}, and it did not come back within {self._reconnect_s:g} s")
        except GatewayError as error:
            self._resuming = None
            self._give_up(str(error))
        else:
            self._resuming = None
            if self._connection is None:  # lost again meanwhile
                self._lose(reason)

    def _submit_again(self) -> None:
        """What is in flight, with what it has brought. Raises ConnectionLost."""
        for request in list(self._requests.values()):
            if self._connection is None:
                raise self._lost_error()
            self._connection.send(request.again(self._has_credit))
            if request.cancelled:
                self._connection.send(Cancel(request.message.request_id))

    def _give_up(self, reason: str) -> None:
        self._lost_because = reason
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.deliver(self._lost_error())

    def _lost_error(self) -> ConnectionLost:
        return ConnectionLost(f"no connection to {self.endpoint}: {self._lost_because}; call connect()")
