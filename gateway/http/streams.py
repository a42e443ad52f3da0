"""From the front's requests to HTTP responses: collecting answers, and server-sent events.

A call outlives its connection, see calls.py; a group (of requests whose answers are not made of tokens) does not.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from fastapi import Response
from starlette.types import Receive, Scope, Send

from gateway.calls import Call, Calls
from gateway.errors import RequestFailed
from gateway.http.answers import Answer, Choice
from gateway.http.connections import TOO_SLOW, Hangup
from gateway.http.errors import from_failure
from gateway.http.logprobs import Placed
from gateway.http.reading import EventId, Reading, Target
from gateway.live_request import Request
from gateway.protocol import Output, SamplingParams
from gateway.requests import Requests

KEEP_ALIVE_S = 5.0
"""A stream that has nothing to say sends a comment so often, so that nobody on the way closes it."""
HEAD_S = 0.1
"""After so long, or with the first event, a stream whose requests are in a world sends its status and headers: by
these its client can take it up again."""
MOST_UNREAD = 2048
"""Outputs that wait for a client, or MOST_UNREAD_OF_A_CHOICE for each choice if that is more: beyond them its stream
ends. The journal has what it did not read."""
MOST_UNREAD_OF_A_CHOICE = 64
OUTAGE_CHECK_S = 1.0
"""How often one that waits for a world looks whether it is in one."""


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


_NOTHING: list[Placed] = []


class _ChoiceSink:
    """Takes the outputs of one choice to the group's target."""

    __slots__ = ("_index", "_target")

    def __init__(self, target: Target, index: int) -> None:
        self._target = target
        self._index = index

    def output(self, request: Request, output: Output) -> None:
        self._target.put(self._index, output, _NOTHING)

    def failed(self, request: Request, error: RequestFailed) -> None:
        self._target.fail(error)


@dataclass(frozen=True)
class Ask:
    """What the requests of a group have in common beside their sampling."""

    stop: list[str]
    priority: int = 0
    deadline_s: float | None = None
    timeout_s: float | None = None
    """What was asked, of which `deadline_s` is left."""


class Group:
    """The requests behind one HTTP request that ends with its connection: for each prompt `num_choices` of them."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._members: list[Request] = []

    def submit(
        self,
        prompts: list[list[int]],
        params: list[SamplingParams],
        ask: Ask,
        target: Target,
    ) -> None:
        """Accepts all or none: `params` has an element for each prompt and choice, prompt by prompt. Raises
        RequestFailed."""
        per_prompt = len(params) // len(prompts)
        self._requests.check_admission(len(params), sum(map(len, prompts)) * per_prompt)
        try:
            for index, choice_params in enumerate(params):
                sink = _ChoiceSink(target, index)
                prompt = prompts[index // per_prompt]
                request = self._requests.accept(
                    prompt,
                    choice_params,
                    ask.stop,
                    sink,
                    priority=ask.priority,
                    deadline_s=ask.deadline_s,
                    timeout_s=ask.timeout_s,
                )
                self._members.append(request)
        except RequestFailed:
            self.cancel()
            raise

    def cancel(self) -> None:
        for request in self._members:
            self._requests.cancel(request)


class Reader:
    """One client at a call."""

    def __init__(self, calls: Calls, call: Call, reading: Reading) -> None:
        self._calls = calls
        self._call = call
        self._reading = reading

    @property
    def is_in_world(self) -> bool:
        """Whether the call cannot end as "no world came" any more."""
        return self._call.is_in_world

    def cancel(self) -> None:
        """It reads no more; what becomes of the call is the call's business."""
        self._calls.leave(self._call, self._reading)

    def drop(self) -> None:
        """The server reads no more to it: the call goes on, unless its client wanted it to end then."""
        self._calls.leave(self._call, self._reading, keep=True)


class Collector:
    """Gathers whole answers; nobody is woken before the last of them."""

    def __init__(self, num_choices: int) -> None:
        self.choices = [Choice(index) for index in range(num_choices)]
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._running = num_choices
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def put(self, index: int, output: Output, placed: list[Placed]) -> None:
        choice = self.choices[index]
        choice.num_tokens += len(output.token_ids)
        if placed:
            choice.placed += placed
        if output.logprobs is not None:
            choice.logprob_sum += sum(entry.logprob for entry in output.logprobs)
        if output.prompt_logprobs is not None:
            choice.prompt_logprobs = output.prompt_logprobs
        if output.text:
            self._texts[index].append(output.text)
        if output.finish_reason is not None:
            choice.text = "".join(self._texts[index])
            choice.finish_reason, choice.stop_reason = output.finish_reason, output.stop_reason
            self._running -= 1
            if self._running == 0 and not self.done.done():
                self.done.set_result(None)

    def fail(self, error: RequestFailed) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    async def wait(self, reader: Reader, receive: Receive, hangup: Hangup | None = None) -> list[Choice]:
        """All answers. Raises ApiError, or ClientGone after the reader was cancelled."""
        await wait_for(self.done, reader, receive, hangup)
        return self.choices


class EventQueue:
    """Outputs on their way into a stream; what came while the client was slow goes out at once."""

    def __init__(self, num_choices: int = 1) -> None:
        self.error: RequestFailed | None = None
        self.is_overfull = False
        """The client did not read; what waited for it is gone."""
        self._most = max(MOST_UNREAD, MOST_UNREAD_OF_A_CHOICE * num_choices)
        self._events: list[tuple[int, Output, list[Placed]]] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, output: Output, placed: list[Placed]) -> None:
        if len(self._events) >= self._most:
            self._overflow()
        if self.is_overfull:
            return
        self._events.append((index, output, placed))
        self.wake()

    def fail(self, error: RequestFailed) -> None:
        self.error = self.error or error
        self.wake()

    def _overflow(self) -> None:
        self.is_overfull = True
        self._events.clear()
        text = (
            f"{self._most} events waited for this client, which did not read; the request goes on, and its "
            "stream can be taken up behind the last event: GET /v1/requests/ID/stream"
        )
        self.fail(RequestFailed("unavailable", text))

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self, timeout_s: float) -> list[tuple[int, Output, list[Placed]]]:
        """What there is; waits for something up to `timeout_s`."""
        if not self._events and self.error is None:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(timeout_s, self.wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        events, self._events = self._events, []
        return events


class EventStream(Response):
    """A response of server-sent events, each with an id by which the stream can be taken up behind it, where its
    client reads such. What fails before its head is sent has the status of its error; what fails later becomes an
    event with an `error`."""

    def __init__(
        self, reader: Reader, queue: EventQueue, answer: Answer, at: EventId, *, with_ids: bool = True
    ) -> None:
        """`at`: where the client is. Without ids each event is one line of data, for clients that read lines."""
        super().__init__(media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        del self.headers["content-length"]
        self._reader = reader
        self._queue = queue
        self._answer = answer
        self._at = at
        self._with_ids = with_ids
        self._running = sum(not place.ended for place in at.places)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.ensure_future(disconnected(receive))
        watcher.add_done_callback(lambda _: self._queue.wake())
        try:
            await self._send_events(send, watcher)
        finally:
            watcher.cancel()
            if self._queue.is_overfull or scope.get("state", {}).get(TOO_SLOW):
                self._reader.drop()
            else:
                self._reader.cancel()

    async def _send_events(self, send: Send, watcher: asyncio.Future[None]) -> None:
        queue, started, wait_s = self._queue, False, HEAD_S
        sent_at = 0.0
        while True:
            events = await queue.take(wait_s) if self._running > 0 else []
            wait_s = OUTAGE_CHECK_S
            if watcher.done():
                return
            body = b"".join([self._render(*event) for event in events])
            ends = self._running == 0
            if queue.error is not None and not ends:
                error = from_failure(queue.error)
                if not started:
                    raise error
                body += self._answer.failed(self._at.encoded() if self._with_ids else None, error)
                ends = True
            elif ends:
                if not self._at.has_usage and (usage := self._answer.last_chunk()):
                    body += self._framed(self._at.usage(), usage)
                body += self._answer.ended(self._at.done() if self._with_ids else None)
            # Tokens that have no text yet are no events either.
            if not body and started and time.monotonic() >= sent_at + KEEP_ALIVE_S:
                body = self._answer.keep_alive(with_ids=self._with_ids)
            if not started:
                if not body and not self._reader.is_in_world:
                    continue
                started, sent_at = True, time.monotonic()
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": not ends})
                sent_at = time.monotonic()
            wait_s = max(0.0, sent_at + KEEP_ALIVE_S - time.monotonic())
            if ends:
                return

    def _render(self, index: int, output: Output, placed: list[Placed]) -> bytes:
        begin, chunk = self._answer.chunk(index, output, placed)
        body = self._framed(self._at.begin(index), begin) if begin else b""
        ended = output.finish_reason is not None
        self._running -= ended
        event_id = self._at.advance(index, len(output.token_ids), ended)
        return body + self._framed(event_id, chunk) if chunk else body

    def _framed(self, event_id: bytes, data: bytes) -> bytes:
        return self._answer.framed(event_id if self._with_ids else None, data)


async def wait_for(
    done: asyncio.Future[None], group: Group | Reader, receive: Receive, hangup: Hangup | None = None
) -> None:
    """Waits until an answer is complete, or its client is gone. Raises ApiError, or ClientGone; whatever still
    runs of a group is cancelled. `hangup`: of the connection, where that is known; it is cheaper than to receive."""

    def give_up() -> None:
        if not done.done():
            done.set_exception(ClientGone())

    watcher = None
    if hangup is not None:
        hangup.add(give_up)
    else:
        watcher = asyncio.ensure_future(disconnected(receive))
        watcher.add_done_callback(lambda watcher: None if watcher.cancelled() else give_up())
    try:
        await done
    except RequestFailed as error:
        raise from_failure(error) from None
    finally:
        if hangup is not None:
            hangup.discard(give_up)
        if watcher is not None:
            watcher.cancel()
        group.cancel()


async def disconnected(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
