"""The front's requests: from acceptance, through any number of worlds, to the last token.

Fed by worlds.py (messages of the active world) and called by the HTTP and ZeroMQ servers, all in one asyncio
loop. A token goes into the journal before anybody sees it, and to the client exactly once.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from gateway.admission import MAX_WAITING_TOKENS, WaitingRoom
from gateway.checks import check_request
from gateway.control_messages import Fault, InFlight
from gateway.errors import RequestFailed
from gateway.journal import Journal, JournalCall, JournalEntry
from gateway.keys import current as current_holder
from gateway.known_world import KnownWorld
from gateway.live_request import Request, Sink, World
from gateway.log import Logger
from gateway.metrics import FrontMetrics
from gateway.protocol import (
    ErrorCode,
    FinishReason,
    Output,
    SamplingParams,
    ServerMessage,
    Welcome,
)
from gateway.quarantine import Quarantine, is_suspect
from gateway.rank0 import with_seed
from gateway.replay import ReplayQueue
from gateway.request_timers import RequestTimers
from gateway.shared_counts import SharedCounts
from gateway.submissions import Submissions
from gateway.text import TextModel
from gateway.token_path import TokenPath
from gateway.tracing import incoming as incoming_trace
from gateway.world_claim import WorldClaim


class Requests:
    """All live requests and the rules of their lives. The one place that submits, replays and ends them."""

    def __init__(
        self,
        journal: Journal,
        text: TextModel,
        metrics: FrontMetrics,
        log: Logger,
        *,
        max_wait_s: float,
        max_waiting: int,
        max_waiting_tokens: int = MAX_WAITING_TOKENS,
        shared: SharedCounts | None = None,
        claim: WorldClaim | None = None,
    ) -> None:
        """`max_wait_s`: how long a new request waits for a world. `max_waiting`, `max_waiting_tokens`: how
        many requests may be without a first token, and how long their prompts may be together; with several fronts
        over all that count in `shared`. `claim`: how this front has a world for itself then."""
        self.max_wait_s = max_wait_s
        self._known = KnownWorld(journal)
        self.in_flight: InFlight | None = None
        """What the last world had that was lost."""
        self.resumed_at: float | None = None
        """Unix time at which the first replayed request got a token in the world that serves."""
        self.after_batch: list[Callable[[], None]] = []
        """Called when a batch of outputs has been handed to the sinks."""
        self.on_resumed: Callable[[], None] = lambda: None
        self.on_ended: Callable[[Request, FinishReason | None], None] = lambda request, reason: None
        """Called for each request that has ended; without a reason it failed."""
        self._journal = journal
        self._text = text
        self._metrics = metrics
        self._log = log
        self.waiting = WaitingRoom(max_waiting, max_waiting_tokens, shared)
        self._live: dict[str, Request] = {}
        self.draining = False
        self._closing = False
        self._timers = RequestTimers(self.fail)
        self._replays = ReplayQueue()
        self._quarantine = Quarantine(self, journal, metrics, log, claim)
        self._submissions = Submissions(self._quarantine.leaves)
        self._token_path = TokenPath(self, self._submissions, self._quarantine, journal, metrics, log)
        self._numbers = itertools.count(journal.last_number + 1)

    # ----------------------------------------------------------------------- for the servers

    @property
    def serving(self) -> bool:
        return self._submissions.world is not None and not self.draining

    @property
    def welcome(self) -> Welcome | None:
        """Of the last world that served; its limits hold while there is none."""
        return self._known.welcome

    @property
    def num_live(self) -> int:
        """Requests that have been accepted and have not ended."""
        return len(self._live)

    def drain(self) -> None:
        """Accepts nothing any more; what runs goes on."""
        self.draining = True

    async def known_welcome(self) -> Welcome:
        """What is known of the model's world. Waits up to `max_wait_s` for the first one, then raises
        RequestFailed(unavailable)."""
        try:
            return await self._known.wait(self.max_wait_s)
        except TimeoutError:
            raise self._unavailable() from None

    def check_admission(self, count: int, num_prompt_tokens: int) -> None:
        """Raises RequestFailed if the server ends, or if so many more requests, with so many tokens together, would
        be too many."""
        if self.draining:
            raise self.refused("unavailable", "the server is shutting down; try again later")
        try:
            self.waiting.check(count, num_prompt_tokens, time.monotonic())
        except RequestFailed as error:
            self._metrics.refused[error.code] += 1
            raise

    def refused(self, code: ErrorCode, message: str) -> RequestFailed:
        """The error of a request that is not taken on, counted."""
        self._metrics.refused[code] += 1
        return RequestFailed(code, message)

    def accept(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        stop: list[str],
        sink: Sink,
        output_token_ids: list[int] | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        timeout_s: float | None = None,
        call: JournalCall | None = None,
    ) -> Request:
        """Takes a request on, from now on it is not lost. Its outputs go to `sink`, never before this
        returns. One of a `call` outlives this process, too, once the caller has committed the call.

        `output_token_ids`: tokens that the client has from earlier; they are not sent again. `deadline_s`: after
        how many seconds the request ends with the error "timeout", running or waiting; `timeout_s`: what was asked
        for that. Raises RequestFailed:
        overloaded, or invalid_request where the last world's limits do not allow it.
        """
        self.check_admission(1, len(prompt_token_ids) + len(output_token_ids or ()))
        limits = self.welcome.limits if self.welcome is not None else None
        problem = check_request(prompt_token_ids, params, stop, output_token_ids or [], limits)
        if problem is not None:
            raise self.refused("invalid_request", problem)
        params = with_seed(params)
        now = time.time()
        request_id = f"r{next(self._numbers)}"
        while request_id in self._live:  # one of an earlier front, which counted requests without a call, too
            request_id = f"r{next(self._numbers)}"
        entry = JournalEntry(
            request_id,
            prompt_token_ids,
            params,
            stop,
            priority,
            now,
            list(output_token_ids or ()),
            deadline_at=None if deadline_s is None else now + deadline_s,
            timeout_s=timeout_s or deadline_s,
        )
        self._journal.accept(entry, call)
        if call is None:
            self._journal.flush()
        self._metrics.accepted += 1
        self._metrics.prompt_tokens += len(prompt_token_ids)
        request = self._take_on(entry, sink)
        request.trace = incoming_trace.get()
        request.holder = current_holder.get()
        if request.holder is not None:
            request.holder.charge_tokens(len(prompt_token_ids))
        return request

    def restore(self, entry: JournalEntry, sink: Sink) -> Request:
        """Takes on a request that the journal has from an earlier front, behind what it had brought."""
        return self._take_on(entry, sink, restored=True)

    def _take_on(self, entry: JournalEntry, sink: Sink, *, restored: bool = False) -> Request:
        request = Request(entry, sink, self._text.stream(entry.stop, entry.prompt_token_ids, entry.params))
        for token_id in entry.output_token_ids:
            request.text.push(token_id)
        now = time.time()
        if restored:
            request.submissions = 1  # in an earlier world: it waits for the next one as long as it takes
            request.accepted_at -= max(0.0, now - entry.accepted_at)
        if len(entry.output_token_ids) > entry.num_given and restored:
            request.first_token_at = request.last_token_at = time.monotonic()
        else:
            self.waiting.enter(request.num_waiting_tokens)
        self._live[entry.request_id] = request
        self._timers.start_deadline(request, now)
        if restored:
            self._submit_restored(request)
        elif self._submissions.world is not None and not self._quarantine.holds:
            self.submit(request)
        else:
            self._timers.start_wait(request, self.max_wait_s, self._unavailable)
        self._count()
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request for its client: it gets an output with finish_reason "cancelled". Does nothing if it
        has ended."""
        if request.request_id not in self._live:
            return
        self._submissions.cancel(request)
        position = len(request.entry.output_token_ids)
        output = Output(request.request_id, position, [], "cancelled", None, request.text.finish())
        self._journal_end(request, "cancelled")
        self.end(request, "cancelled")
        request.sink.output(request, output)
        self._call_after_batch()

    def close(self) -> None:
        """Tells every client that the front goes away. In the journal their requests stay unfinished."""
        self._closing = True
        text = "the server was shut down before this request had finished; try again later"
        for request in list(self._live.values()):
            self.end_with(request, RequestFailed("unavailable", text, request.request_id))
        self._call_after_batch()

    # ----------------------------------------------------------------------- for the link to the world

    def world_up(self, world: World, welcome: Welcome) -> None:
        """A world serves: everything that has not finished is submitted to it, replays shortest first."""
        self._submissions.world = world
        self._known.note(welcome)
        self.resumed_at = None
        self._metrics.serving_epoch = welcome.epoch
        self._metrics.limits = welcome.limits
        replayed = sum(request.submissions > 0 for request in self._live.values())
        if replayed:
            self._metrics.replays += replayed
            self._log.info("replayed", epoch=welcome.epoch, requests=replayed)
        self._quarantine.world_up(welcome.epoch, self._live.values())
        if not self._quarantine.holds:
            self.open()

    def world_down(self) -> None:
        """No world serves: everything waits for the next one. What the old one still says is dropped."""
        self.hand_over()
        if self._metrics.serving_epoch is not None:
            self.in_flight = self._submissions.in_flight(self._metrics.serving_epoch)
            self._quarantine.world_down(self._metrics.serving_epoch, list(self._submissions))
        self._submissions.clear()
        self._metrics.serving_epoch = None
        self._metrics.stats = None
        self._replays.clear()
        for request in self._live.values():
            request.lose_world()
            request.resubmits = 0

    def receive(self, message: ServerMessage) -> None:
        """A message of the world that serves."""
        self.take(message)
        self.hand_over()

    def take(self, message: ServerMessage) -> None:
        """One of several messages; `hand_over` follows in the same turn of the loop."""
        self._token_path.take(message)

    def hand_over(self) -> None:
        """Writes down what was taken, and then shows it to the clients."""
        self._token_path.hand_over()

    def judge(self, faults: list[Fault]) -> None:
        """What the supervisor knows of the worlds that died: see quarantine.py."""
        self._metrics.faults.update(faults)
        self._quarantine.judge(faults)

    def note_claims(self) -> None:
        """The supervisor has said which front has the world for itself: see world_claim.py."""
        self._quarantine.note_claims()

    # ----------------------------------------------------------------------- for the quarantine

    def open(self) -> None:
        """Everybody who is not in the world, and no suspect, has a turn: replays by and by, new ones at once."""
        waiting = [request for request in self._live.values() if request.epoch is None]
        waiting = [request for request in waiting if not is_suspect(request)]
        self._replays.add(request for request in waiting if request.submissions)
        self._submit_replays()
        for request in waiting:
            if not request.submissions:
                self.submit(request)

    def withdraw(self, request: Request) -> None:
        """Takes it out of the world; it stays live."""
        self._submissions.cancel(request)
        request.lose_world()

    def withdraw_all(self) -> None:
        self._replays.clear()
        for request in list(self._submissions):
            self.withdraw(request)

    def fail(self, request: Request, error: RequestFailed) -> None:
        """Ends it with an error for its client."""
        self.end_with(request, error)
        self._call_after_batch()

    def submit(self, request: Request) -> None:
        """Into the world that serves, behind what the journal has. Does nothing if none does."""
        if not self._closing:
            self._submissions.submit(request)

    # ----------------------------------------------------------------------- for the token path

    def had_first_token(self, request: Request, now: float) -> None:
        """It waits no more."""
        self.waiting.leave(request.num_waiting_tokens, now)

    def end(self, request: Request, reason: FinishReason | None) -> None:
        """It has ended, and the journal has that; without a reason it failed."""
        request.ended = True
        del self._live[request.request_id]
        self._submissions.forget(request)
        self._timers.stop(request)
        if request.first_token_at is None:
            self.waiting.leave(request.num_waiting_tokens, time.monotonic())
        self._metrics.finished[reason or "error"] += 1
        if reason is not None:
            self._metrics.per_request.ended(request)
        self.on_ended(request, reason)
        self._metrics.request_latency.observe(time.monotonic() - request.accepted_at)
        self._count()
        if self._replays.done(request):
            self._submit_replays()
        self._quarantine.ended(request)

    def end_with(self, request: Request, error: RequestFailed) -> None:
        """Ends it with an error for its client. Does nothing for one that has ended."""
        if request.request_id in self._live:
            self._submissions.cancel(request)
            self._journal_end(request, None, (error.code, error.message))
            self.end(request, None)
            request.sink.failed(request, error)

    def resumed(self) -> None:
        """The world that serves has brought a token of a replayed request."""
        if self.resumed_at is None:
            self.resumed_at = time.time()
            self.on_resumed()

    def go_on(self, request: Request) -> None:
        """It brings new tokens in a later world."""
        if self._replays.done(request):
            self._submit_replays()
        self._quarantine.brought_token(request)

    def after_batch_of_tokens(self) -> None:
        """All that came at once has been handed to the clients."""
        self._call_after_batch()
        self._count()

    # ----------------------------------------------------------------------- inside

    def _submit_restored(self, request: Request) -> None:
        """One of an earlier front has its turn with the replays."""
        if self._submissions.world is not None and not self._quarantine.holds and not is_suspect(request):
            self._replays.add([request])
            self._submit_replays()

    def _submit_replays(self) -> None:
        for request in self._replays.take():
            self.submit(request)

    def _unavailable(self) -> RequestFailed:
        text = f"no world has come up to serve the model within {self.max_wait_s:g} s; try again later"
        return self.refused("unavailable", text)

    def _journal_end(
        self, request: Request, reason: FinishReason | None, error: tuple[ErrorCode, str] | None = None
    ) -> None:
        """Of a request that does not end by its tokens. When the front goes away it stays unfinished."""
        if not self._closing:
            self._journal.finish(request.request_id, reason, error=error)
            self._journal.flush()

    def _call_after_batch(self) -> None:
        for function in self.after_batch:
            function()

    def _count(self) -> None:
        self._metrics.live = len(self._live)
