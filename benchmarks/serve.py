"""Time to first token, time between tokens and throughput of `phalanx serve` over HTTP, with 1, 8 and 32 clients.

`python -m benchmarks.serve [--tp N] [--rounds N] [--cores N]`. The peer in the same run is the same server asked
through its ZeroMQ client, in turn: the ratio is the price of HTTP. Every prompt is a new one, since the prefix cache
would answer an old one. The load comes from one asyncio process, on cores of its own where the machine has more
than `--cores`; what it used of a core is in the results, so that one can see that it was not what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec
import uvloop

import phalanx
from benchmarks.common import MODEL, machine, median, model_folder, percentile, pin, show, write
from gateway.protocol import SamplingParams

CLIENTS = {1: 4, 8: 3, 32: 3}
"""Clients that ask at the same time: requests that each of them sends, one after the other."""
PROMPT_WORDS = 100
NEW_TOKENS = (48, 80)
"""Answers differ in length, from one to the other, so that clients do not march in step for long."""
TIMEOUT_S = 300.0
BUSY_PERCENT = 60.0
"""A load generator that uses more of its core than this may be what was measured."""

WORDS = (
    "river stone morning garden letter window market winter silver bridge captain story music "
    "mountain village lantern harvest traveller question answer shadow summer kitchen island teacher "
    "paper horse forest engine ocean evening doctor candle station country weather basket pencil"
)


@dataclass
class Reply:
    """One answer as a client saw it. A token whose text is held back (half a character) comes with the next."""

    sent_at: float
    arrivals: list[float] = field(default_factory=list)
    """Moments at which new text came."""
    num_tokens: int = 0


Ask = Callable[[str, int], Awaitable[Reply]]
"""(prompt, new tokens) -> reply; one for each client."""

Contestant = Callable[[phalanx.Server, int], AbstractAsyncContextManager[list[Ask]]]
"""So many clients of a server, connected."""


@dataclass
class Figures:
    """What one contestant did under one load, seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    """One for each round."""
    generator_percent: list[float] = field(default_factory=list)
    """CPU of the load generator, percent of a core."""

    def add(self, other: Figures) -> None:
        for mine, new in zip(vars(self).values(), vars(other).values(), strict=True):
            mine += new

    def medians(self) -> dict[str, float]:
        return {
            "time_to_first_token": median(self.first),
            "time_between_tokens": median(self.between),
            "tokens_per_second": median(self.tokens_per_second),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2, help="cores that the server gets")
    arguments = parser.parse_args()
    model_folder()
    all_cores = os.sched_getaffinity(0)
    cores = pin(arguments.cores)
    with phalanx.serve(MODEL, tp=arguments.tp) as server:
        os.sched_setaffinity(0, all_cores - set(cores) or cores)
        figures, ratios = uvloop.run(_measure(server, arguments.rounds))
    _report(figures, ratios, cores, arguments.tp, own_cores=bool(all_cores - set(cores)))


# --------------------------------------------------------------------------- the load


async def _measure(
    server: phalanx.Server, rounds: int
) -> tuple[dict[str, dict[int, Figures]], dict[int, list[dict[str, float]]]]:
    """Figures by contestant and number of clients, and for each round HTTP's medians over ZeroMQ's."""
    figures: dict[str, dict[int, Figures]] = {"http": {}, "zmq": {}}
    ratios: dict[int, list[dict[str, float]]] = {}
    prompts = _prompts()
    contestants: dict[str, Contestant] = {"http": _http_clients, "zmq": _zmq_clients}
    for connect in contestants.values():
        async with connect(server, max(CLIENTS)) as asks:
            await asyncio.gather(*(ask(next(prompts), 4) for ask in asks))  # warm-up
    for round_number in range(rounds):
        for clients, requests in CLIENTS.items():
            seen: dict[str, Figures] = {}
            # Whoever comes second may find a machine that is warmer, or slower: they take turns.
            for name in sorted(contestants, reverse=round_number % 2 == 1):
                async with contestants[name](server, clients) as asks:
                    seen[name] = await _load(asks, requests, prompts)
                figures[name].setdefault(clients, Figures()).add(seen[name])
            http, zmq = seen["http"].medians(), seen["zmq"].medians()
            ratios.setdefault(clients, []).append({what: http[what] / zmq[what] for what in http})
        print(f"round {round_number + 1} of {rounds} done", file=sys.stderr)
    return figures, ratios


async def _load(asks: list[Ask], requests: int, prompts: Iterator[str]) -> Figures:
    """All clients begin together, and each sends its next request when the last one is answered."""
    shortest, longest = NEW_TOKENS
    lengths = random.Random(len(asks))
    work = [
        [(next(prompts), lengths.randint(shortest, longest)) for _ in range(requests)]
        for _ in range(len(asks))
    ]
    replies: list[Reply] = []

    async def client(ask: Ask, pieces: list[tuple[str, int]]) -> None:
        for prompt, new_tokens in pieces:
            async with asyncio.timeout(TIMEOUT_S):
                reply = await ask(prompt, new_tokens)
            assert reply.num_tokens == new_tokens, (
                f"{reply.num_tokens} tokens came, {new_tokens} were asked for"
            )
            replies.append(reply)

    used, begin = time.process_time(), time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        for ask, pieces in zip(asks, work, strict=True):
            clients.create_task(client(ask, pieces))
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    return Figures(
        first=[reply.arrivals[0] - reply.sent_at for reply in replies],
        between=[b - a for reply in replies for a, b in itertools.pairwise(reply.arrivals)],
        tokens_per_second=[sum(reply.num_tokens for reply in replies) / seconds],
        generator_percent=[100 * used / seconds],
    )


def _prompts() -> Iterator[str]:
    """Texts of the same length that differ from the first word on: no two share a block of the KV cache."""
    known = WORDS.split()
    for number in itertools.count(1):
        words = random.Random(number).choices(known, k=PROMPT_WORDS)
        yield f"{number} {' '.join(words)}"


# --------------------------------------------------------------------------- the contestants


@asynccontextmanager
async def _zmq_clients(server: phalanx.Server, count: int) -> AsyncIterator[list[Ask]]:
    """All over one connection: that is how the client is made to be used."""
    async with phalanx.AsyncClient(server.zmq) as client:

        async def ask(prompt: str, new_tokens: int) -> Reply:
            params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
            reply = Reply(time.perf_counter())
            async for output in client.submit(prompt, params):
                reply.num_tokens += len(output.token_ids)
                if output.text:
                    reply.arrivals.append(time.perf_counter())
            return reply

        yield [ask] * count


@asynccontextmanager
async def _http_clients(server: phalanx.Server, count: int) -> AsyncIterator[list[Ask]]:
    """One connection each."""
    clients = [await HttpClient.connect(server) for _ in range(count)]
    try:
        yield [client.ask for client in clients]
    finally:
        for client in clients:
            client.close()


class _Choice(msgspec.Struct):
    text: str


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Event(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


class HttpClient(asyncio.Protocol):
    """One connection that stays open, one request at a time: /v1/completions as server-sent events.

    Made of a socket and a parser: a client library would cost more than the server's own share of HTTP.
    """

    def __init__(self, model: str, host: str) -> None:
        self._model = model
        self._host = host
        self._events = msgspec.json.Decoder(_Event)

    @classmethod
    async def connect(cls, server: phalanx.Server) -> HttpClient:
        address = urlsplit(server.url)
        assert address.hostname is not None and address.port is not None
        _, client = await asyncio.get_running_loop().create_connection(
            lambda: cls(server.model, address.netloc), address.hostname, address.port
        )
        return client

    async def ask(self, prompt: str, new_tokens: int) -> Reply:
        """Sends a prompt and waits for the end of its stream. Raises RuntimeError for any answer but 200."""
        body = json.dumps(
            {
                "model": self._model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0,
                "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
            }
        ).encode()  # fmt: skip
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._parser = httptools.HttpResponseParser(self)
        self._received = b""
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reply = Reply(time.perf_counter())
        self._transport.write(head.encode() + body)
        await self._done
        return self._reply

    def close(self) -> None:
        self._transport.close()

    # What asyncio and the parser call.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if hasattr(self, "_done") and not self._done.done():
            self._done.set_exception(error or ConnectionError("the server closed the connection"))

    def on_body(self, data: bytes) -> None:
        *events, self._received = (self._received + data).split(b"\n\n")
        for event in events:
            _, found, payload = event.partition(b"data: ")
            if not found or payload == b"[DONE]":
                continue  # the end, or a comment that keeps the connection alive
            content = self._events.decode(payload)
            if content.choices and content.choices[0].text:
                self._reply.arrivals.append(self._now)
            if content.usage is not None:
                self._reply.num_tokens = content.usage.completion_tokens

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status == 200:
            self._done.set_result(None)
        else:
            self._done.set_exception(RuntimeError(f"HTTP {status}: {self._received.decode()}"))


# --------------------------------------------------------------------------- the report


def _report(
    figures: dict[str, dict[int, Figures]],
    ratios: dict[int, list[dict[str, float]]],
    cores: list[int],
    tp: int,
    own_cores: bool,
) -> None:
    summary = {name: {str(n): _summary(seen) for n, seen in loads.items()} for name, loads in figures.items()}
    of_loads = {
        str(clients): {what: median([one[what] for one in rounds]) for what in rounds[0]}
        for clients, rounds in ratios.items()
    }
    rows: list[list[object]] = []
    for clients, http in summary["http"].items():
        zmq, ratio = summary["zmq"][clients], of_loads[clients]
        s = "s" * (clients != "1")
        for what, unit in (("time_to_first_token", "ms"), ("time_between_tokens", "ms")):
            name = f"{clients} client{s}: {what.replace('_', ' ')}, {unit}"
            rows.append([f"{name} p50", http[what]["p50"], zmq[what]["p50"], ratio[what]])
            rows.append([f"{name} p99", http[what]["p99"], zmq[what]["p99"], ""])
        what = "tokens_per_second"
        rows.append([f"{clients} client{s}: tokens/s", http[what], zmq[what], ratio[what]])
    show(
        f"SmolLM2-135M, bfloat16, tp {tp}, {len(cores)} cores",
        ["", "HTTP", "ZeroMQ (peer)", "ratio"],
        rows,
    )
    busiest = max(max(seen.generator_percent) for loads in figures.values() for seen in loads.values())
    print(f"load generator: at most {busiest:.0f} % of a core")
    if busiest > BUSY_PERCENT:
        print("the load generator was busy: these figures are partly its own", file=sys.stderr)
    write(
        "serve",
        {
            "machine": machine(cores), "tp": tp, "prompt_words": PROMPT_WORDS, "new_tokens": NEW_TOKENS,
            "load_generator": {"own_cores": own_cores, "percent_of_a_core": busiest},
            **summary, "ratio_http_to_zmq": of_loads,
        },
    )  # fmt: skip


def _summary(seen: Figures) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        return {"p50": 1e3 * median(values), "p99": 1e3 * percentile(values, 0.99)}

    return {
        "time_to_first_token": spread(seen.first),
        "time_between_tokens": spread(seen.between),
        "tokens_per_second": median(seen.tokens_per_second),
        "requests": len(seen.first),
    }


if __name__ == "__main__":
    main()
