"""The gateway in rank 0: takes requests of token ids in and sends tokens out.

Called by the step loop of rank 0, in its own thread: no threads, no asyncio. Nothing here ever blocks, except
`receive` with a timeout.
"""

from __future__ import annotations

import random
import time

import msgspec
import zmq

from gateway.checks import check_submit
from gateway.curve import ServerKeys
from gateway.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Credit,
    ErrorCode,
    Limits,
    Output,
    SamplingParams,
    Stats,
    Submit,
    Tokens,
    Welcome,
)
from gateway.router import Router

CAPABILITIES = ["pooling", "stats"]
STATS_INTERVAL_S = 0.5
MAX_WAIT_S = 0.25
"""`receive` returns at least this often, so that a loop whose signal handler only sets a flag sees it."""


class Rank0Gateway:
    """The server end of the protocol for one world.

    In each turn the step loop calls `lost_clients` (and cancels their requests), then `receive`, and after
    the step `send_tokens` and `send_stats`.
    """

    endpoint: str
    """As bound, with the real port: tcp://127.0.0.1:43211."""

    def __init__(
        self,
        endpoint: str,
        epoch: int,
        model: str,
        tp: int,
        pp: int,
        limits: Limits,
        eos_token_ids: list[int],
        curve: ServerKeys | None = None,
    ) -> None:
        """Binds `endpoint` (`tcp://127.0.0.1:*` takes a free port). Raises EndpointError."""
        self._epoch = epoch
        self._limits = limits
        self._stats: Stats | None = None
        self._sent_stats: Stats | None = None
        self._next_stats = 0.0
        welcome = Welcome(PROTOCOL_VERSION, epoch, model, tp, pp, limits, list(eos_token_ids), CAPABILITIES)
        self._router = Router(endpoint, lambda: welcome, epoch, on_greeted=self._send_last_stats, curve=curve)
        self.endpoint = self._router.endpoint

    def receive(self, timeout_s: float) -> list[tuple[bytes, Submit | Cancel]]:
        """All requests that are there, as (client identity, message).

        Blocks up to `timeout_s` seconds, and never longer than MAX_WAIT_S, only while nothing is there; 0
        does not block at all. A Submit that comes back from here is within the world's limits, has a seed,
        and its id is new for that client; a Cancel is of a request that still runs.
        """
        router = self._router
        if timeout_s > 0 and not router.readable():
            router.socket.poll(max(1, int(min(timeout_s, self._longest_wait()) * 1000)), zmq.POLLIN)
            self._flush_stats()
        requests: list[tuple[bytes, Submit | Cancel]] = []
        for client, message in router.drain():
            if isinstance(message, Credit):
                continue  # no request here has any
            if message.epoch not in (0, self._epoch):
                # Meant for another world; whoever sent it learns of this one by its welcome.
                if isinstance(message, Submit):
                    router.finish(client, message.request_id)
                continue
            problem = check_submit(message, self._limits) if isinstance(message, Submit) else None
            if problem is not None:
                router.fail(client, message.request_id, "invalid_request", problem)
                continue
            if isinstance(message, Submit) and message.params.seed is None:
                message = msgspec.structs.replace(message, params=with_seed(message.params))
            requests.append((client, message))
        return requests

    def lost_clients(self) -> list[bytes]:
        """The clients that went away since the last call: unreachable, too slow to take their tokens, or
        silent for three heartbeats. The loop cancels their requests. Call it before each `receive`."""
        return self._router.lost_clients()

    def send_tokens(self, step: int, outputs: list[tuple[bytes, Output]]) -> None:
        """Sends what step `step` brought: one Tokens message for each client in `outputs`."""
        by_client: dict[bytes, list[Output]] = {}
        for client, output in outputs:
            if output.prompt_logprobs or output.pooled:
                # They may be megabytes: a message of their own stays below the bound of one.
                self._router.send(client, Tokens(self._epoch, step, [output]))
            elif client in by_client:
                by_client[client].append(output)
            else:
                by_client[client] = [output]
            if output.finish_reason is not None:
                self._router.finish(client, output.request_id)
        for client, client_outputs in by_client.items():
            self._router.send(client, Tokens(self._epoch, step, client_outputs))

    def send_failed(self, client: bytes, request_id: str, code: ErrorCode, message: str) -> None:
        """Tells a client that one of its requests ends without having finished."""
        self._router.fail(client, request_id, code, message)

    def send_stats(
        self,
        step: int,
        num_running: int,
        num_waiting: int,
        kv_blocks_used: int,
        kv_blocks_total: int,
        num_preemptions: int,
        prompt_tokens: int,
        generation_tokens: int,
        prefix_cache_queries: int = 0,
        prefix_cache_hits: int = 0,
    ) -> None:
        """Notes the state of the engine; it goes to every client when it changed, at most every
        STATS_INTERVAL_S. Cheap: call it after every step; a waiting `receive` sends the last one when due."""
        self._stats = Stats(
            self._epoch,
            step,
            num_running,
            num_waiting,
            kv_blocks_used,
            kv_blocks_total,
            num_preemptions,
            prompt_tokens,
            generation_tokens,
            prefix_cache_queries,
            prefix_cache_hits,
        )
        self._flush_stats()

    def close(self) -> None:
        """Closes the socket at once; what is not sent yet is dropped."""
        self._router.close()

    def _longest_wait(self) -> float:
        if self._stats is self._sent_stats:
            return MAX_WAIT_S
        return min(MAX_WAIT_S, max(0.0, self._next_stats - time.monotonic()))

    def _flush_stats(self) -> None:
        stats = self._stats
        if stats is None or stats is self._sent_stats:
            return
        now = time.monotonic()
        if now < self._next_stats:
            return
        changed = stats != self._sent_stats
        self._sent_stats = stats
        if changed:
            self._next_stats = now + STATS_INTERVAL_S
            self._router.broadcast(stats)

    def _send_last_stats(self, client: bytes) -> None:
        if self._sent_stats is not None:
            self._router.send(client, self._sent_stats)


def with_seed(params: SamplingParams) -> SamplingParams:
    """The same parameters, with a random seed if they have none."""
    if params.seed is not None:
        return params
    return msgspec.structs.replace(params, seed=random.getrandbits(63))
