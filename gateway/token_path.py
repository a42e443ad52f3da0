"""The way of a token through the front: from a message of the world, into the journal, to the client.

Owned by requests.py, which holds the requests and says how they live and end. Everything here runs once a token, from
top to bottom: `take`, `hand_over`, `_deliver`. Nothing is shown before it is written down, and nothing twice.
"""

from __future__ import annotations

import time
from typing import Protocol

from gateway.errors import RequestFailed
from gateway.journal import Journal, PositionError
from gateway.live_request import Request, without_repeated
from gateway.log import Logger
from gateway.metrics import FrontMetrics
from gateway.protocol import Failed, FinishReason, Output, ServerMessage, Stats, Tokens, Welcome
from gateway.quarantine import Quarantine
from gateway.submissions import Submissions

MAX_RESUBMITS_IN_A_WORLD = 3
"""A world that drops tokens of one request so often will not get it right."""


class Lives(Protocol):
    """The requests, as requests.py holds them."""

    @property
    def welcome(self) -> Welcome | None: ...

    def submit(self, request: Request) -> None:
        """Into the world that serves."""

    def end(self, request: Request, reason: FinishReason | None) -> None:
        """It has ended, and the journal has that."""

    def end_with(self, request: Request, error: RequestFailed) -> None:
        """It ends with an error for its client. Does nothing for one that has ended."""

    def had_first_token(self, request: Request, now: float) -> None:
        """It waits no more."""

    def resumed(self) -> None:
        """The world that serves has brought a token of a replayed request."""

    def go_on(self, request: Request) -> None:
        """It brings new tokens in a later world than its first one."""

    def after_batch_of_tokens(self) -> None:
        """All that came at once has been handed to the clients."""


class TokenPath:
    """Of all requests of one front."""

    def __init__(
        self,
        lives: Lives,
        submissions: Submissions,
        quarantine: Quarantine,
        journal: Journal,
        metrics: FrontMetrics,
        log: Logger,
    ) -> None:
        self._lives = lives
        self._submissions = submissions
        self._quarantine = quarantine
        self._journal = journal
        self._metrics = metrics
        self._log = log
        self._taken: list[tuple[Request, Output]] = []
        """New tokens that are to be written down and handed over."""

    def take(self, message: ServerMessage) -> None:
        """One of several messages of the world that serves. `hand_over` follows in the same turn of the loop: the
        tokens of all of them are one commit of the journal."""
        if isinstance(message, Tokens):
            for output in message.outputs:
                if (found := self._journal_output(output)) is not None:
                    found[0].has_come_with(message.epoch, message.step)
                    self._taken.append(found)
        elif isinstance(message, Stats):
            self._metrics.note_stats(message)
        elif isinstance(message, Failed):
            self.hand_over()
            self._receive_failed(message)

    def hand_over(self) -> None:
        """Writes down what was taken, and then shows it to the clients."""
        if not self._taken:
            return
        taken, self._taken = self._taken, []
        self._journal.flush()
        now = time.monotonic()
        for request, shown in taken:
            if not request.ended:
                self._deliver(request, shown, now)
        self._lives.after_batch_of_tokens()

    def _journal_output(self, output: Output) -> tuple[Request, Output] | None:
        """Makes text of new tokens and writes them down; None for outputs that are nobody's or bring nothing
        new."""
        request = self._submissions.find(output.request_id)
        if request is None:  # cancelled, ended by an earlier output, or submitted again
            if output.finish_reason is not None:
                self._quarantine.left(output.request_id)
            return None
        expected = len(request.entry.output_token_ids)
        if output.position != expected:
            self._metrics.position_errors += 1
            error = PositionError(request.request_id, expected, output.position)
            self._log.error("position", epoch=request.epoch, request=request.request_id, detail=str(error))
            if output.position > expected:
                self._resubmit(request)
                return None
            output = without_repeated(output, expected)
            if not output.token_ids and output.finish_reason is None:
                return None
        if output.finish_reason == "cancelled":
            # Not on our word, or its id would be gone: the client still waits for its tokens.
            self._log.warning("cancelled by rank 0", epoch=request.epoch, request=request.request_id)
            self._resubmit(request)
            return None
        shown = request.read(
            output, self._lives.welcome.eos_token_ids if self._lives.welcome is not None else ()
        )
        self._journal.append(
            request.request_id,
            expected,
            shown.token_ids,
            shown.logprobs,
            shown.prompt_logprobs,
            shown.num_cached_tokens,
        )
        if shown.finish_reason is not None:
            if output.finish_reason is None:
                self._submissions.cancel(request)
            else:
                self._submissions.forget(request)
            self._journal.finish(request.request_id, shown.finish_reason, shown.stop_reason)
        return request, shown

    def _resubmit(self, request: Request) -> None:
        """The world starts this request again behind what the journal has."""
        self.hand_over()  # what it has brought comes before its error
        self._submissions.cancel(request)
        request.resubmits += 1
        if self._submissions.world is None or request.resubmits > MAX_RESUBMITS_IN_A_WORLD:
            self._lives.end_with(
                request, RequestFailed("internal", "the engine dropped tokens of this request")
            )
            return
        self._lives.submit(request)

    def _deliver(self, request: Request, shown: Output, now: float) -> None:
        """Hands new tokens, which are in the journal, to the client."""
        if shown.token_ids:
            self._time(request, now)
        self._metrics.generation_tokens += len(shown.token_ids)
        if request.holder is not None:
            request.holder.charge_tokens(len(shown.token_ids))
        if shown.finish_reason is not None:
            self._lives.end(request, shown.finish_reason)
        elif shown.token_ids and request.submissions > 1:
            self._lives.go_on(request)
        request.sink.output(request, shown)

    def _time(self, request: Request, now: float) -> None:
        if request.first_token_at is None:
            request.first_token_at = now
            self._lives.had_first_token(request, now)
            self._metrics.time_to_first_token.observe(now - request.accepted_at)
        else:
            self._metrics.inter_token_latency.observe(now - request.last_token_at)
        request.last_token_at = now
        if request.outages and request.outages[-1].resumed_at is None:
            request.outages[-1].resumed_at = now
        if request.submissions > 1:
            self._lives.resumed()

    def _receive_failed(self, message: Failed) -> None:
        if message.request_id is None:
            self._log.error(
                "refused by rank 0", epoch=message.epoch, code=message.code, detail=message.message
            )
            return
        request = self._submissions.find(message.request_id)
        if request is None:  # it failed while we took it out
            self._quarantine.left(message.request_id)
            return
        self._submissions.forget(request)  # the world has nothing more of it
        if message.code == "unavailable":
            # The world is about to end; the next one gets it.
            request.lose_world()
            return
        self._lives.end_with(request, RequestFailed(message.code, message.message, request.request_id))
        self._lives.after_batch_of_tokens()
