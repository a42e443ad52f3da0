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
from gateway.protocol import Cancel, Failed, ServerMessage, Submit, Tokens, Welcome
from tests.recovery.chaos.cases import BY_NAME, CASES, HTTP, ZMQ, Case
from tests.recovery.chaos.history import Delivery, End, Request

LEAVES = 0.06
"""Share of requests whose client goes away in mid-stream."""
LEAVES_WITHIN_S = 4.0
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
                await client.ask(case, request)
        except TimeoutError:
            request.left_at = time.time()


class _HttpClient:
    """Streams of server-sent events. Positions are characters, counted as they come."""

    def __init__(self, url: str, model: str, sign: asyncio.Event) -> None:
        self._model = model
        self._sign = sign
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits)

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, case: Case, request: Request) -> None:
        """Until the stream ends, in whatever way."""
        done = False
        try:
            async with self._client.stream("POST", "/v1/completions", json=case.body(self._model)) as answer:
                if answer.status_code != 200:
                    request.refused = f"{answer.status_code}: {(await answer.aread()).decode()[:300]}"
                    return
                request.accepted_at = time.time()
                reader = _EventReader(request)
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        done = True
                    elif line.startswith("data:"):
                        reader.read(json.loads(line[5:]))
                    self._sign.set()
        except (httpx.HTTPError, ValueError) as error:
            self._fail(request, repr(error))
            return
        if not done:
            self._fail(request, "the stream ended without [DONE]")

    @staticmethod
    def _fail(request: Request, text: str) -> None:
        request.error = request.error or text


class _EventReader:
    """From the events of one stream to the record of its request."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._lengths: dict[int, int] = {}
        self._num_logprobs = 0

    def read(self, event: dict[str, Any]) -> None:
        request, now = self._request, time.time()
        if "error" in event:
            request.error = request.error or json.dumps(event["error"])
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
    """All requests over one connection, made when it is needed and again when it is lost."""

    def __init__(self, endpoint: str, sign: asyncio.Event) -> None:
        self._endpoint = endpoint
        self._sign = sign
        self._context: zmq.Context[Any] = zmq.Context()
        self._connection: Connection | None = None
        self._welcomed = asyncio.Event()
        self._live: dict[str, tuple[Request, asyncio.Event]] = {}

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._context.destroy(linger=0)

    async def ask(self, case: Case, request: Request) -> None:
        """Until the request ends, in whatever way."""
        ended = asyncio.Event()
        try:
            connection = await self._connect()
            self._live[request.name] = (request, ended)
            params = msgspec.structs.replace(case.params, grammar=case.grammar)
            connection.send(Submit(request.name, prompt=case.prompt, params=params, stop=list(case.stop)))
            async with asyncio.timeout(TIMEOUT_S):
                await ended.wait()
        except ConnectionLost as error:
            request.error = request.error or repr(error)
        finally:
            if self._live.pop(request.name, None) is not None and self._connection is not None:
                self._leave(request)

    def _leave(self, request: Request) -> None:
        if not request.ends and request.error is None and self._connection is not None:
            try:
                self._connection.send(Cancel(request.name))
            except ConnectionLost:
                return

    async def _connect(self) -> Connection:
        if self._connection is None:
            self._welcomed.clear()
            self._connection = Connection(
                self._context,
                self._endpoint,
                on_welcome=self._welcome,
                on_message=self._receive,
                on_lost=self._lost,
                name="chaos",
            )
        await self._welcomed.wait()
        if self._connection is None:
            raise ConnectionLost("lost before it was made")
        return self._connection

    def _welcome(self, _welcome: Welcome) -> None:
        self._welcomed.set()

    def _receive(self, message: ServerMessage) -> None:
        now = time.time()
        if isinstance(message, Tokens):
            for output in message.outputs:
                found = self._live.get(output.request_id)
                if found is None:
                    continue
                request, ended = found
                request.accepted_at = request.accepted_at or now
                if output.token_ids:
                    request.deliveries.append(Delivery(now, 0, output.position, output.token_ids))
                if output.finish_reason is not None:
                    request.ends.append(End(now, 0, output.finish_reason))
                    ended.set()
        elif isinstance(message, Failed) and message.request_id in self._live:
            request, ended = self._live[message.request_id]
            text = f"{message.code}: {message.message}"
            if request.accepted_at is None:
                request.refused = text
            else:
                request.error = text
            ended.set()
        self._sign.set()

    def _lost(self, reason: str) -> None:
        self._connection = None
        self._welcomed.set()  # those who wait see that there is none
        for request, ended in self._live.values():
            request.error = request.error or f"connection lost: {reason}"
            ended.set()
