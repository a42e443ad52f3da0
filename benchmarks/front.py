"""What the front costs: requests per second against a bare route, time that it adds to a token, and 500 streams.

`python -m benchmarks.front [--rounds N]`; on four cores also two fronts against one. The engine is the echo model, so
that nothing but Phalanx is measured. Each front, and the bare route of FastAPI in the same run and in turn, has one
core for itself; the load generator (benchmarks.http_load, in this process) and rank 0 have the others. What the
generator used of a core is in the results.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import uvloop

import phalanx
from benchmarks.common import ROOT, machine, median, percentile, show, write
from benchmarks.http_load import Connection, closed_loop, post
from gateway.protocol import SamplingParams

PROMPT = ("the river carries morning light past the old stone bridge and " * 3)[:128]
CONNECTIONS = 64
SECONDS = 3.0
NEW_TOKENS = (1, 16)
ANSWER_BYTES = 420
"""Of the bare route: what the front's answers have."""

STREAM_TOKENS = 400
STREAM_STEP_S = 0.005
ROUND_TRIPS = 400

ALL_CORES = sorted(os.sched_getaffinity(0))
MANY_STREAMS = 500
MANY_STEP_S = 0.1
MANY_TOKENS = 500
MANY_SAMPLE_S = 1.0


@dataclass(frozen=True)
class Cores:
    """Who runs where."""

    servers: list[int]
    others: list[int]

    @classmethod
    def split(cls, num_servers: int) -> Cores:
        cores = ALL_CORES
        if len(cores) <= num_servers:
            sys.exit(f"{num_servers} fronts want a core each and one for the load; here are {len(cores)}")
        return cls(cores[:num_servers], cores[num_servers:])


@dataclass
class Target:
    """A server under load."""

    url: str
    processes: list[psutil.Process]
    zmq: str = ""
    rank: str = ""

    def cpu_s(self) -> float:
        times = [process.cpu_times() for process in self.processes]
        return sum(time.user + time.system for time in times)

    def memory_bytes(self) -> int:
        return sum(process.memory_info().rss for process in self.processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--many-tokens", type=int, default=MANY_TOKENS, help="of each of the 500 streams")
    arguments = parser.parse_args()
    cores = Cores.split(1)
    result: dict[str, object] = {
        "machine": machine([*cores.servers, *cores.others]), "connections": CONNECTIONS, "prompt_tokens": len(PROMPT),
        "load_average": os.getloadavg()[0],
    }  # fmt: skip
    result["throughput"] = throughput(cores, arguments.rounds, arguments.seconds)
    result["overhead"] = overhead(cores)
    result["many_streams"] = many_streams(cores, arguments.many_tokens)
    if len(ALL_CORES) >= 4:
        result["fronts"] = several_fronts(Cores.split(2), arguments.rounds, arguments.seconds)
    write("front", result)


# --------------------------------------------------------------------------- the servers


@contextmanager
def bare_route(cores: Cores) -> Iterator[Target]:
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        command = [sys.executable, "-m", "benchmarks.bare_http", str(listener.fileno()), str(ANSWER_BYTES)]
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=[listener.fileno()])
        try:
            os.sched_setaffinity(process.pid, cores.servers[:1])
            yield Target(f"http://127.0.0.1:{listener.getsockname()[1]}", [psutil.Process(process.pid)])
        finally:
            process.terminate()
            process.wait()


@contextmanager
def echo(cores: Cores, step_s: float, **options: object) -> Iterator[Target]:
    """A deployment of the echo model: each front on a core of its own, everything else on the others."""
    os.sched_setaffinity(0, cores.others)
    os.environ["PHALANX_ECHO_STEP_S"] = str(step_s)
    with tempfile.TemporaryDirectory(prefix="phalanx-front-") as folder:
        run_dir = Path(folder, "run")
        with phalanx.serve("echo", run_dir=run_dir, spare="none", **options) as server:
            fronts = [p for p in psutil.process_iter(["cmdline"]) if _is_front(p, run_dir)]
            for core, front in zip(cores.servers, fronts, strict=False):
                for thread in front.threads():
                    os.sched_setaffinity(thread.id, [core])
            yield Target(server.url, fronts, server.zmq, _rank_endpoint(server.url))


def _is_front(process: psutil.Process, run_dir: Path) -> bool:
    command = process.info["cmdline"] or ()
    return "gateway.front" in command and str(run_dir) in command


def _rank_endpoint(url: str) -> str:
    import httpx

    return str(httpx.get(f"{url}/cluster").json()["worlds"][0]["gateway"])


# --------------------------------------------------------------------------- requests per second


def throughput(cores: Cores, rounds: int, seconds: float) -> dict[str, object]:
    """Requests per second without streams; the bare route and the front in turn."""
    figures: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, list[float]] = {str(count): [] for count in NEW_TOKENS}
    with echo(cores, 0.0) as front, bare_route(cores) as bare:
        works = {"bare": (bare, _completion(1))}
        works |= {str(count): (front, _completion(count)) for count in NEW_TOKENS}
        uvloop.run(closed_loop(front.url, _completion(1), CONNECTIONS, 1.0))  # warm-up
        for number in range(rounds):
            seen: dict[str, float] = {}
            for name in sorted(works, reverse=number % 2 == 1):
                target, request = works[name]
                found = _drive(target, request, seconds)
                seen[name] = found["requests_per_second"]
                for what, value in found.items():
                    figures.setdefault(name, {}).setdefault(what, []).append(value)
            for count in ratios:
                ratios[count].append(seen[count] / seen["bare"])
    medians = {name: {what: median(values) for what, values in f.items()} for name, f in figures.items()}
    rows: list[list[object]] = [
        [
            "bare route" if name == "bare" else f"front, answers of {name} token{'s' * (name != '1')}",
            f["requests_per_second"],
            f["server_us_per_request"],
            f["generator_percent"],
            "" if name == "bare" else median(ratios[name]),
        ]
        for name, f in medians.items()
    ]
    show(
        f"{CONNECTIONS} connections, one core for the server",
        ["", "requests/s", "CPU us a request", "generator, % of a core", "ratio"],
        rows,
    )
    return {**medians, "ratio_to_bare": {count: median(values) for count, values in ratios.items()}}


def _drive(target: Target, request: bytes, seconds: float) -> dict[str, float]:
    server_s, own_s, began = target.cpu_s(), time.process_time(), time.perf_counter()
    rate = uvloop.run(closed_loop(target.url, request, CONNECTIONS, seconds))
    elapsed_s = time.perf_counter() - began
    count = rate * elapsed_s
    return {
        "requests_per_second": rate,
        "server_us_per_request": 1e6 * (target.cpu_s() - server_s) / count,
        "generator_percent": 100 * (time.process_time() - own_s) / elapsed_s,
    }


def _completion(new_tokens: int, stream: bool = False) -> bytes:
    body = {"model": "echo", "prompt": PROMPT, "max_tokens": new_tokens, "ignore_eos": True, "temperature": 0}
    return post("/v1/completions", {**body, "stream": True} if stream else body)


def several_fronts(cores: Cores, rounds: int, seconds: float) -> dict[str, object]:
    """Requests per second of a deployment with one front and of one with two, each front on a core of its own."""
    figures: dict[str, list[float]] = {"1": [], "2": []}
    with echo(cores, 0.0) as one, echo(cores, 0.0, fronts=2) as two:
        works = {"1": one, "2": two}
        for number in range(rounds):
            for name in sorted(works, reverse=number % 2 == 1):
                found = _drive(works[name], _completion(NEW_TOKENS[-1]), seconds)
                figures[name].append(found["requests_per_second"])
    ratio = median([b / a for a, b in zip(figures["1"], figures["2"], strict=True)])
    medians = {name: median(values) for name, values in figures.items()}
    rows: list[list[object]] = [[f"fronts: {name}", value] for name, value in medians.items()]
    show(f"answers of {NEW_TOKENS[-1]} tokens, ratio {ratio:.2f}", ["", "requests/s"], rows)
    return {"requests_per_second": medians, "ratio": ratio}


# --------------------------------------------------------------------------- what a token costs


def overhead(cores: Cores) -> dict[str, object]:
    """Milliseconds that the front adds, with one stream. Of a token: the same steps of rank 0 bring one to a client
    of the front over HTTP and one to a client of rank 0 itself, both in this process; how much later does the first
    one come? Of a whole request of one token: its time over HTTP, less that at rank 0."""
    with echo(cores, STREAM_STEP_S) as target:
        later = [1e3 * (http - rank) for http, rank in uvloop.run(_token_pairs(target))]
    with echo(cores, 0.0) as target:
        trips = uvloop.run(_round_trips(target))
    added = [1e3 * (http - rank) for http, rank in trips]
    result = {
        "token_ms": {"p50": median(later), "p99": percentile(later, 0.99), "count": len(later)},
        "request_ms": {"p50": median(added), "p99": percentile(added, 0.99), "count": len(added)},
        "request_at_rank_0_ms": {"p50": 1e3 * median([rank for _, rank in trips])},
    }
    rows: list[list[object]] = [
        ["a token", result["token_ms"]["p50"], result["token_ms"]["p99"]],
        ["a request of one token", result["request_ms"]["p50"], result["request_ms"]["p99"]],
    ]
    show("what the front adds, one stream, ms", ["", "p50", "p99"], rows)
    return dict(result)


async def _token_pairs(target: Target) -> list[tuple[float, float]]:
    """Moments at which tokens of the same step came over HTTP, and at rank 0's own client."""
    over_http: list[float] = []
    at_rank: list[float] = []
    connection = await Connection.open(target.url, lambda now, count: over_http.append(now))
    async with phalanx.AsyncClient(target.rank) as client:

        async def follow() -> None:
            params = SamplingParams(max_tokens=STREAM_TOKENS + 100, ignore_eos=True)
            async for _ in client.submit(list(PROMPT.encode()), params):
                at_rank.append(time.perf_counter())

        following = asyncio.create_task(follow())
        await connection.ask(_completion(STREAM_TOKENS, stream=True))
        following.cancel()
    connection.close()
    pairs = []
    for moment in over_http[5:]:  # the first ones come when the stream begins, not with a step
        nearest = max((other for other in at_rank if other <= moment), default=None)
        if nearest is not None and moment - nearest < STREAM_STEP_S:
            pairs.append((moment, nearest))
    return pairs


async def _round_trips(target: Target) -> list[tuple[float, float]]:
    """Seconds that a request of one token took over HTTP, and at rank 0."""
    connection = await Connection.open(target.url)
    request = _completion(1)
    pairs = []
    async with phalanx.AsyncClient(target.rank) as client:
        for _ in range(ROUND_TRIPS):
            began = time.perf_counter()
            await connection.ask(request)
            between = time.perf_counter()
            async for _ in client.submit(list(PROMPT.encode()), SamplingParams(max_tokens=1)):
                pass
            pairs.append((between - began, time.perf_counter() - between))
    connection.close()
    return pairs[ROUND_TRIPS // 10 :]


# --------------------------------------------------------------------------- 500 streams


def many_streams(cores: Cores, tokens: int) -> dict[str, object]:
    """Memory of the front while 500 streams run."""
    with echo(cores, MANY_STEP_S) as target:
        uvloop.run(_hold(target, MANY_STREAMS, 20))  # warm-up: what the process takes once
        before = target.memory_bytes()
        used_s, began = target.cpu_s(), time.perf_counter()
        brought, samples = uvloop.run(_hold(target, MANY_STREAMS, tokens))
        elapsed_s = time.perf_counter() - began
        used_s = target.cpu_s() - used_s
        after = target.memory_bytes()
    steady = samples[len(samples) // 4 : -2]
    result = {
        "streams": MANY_STREAMS,
        "tokens_each": tokens,
        "seconds": elapsed_s,
        "tokens_per_second": brought / elapsed_s,
        "front_percent_of_a_core": 100 * used_s / elapsed_s,
        "front_us_per_token": 1e6 * used_s / brought,
        "memory_mb": {
            "before": before / 1e6,
            "first_quarter": steady[0] / 1e6,
            "end": steady[-1] / 1e6,
            "peak": max(samples) / 1e6,
            "after": after / 1e6,
        },
    }
    memory = result["memory_mb"]
    assert isinstance(memory, dict)
    rows: list[list[object]] = [
        [f"memory, MB: {name.replace('_', ' ')}", value] for name, value in memory.items()
    ]
    rows += [[name.replace("_", " "), value] for name, value in result.items() if isinstance(value, float)]
    show(f"{MANY_STREAMS} streams of {tokens} tokens", ["", ""], rows)
    return result


async def _hold(target: Target, streams: int, tokens: int) -> tuple[int, list[int]]:
    """So many streams from beginning to end: events that came, and the front's memory every second."""
    brought = 0

    def count(now: float, events: int) -> None:
        nonlocal brought
        brought += events

    connections = [await Connection.open(target.url, count) for _ in range(streams)]
    request = _completion(tokens, stream=True)
    running = asyncio.gather(*(connection.ask(request) for connection in connections))
    samples = []
    while not running.done():
        await asyncio.wait([running], timeout=MANY_SAMPLE_S)
        samples.append(target.memory_bytes())
    await running
    for connection in connections:
        connection.close()
    assert brought == streams * tokens, f"{brought} tokens came, {streams * tokens} were asked for"
    return brought, samples


if __name__ == "__main__":
    main()
