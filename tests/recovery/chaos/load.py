"""The load: clients that ask without pause, over HTTP and ZeroMQ, and write down all that they see.

Used by the campaign. The counting is done here and not by the project's clients, so that what they would repair or
refuse is seen. A client judges nothing: that is the checker's.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import zmq

from gateway.connection import Connection
from gateway.errors import ConnectionLost
from gateway.protocol import Cancel, Failed, Output, ServerMessage, Submit, Tokens, Welcome
from tests.recovery.chaos.cases import BY_NAME, CASES, HTTP, ZMQ, Case
from tests.recovery.chaos.history import Delivery, End, Request

LEAVES = 0.06
"""Share of requests whose client goes away in mid-stream."""
LEAVES_WITHIN_S = 4.0
RECONNECT_S = 0.1
PAUSE_S = 0.3
"""The most that a client waits between two requests."""
TIMEOUT_S = 300.0
"""After so long without a word a client gives up; the checker has called it an outage long before."""


class Load:
    """Clients in the running asyncio loop, from `start` to `drain`."""

    def __init__(self, url: str, endpoint: str, model: str, dice: random.Random, prefix: str) -> None:
        """`prefix` makes the names of the requests unique over several deployments."""
        self.requests: list[Request] = []
        """All of them, in the order in which they were sent."""
        self.sign = asyncio.Event()
        """Set whenever a client has seen something; cleared by who waits for it."""
        self._dice = dice
        self._prefix = prefix
        self._draining = False
        self._number = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._http = _HttpClient(url, model, self.sign)
        self._zmq = _ZmqClient(endpoint, self.sign)

    def start(self, num_http: int, num_zmq: int) -> None:
        for via, count in ((HTTP, num_http), (ZMQ, num_zmq)):
            for _ in range(count):
                seed = self._dice.getrandbits(32)
                self._tasks.append(asyncio.create_task(self._work(via, random.Random(seed))))

    def burst(self, count: int) -> None:
        """So many long prompts at once: the next steps are prefill."""
        case = BY_NAME["greedy, long prompt"]
        for _ in range(count):
            self._tasks.append(asyncio.create_task(self._ask(case, HTTP, None)))

    async def ask_once(self, case: Case, via: str) -> Request:
        """One question to its end, as any client asks it."""
        await self._ask(case, via, None)
        return self.requests[-1]

    @property
    def in_flight(self) -> list[Request]:
        """Requests that were accepted and have no end yet."""
        return [
            request
            for request in self.requests[-200:]
            if request.accepted_at is not None
            and request.error is None
            and request.left_at is None
            and len(request.ends) < BY_NAME[request.case].num_choices
        ]

    async def wait_flowing(self, since: float, timeout_s: float) -> bool:
        """Until something has reached a client after this Unix time; False if nothing has within `timeout_s`."""
        return await self._wait(lambda: self._last_delivery() > since, timeout_s)

    async def drain(self, timeout_s: float) -> bool:
        """Starts no more requests and waits for those under way; False if some have no end after `timeout_s`."""
        self._draining = True
        _, left = await asyncio.wait(self._tasks, timeout=timeout_s) if self._tasks else (set(), set())
        for task in left:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.close()
        self._zmq.close()
        for task in self._tasks:
            if task not in left and not task.cancelled() and (error := task.exception()) is not None:
                raise error
        return not left

    def _last_delivery(self) -> float:
        return max((r.deliveries[-1].at for r in self.requests[-200:] if r.deliveries), default=0.0)

    async def _wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    self.sign.clear()
                    await self.sign.wait()
        except TimeoutError:
            return False
        return True

    async def _work(self, via: str, dice: random.Random) -> None:
        cases = [case for case in CASES if via in case.via]
        weights = [case.weight for case in cases]
        while not self._draining:
            leaves_s = dice.uniform(0.05, LEAVES_WITHIN_S) if dice.random() < LEAVES else None
            await self._ask(dice.choices(cases, weights)[0], via, leaves_s)
            await asyncio.sleep(dice.uniform(0, PAUSE_S))

    async def _ask(self, case: Case, via: str, leaves_s: float | None) -> None:
        self._number += 1
        request = Request(f"{self._prefix}{via}-{self._number}", case.name, sent_at=time.time())
        self.requests.append(request)
        client = self._http if via == HTTP else self._zmq
        try:
            async with asyncio.timeout(leaves_s):
                await client.ask(case, request, leaves_s is not None)
        except TimeoutError:
            request.left_at = time.time()


class _HttpClient:
    """Streams of server-sent events. Positions are characters, counted as they come. A stream that breaks is taken up
    behind the last event that was read; a question that was never answered is asked again with its key."""

    def __init__(self, url: str, model: str, sign: asyncio.Event) -> None:
        self._model = model
        self._sign = sign
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits)

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, case: Case, request: Request, leaves: bool) -> None:
        """Until the stream ends, in whatever way. A client that `leaves` sends no key, so that its going away ends
        the request."""
        reader = _EventReader(request)
        give_up_at = time.monotonic() + TIMEOUT_S
        while not reader.is_done and request.refused is None and request.error is None:
            try:
                await self._connect(case, request, reader, leaves)
            except (httpx.HTTPError, ValueError) as error:
                if time.monotonic() > give_up_at:
                    request.error = request.error or repr(error)
                    return
                request.reconnects += 1
                await asyncio.sleep(RECONNECT_S)

    async def _connect(self, case: Case, request: Request, reader: _EventReader, leaves: bool) -> None:
        if reader.id is None:
            headers = {"accept": "text/event-stream"}
            headers |= {} if leaves else {"idempotency-key": request.name}
            body = case.body(self._model)
            stream = self._client.stream("POST", "/v1/completions", json=body, headers=headers)
        else:
            headers = {"last-event-id": reader.last_event} if reader.last_event else {}
            stream = self._client.stream("GET", f"/v1/requests/{reader.id}/stream", headers=headers)
        async with stream as answer:
            if answer.status_code != 200:
                text = f"{answer.status_code}: {(await answer.aread()).decode()[:300]}"
                if request.accepted_at is None:
                    request.refused = text
                else:
                    request.error = text
                return
            request.accepted_at = request.accepted_at or time.time()
            reader.id = answer.headers.get("x-phalanx-request-id", reader.id)
            async for line in answer.aiter_lines():
                reader.read_line(line)
                self._sign.set()
        if not reader.is_done and request.error is None:
            # The front says goodbye to a stream only by [DONE]: this is its death.
            raise httpx.RemoteProtocolError("the stream ended without [DONE]")


class _EventReader:
    """From the events of one stream to the record of its request."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._lengths: dict[int, int] = {}
        self._num_logprobs = 0
        self._event_id = ""
        self.id: str | None = None
        """The server's name of the request."""
        self.last_event = ""
        """Id of the last event that was read."""
        self.is_done = False

    def read_line(self, line: str) -> None:
        """One line of the stream; an event is its id and then its data."""
        if line.startswith("id:"):
            self._event_id = line[3:].strip()
        elif line == "data: [DONE]":
            self.is_done = True
        elif line.startswith("data:"):
            self._read(json.loads(line[5:]))
            self.last_event = self._event_id

    def _read(self, event: dict[str, Any]) -> None:
        request, now = self._request, time.time()
        if "error" in event:
            request.error = request.error or json.dumps(event["error"])
            request.error_at = request.error_at or now
        if event.get("usage") is not None:
            request.completion_tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", []):
            index, text = choice["index"], choice["text"]
            position = self._lengths.get(index, 0)
            if text:
                request.deliveries.append(Delivery(now, index, position, text))
                self._lengths[index] = position + len(text)
            if choice.get("logprobs") is not None:
                self._num_logprobs += len(choice["logprobs"]["tokens"])
                # Each token has exactly one: a repeated or lost one shows here even where its text is empty.
                request.completion_tokens = self._num_logprobs
            if choice["finish_reason"] is not None:
                request.ends.append(End(now, index, choice["finish_reason"]))


class _ZmqClient:
    """All requests over one connection. When it is lost, each is submitted again on the next one, with its key and
    the tokens that it has brought."""

    def __init__(self, endpoint: str, sign: asyncio.Event) -> None:
        self._endpoint = endpoint
        self._sign = sign
        self._context: zmq.Context[Any] = zmq.Context()
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()
        self._live: dict[str, _Live] = {}

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._context.destroy(linger=0)

    async def ask(self, case: Case, request: Request, leaves: bool) -> None:
        """Until the request ends, in whatever way."""
        live = self._live[request.name] = _Live(case, request)
        give_up_at = time.monotonic() + TIMEOUT_S
        try:
            while not live.ended.is_set():
                try:
                    connection = await self._connect(live)
                    connection.send(live.submit())
                    await live.moved(give_up_at - time.monotonic())
                except ConnectionLost as error:
                    if time.monotonic() > give_up_at:
                        request.error = request.error or repr(error)
                        return
                    request.reconnects += 1
                    await asyncio.sleep(RECONNECT_S)
        except TimeoutError:
            request.error = request.error or "no end in sight"
        finally:
            del self._live[request.name]
            if not live.ended.is_set():
                self._cancel(request.name)

    def _cancel(self, name: str) -> None:
        if self._connection is not None:
            try:
                self._connection.send(Cancel(name))
            except ConnectionLost:
                return

    async def _connect(self, live: _Live) -> Connection:
        """The connection, made if there is none. Raises ConnectionLost."""
        live.lost.clear()
        async with self._connecting:
            if self._connection is not None:
                return self._connection
            welcomed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def welcome(_welcome: Welcome) -> None:
                if not welcomed.done():
                    welcomed.set_result(None)

            def lost(reason: str) -> None:
                self._lost()
                if not welcomed.done():
                    welcomed.set_exception(ConnectionLost(reason))

            connection = Connection(
                self._context,
                self._endpoint,
                on_welcome=welcome,
                on_message=self._receive,
                on_lost=lost,
                name="chaos",
            )
            try:
                await welcomed
            except BaseException:
                connection.close()
                raise
            self._connection = connection
            return connection

    def _receive(self, message: ServerMessage) -> None:
        now = time.time()
        if isinstance(message, Tokens):
            for output in message.outputs:
                if (live := self._live.get(output.request_id)) is not None:
                    live.take(output, now)
        elif isinstance(message, Failed) and message.request_id in self._live:
            self._live[message.request_id].fail(f"{message.code}: {message.message}")
        self._sign.set()

    def _lost(self) -> None:
        self._connection = None
        for live in self._live.values():
            live.lost.set()


class _Live:
    """One request of the ZeroMQ client that has not ended."""

    def __init__(self, case: Case, request: Request) -> None:
        self.request = request
        self.ended = asyncio.Event()
        self.lost = asyncio.Event()
        """Set when the connection is gone on which it was submitted."""
        self._case = case
        self._tokens: list[int] = []

    def submit(self) -> Submit:
        return Submit(
            self.request.name,
            prompt=self._case.prompt,
            params=msgspec.structs.replace(self._case.params, grammar=self._case.grammar),
            stop=list(self._case.stop),
            output_token_ids=self._tokens,
            key=self.request.name,
        )

    async def moved(self, timeout_s: float) -> None:
        """Until it has ended. Raises ConnectionLost if the connection goes first, and TimeoutError."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self.ended, self.lost)]
        try:
            done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not done:
            raise TimeoutError
        if not self.ended.is_set():
            raise ConnectionLost("the connection is gone")

    def take(self, output: Output, now: float) -> None:
        request = self.request
        request.accepted_at = request.accepted_at or now
        if output.token_ids:
            request.deliveries.append(Delivery(now, 0, output.position, output.token_ids))
            self._tokens = self._tokens + output.token_ids
        if output.finish_reason is not None:
            request.ends.append(End(now, 0, output.finish_reason))
            self.ended.set()

    def fail(self, text: str) -> None:
        if self.request.accepted_at is None:
            self.request.refused = text
        else:
            self.request.error, self.request.error_at = text, time.time()
        self.ended.set()
