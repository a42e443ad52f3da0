"""The requests that the serving world has: each one's submission, under an id of its own, and its cancellation.

Owned by requests.py, which decides what is submitted and when; nothing here ends a request or writes it down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice

import msgspec

from gateway.control_messages import MOST_IN_FLIGHT_IDS, InFlight
from gateway.live_request import Outage, Request, World
from gateway.protocol import Cancel, Submit


class Submissions:
    """What was sent to the world and has not ended there, by its id in the world."""

    def __init__(self, leaves: Callable[[str], None]) -> None:
        """`leaves` is called with the id of what is cancelled, before the world is told."""
        self.world: World | None = None
        """The one that serves."""
        self._leaves = leaves
        self._requests: dict[str, Request] = {}

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def find(self, engine_id: str) -> Request | None:
        """None for what was cancelled, has ended, or was submitted again under another id."""
        return self._requests.get(engine_id)

    def submit(self, request: Request) -> None:
        """Into the world, behind what the journal has. Does nothing if no world serves."""
        world = self.world
        if world is None:
            return
        assert world.welcome is not None
        entry = request.entry
        if request.wait_timer is not None:
            request.wait_timer.cancel()
            request.wait_timer = None
        request.submissions += 1
        if request.submissions == 1:
            request.submitted_at = time.monotonic()
        if request.submissions > 1:
            request.engine_id = f"{entry.request_id}.{request.submissions}"
        request.epoch = world.welcome.epoch
        if request.submissions > 1:
            now = time.monotonic()
            if not request.outages or request.outages[-1].epoch is not None:
                request.outages.append(Outage(now, None))
            request.outages[-1].epoch, request.outages[-1].submitted_at = request.epoch, now
        self._requests[request.engine_id] = request
        params = entry.params
        if entry.prompt_logprobs is not None:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        world.send(
            Submit(
                request.engine_id,
                epoch=request.epoch,
                prompt_token_ids=entry.prompt_token_ids,
                output_token_ids=entry.output_token_ids,
                params=params,
                priority=entry.priority,
            )
        )

    def cancel(self, request: Request) -> None:
        """Takes it out of the world. Does nothing if the world has it no more."""
        if self._requests.pop(request.engine_id, None) is not None and self.world is not None:
            self._leaves(request.engine_id)
            self.world.send(Cancel(request.engine_id, request.epoch or 0))

    def forget(self, request: Request) -> None:
        """The world has nothing more of it."""
        self._requests.pop(request.engine_id, None)

    def in_flight(self, epoch: int) -> InFlight:
        """What that world has now, for the record of its end."""
        ids = dict.fromkeys(request.call_id for request in self)
        return InFlight(epoch, len(self._requests), tuple(islice(ids, MOST_IN_FLIGHT_IDS)))

    def clear(self) -> None:
        """No world serves."""
        self.world = None
        self._requests.clear()
