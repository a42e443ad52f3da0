"""Ranks are killed, or stopped for good, in the middle of 8 streams: how long until each part of the recovery is
done, with each kind of spare, and whether a client could tell.

`python -m benchmarks.recovery [--hits N] [--for SECONDS] [--kinds KIND[,KIND...]] [--tp N] [--cores N]`, KIND being
hot, warm, none (a kill with this spare), or freeze (SIGSTOP, hot). bfloat16, a random rank of the world that serves,
at a random token, all seeded. Times count from the fault. Tokens are counted at a ZeroMQ client of the front, by
position. A fault waits until the spare is ready, as it is within seconds. Hundreds of faults take an hour or more:
each is appended to the state as soon as it is over, the next call goes on from there, and the figures are of all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import zmq
from msgspec import Struct, field

import phalanx
from benchmarks.common import MODEL, ROOT, machine, model_folder, percentile, pin, show, write
from benchmarks.peers.work import prompt
from benchmarks.supervisor_log import events
from benchmarks.targets import TARGETS
from gateway.connection import Connection
from gateway.protocol import Failed, SamplingParams, ServerMessage, Submit, Tokens, Welcome
from launcher.restarts import SHORT_LIFE_S

STREAMS, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 200
FIRST_HIT, LAST_HIT = 10, 150
"""The fault comes when the slowest stream has this many tokens, drawn anew for each."""
TIMEOUT_S = 180.0
CPU_SAMPLE_S = 2.0

PARTS = {
    "detected": "the supervisor knows",
    "dead": "no process of the old world is left",
    "serving": "the next world has welcomed the front",
    "first token": "the first stream goes on",
    "all streams": "the last stream goes on",
    "spare": "the next spare is ready",
}
_EVENTS = {"detected": "world fault", "dead": "world dead", "serving": "world recovered"}


@dataclass(frozen=True)
class Kind:
    """What is done, and what stands ready for it."""

    spare: str
    fault: str = "kill"

    @property
    def number(self) -> signal.Signals:
        return signal.SIGSTOP if self.fault == "freeze" else signal.SIGKILL


KINDS = {"hot": Kind("hot"), "warm": Kind("warm"), "none": Kind("none"), "freeze": Kind("hot", "freeze")}


class Hit(Struct):
    """One fault and what came of it: a line of the state."""

    kind: str
    tp: int
    cores: int
    seed: int
    number: int
    at: float
    """Unix time."""
    load_average: float
    seconds: dict[str, float] = field(default_factory=dict)
    lost: int = 0
    repeated: int = 0
    failed: int = 0
    """Streams that did not bring all their tokens."""
    spare_bytes: int | None = None
    parked_cpu_percent: float | None = None
    """Of one core, by all parked ranks together; measured before the first fault of a deployment."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hits", type=int, default=20, help="of each kind, those of earlier calls included")
    parser.add_argument("--for", type=float, default=None, dest="for_s", metavar="SECONDS")
    parser.add_argument("--kinds", default="none,warm,hot,freeze")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "recovery.jsonl")
    parser.add_argument("--fresh", action="store_true", help="forget the faults of earlier calls")
    arguments = parser.parse_args()
    model_folder()
    cores = pin(arguments.cores)
    if arguments.fresh:
        arguments.state.unlink(missing_ok=True)
    ends_at = time.monotonic() + (arguments.for_s or math.inf)
    for kind in arguments.kinds.split(","):
        asyncio.run(_measure(kind, arguments, len(cores), ends_at))
    _report(_known(arguments, len(cores)), arguments, cores)


def _known(arguments: argparse.Namespace, cores: int) -> dict[str, list[Hit]]:
    """The faults of this and earlier calls with these settings, by kind."""
    hits: dict[str, list[Hit]] = {kind: [] for kind in KINDS}
    with contextlib.suppress(FileNotFoundError):
        for line in arguments.state.read_bytes().splitlines():
            hit = msgspec.json.decode(line, type=Hit)
            if (hit.tp, hit.cores, hit.seed) == (arguments.tp, cores, arguments.seed):
                hits[hit.kind].append(hit)
    return hits


async def _measure(name: str, arguments: argparse.Namespace, cores: int, ends_at: float) -> None:
    kind = KINDS[name]
    first = len(_known(arguments, cores)[name])
    if first >= arguments.hits or time.monotonic() >= ends_at:
        return
    arguments.state.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as folder:
        run_dir = Path(folder, "run")
        log = run_dir / "supervisor.log"
        flags: dict[str, Any] = {
            "tp": arguments.tp, "spare": kind.spare, "dtype": "bfloat16", "run_dir": run_dir,
        }  # fmt: skip
        with phalanx.serve(MODEL, **flags) as server:
            epoch, before = 0, None
            for number in range(first, arguments.hits):
                world, spare = await _wait_ready(server.url, kind.spare, above=epoch)
                epoch = world["epoch"]
                # A supervisor takes worlds that die one after the other at once for a loop, and backs off.
                served_s = math.inf if before is None else time.time() - before.at - before.seconds["serving"]
                await asyncio.sleep(max(0.0, SHORT_LIFE_S + 0.1 - served_s))
                if before is not None:
                    if spare is not None and (ready_at := _spare_ready_at(log, before.at)) is not None:
                        before.seconds["spare"] = ready_at - before.at
                    _keep(arguments.state, before)
                if time.monotonic() >= ends_at:
                    return
                dice = random.Random(f"{arguments.seed} {name} {number}")
                hit = Hit(name, arguments.tp, cores, arguments.seed, number, 0.0, os.getloadavg()[0])
                if spare is not None:
                    hit.spare_bytes = sum(rank["memory_bytes"] for rank in spare["ranks"])
                    if before is None:
                        hit.parked_cpu_percent = await _cpu_percent(spare)
                victim = dice.choice(world["ranks"])["pid"]
                streams = _Streams(server.zmq, salt=number, hit_at=dice.randint(FIRST_HIT, LAST_HIT))
                hit.at = await streams.run(victim, kind.number)
                _take(hit, streams, _moments(log, epoch, hit.at))
                print(
                    f"{name}: {number + 1} of {arguments.hits}: serving after {hit.seconds['serving']:.2f} s",
                    file=sys.stderr,
                )
                before = hit
            if before is not None:
                _keep(arguments.state, before)


def _keep(state: Path, hit: Hit) -> None:
    with state.open("ab") as file:
        file.write(msgspec.json.encode(hit) + b"\n")


async def _wait_ready(url: str, kind: str, above: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The world that serves, and its spare once that is parked; None for kind none."""
    give_up_at = time.monotonic() + TIMEOUT_S
    while time.monotonic() < give_up_at:
        worlds = _cluster(url)["worlds"]
        active = [world for world in worlds if world["state"] == "active" and world["epoch"] > above]
        spares = [world for world in worlds if world["state"] == "spare" and _is_parked(world)]
        if active and kind == "none":
            return active[0], None
        if active and spares:
            return active[0], spares[0]
        await asyncio.sleep(0.1)
    raise RuntimeError(f"no world with its spare within {TIMEOUT_S:.0f} s: {worlds}")


def _is_parked(world: dict[str, Any]) -> bool:
    ranks = world["ranks"]
    parked = all(rank["state"] == "parked" and rank["memory_bytes"] for rank in ranks)
    return parked and len(ranks) == world["tp"] * world["pp"]


def _cluster(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/cluster", timeout=10) as answer:
        content: dict[str, Any] = json.load(answer)
    return content


async def _cpu_percent(spare: dict[str, Any]) -> float:
    ranks = [psutil.Process(rank["pid"]) for rank in spare["ranks"]]

    def used_s() -> float:
        return sum(sum(rank.cpu_times()[:2]) for rank in ranks)

    before_s = used_s()
    await asyncio.sleep(CPU_SAMPLE_S)
    return 100 * (used_s() - before_s) / CPU_SAMPLE_S


class _Streams:
    """All streams over one raw connection, so that the counting is ours and not the client's."""

    def __init__(self, endpoint: str, salt: int, hit_at: int) -> None:
        self._endpoint = endpoint
        self._salt = salt
        self._hit_at = hit_at
        self._welcomed = asyncio.Event()
        self._moved = asyncio.Event()
        self.failure: str | None = None
        self.positions: dict[str, list[int]] = {str(index): [] for index in range(STREAMS)}
        self.arrivals: dict[str, list[float]] = {name: [] for name in self.positions}
        """Unix time of each token."""
        self.finished: set[str] = set()

    async def run(self, victim: int, number: signal.Signals) -> float:
        """Sends the signal in mid-stream, and returns the moment once every stream has ended."""
        context: zmq.Context[Any] = zmq.Context()
        connection = Connection(
            context, self._endpoint, on_welcome=self._welcome, on_message=self._receive, on_lost=self._lost
        )
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._welcomed.wait()
                params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
                for index, name in enumerate(self.positions):
                    tokens = prompt(index, PROMPT_TOKENS, self._salt)
                    connection.send(Submit(name, prompt_token_ids=tokens, params=params))
                await self._until(lambda: min(map(len, self.positions.values())) >= self._hit_at)
                killed_at = time.time()
                os.kill(victim, number)
                await self._until(lambda: len(self.finished) == STREAMS)
        finally:
            connection.close()
            context.destroy(linger=0)
        return killed_at

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition() and self.failure is None:
            self._moved.clear()
            await self._moved.wait()

    def _welcome(self, _welcome: Welcome) -> None:
        self._welcomed.set()

    def _receive(self, message: ServerMessage) -> None:
        now = time.time()
        if isinstance(message, Tokens):
            for output in message.outputs:
                count = len(output.token_ids)
                self.positions[output.request_id] += range(output.position, output.position + count)
                self.arrivals[output.request_id] += [now] * count
                if output.finish_reason is not None:
                    self.finished.add(output.request_id)
        elif isinstance(message, Failed):
            self.failure = message.message
            if message.request_id is not None:
                self.finished.add(message.request_id)
        self._moved.set()

    def _lost(self, reason: str) -> None:
        self.failure = reason
        self._moved.set()


def _moments(log: Path, epoch: int, killed_at: float) -> dict[str, float]:
    """Unix times at which the supervisor's log says that the world of this epoch was found, dead, replaced."""
    moments: dict[str, float] = {}
    give_up_at = time.monotonic() + TIMEOUT_S
    while len(moments) < len(_EVENTS) and time.monotonic() < give_up_at:
        for event in events(log, killed_at):
            for part, name in _EVENTS.items():
                if event.name == name and (event.epoch or 0) >= epoch:
                    moments.setdefault(part, event.at)
        time.sleep(0.01)
    return moments


def _spare_ready_at(log: Path, since: float) -> float | None:
    """When the spare was ready that was started after this time; None if the log does not say so."""
    return next((event.at for event in events(log, since) if event.name == "spare ready"), None)


def _take(hit: Hit, streams: _Streams, moments: dict[str, float]) -> None:
    for part in _EVENTS:
        hit.seconds[part] = max(0.0, moments[part] - hit.at)
    # What was under way at the fault may still arrive; what comes after the next world serves is new.
    resumed = []
    for name, positions in streams.positions.items():
        hit.lost += len(set(range(NEW_TOKENS)) - set(positions))
        hit.repeated += len(positions) - len(set(positions))
        hit.failed += positions != list(range(NEW_TOKENS))
        later = [at for at in streams.arrivals[name] if at >= moments["serving"] - 0.001]
        resumed += later[:1]
    hit.seconds["first token"] = min(resumed) - hit.at
    hit.seconds["all streams"] = max(resumed) - hit.at


# --------------------------------------------------------------------------- the report


def _report(hits: dict[str, list[Hit]], arguments: argparse.Namespace, cores: list[int]) -> None:
    hits = {kind: of_kind for kind, of_kind in hits.items() if of_kind}
    summary = {kind: _summary(of_kind) for kind, of_kind in hits.items()}
    columns = ["seconds from the fault"]
    for kind, of_kind in hits.items():
        columns += [f"{kind} ({len(of_kind)}) p50", "p99"]
    rows: list[list[object]] = []
    for part, what in PARTS.items():
        row: list[object] = [f"{part}: {what}"]
        for kind in hits:
            seconds = summary[kind]["seconds"].get(part, {"p50": "-", "p99": ""})
            row += [seconds["p50"], seconds["p99"]]
        rows.append(row)
    for name, text in (
        ("lost", "tokens lost"),
        ("repeated", "tokens repeated"),
        ("failed", "streams not whole"),
        ("spare_mb", "memory of the spare, MB"),
        ("parked_cpu_percent", "processor time of its parked ranks, %"),
    ):
        row = [text]
        for kind in hits:
            value = summary[kind][name]
            row += ["-" if value is None else value, ""]
        rows.append(row)
    show(
        f"SmolLM2-135M, bfloat16, tp {arguments.tp}, {len(cores)} cores, {STREAMS} streams of {NEW_TOKENS} tokens",
        columns,
        rows,
    )
    verdicts = _verdicts(summary)
    for name, verdict in verdicts.items():
        met = "met" if verdict["measured_s"] <= verdict["target_s"] else "MISSED"
        print(f"target: {name}: {verdict['target_s']:g} s: {met} ({verdict['measured_s']:.3f} s)")
    write(
        "recovery",
        {
            "machine": machine(cores), "tp": arguments.tp, "streams": STREAMS, "new_tokens": NEW_TOKENS,
            "seed": arguments.seed, "parts": PARTS, "kinds": summary, "targets": verdicts,
        },
    )  # fmt: skip


def _verdicts(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each target that fits what was done, with what was measured."""
    verdicts = {}
    for target in TARGETS:
        for name, kind in KINDS.items():
            if name not in summary or kind.fault != target.fault or target.spare not in (None, kind.spare):
                continue
            if target.part in summary[name]["seconds"]:
                measured_s = summary[name]["seconds"][target.part][target.share]
                verdicts[f"{name}, {target.part}, {target.share}"] = {
                    "target_s": target.limit_s,
                    "measured_s": measured_s,
                }
    return verdicts


def _summary(hits: list[Hit]) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "max": max(values)}

    all_s = {part: [hit.seconds[part] for hit in hits if part in hit.seconds] for part in PARTS}
    parked = [hit.parked_cpu_percent for hit in hits if hit.parked_cpu_percent is not None]
    return {
        "hits": len(hits),
        "load_average_p50": percentile([hit.load_average for hit in hits], 0.5),
        "seconds": {part: spread(values) for part, values in all_s.items() if values},
        "lost": sum(hit.lost for hit in hits),
        "repeated": sum(hit.repeated for hit in hits),
        "failed": sum(hit.failed for hit in hits),
        "spare_mb": None if hits[-1].spare_bytes is None else round(hits[-1].spare_bytes / 1e6),
        "parked_cpu_percent": max(parked, default=None),
        "all_seconds": {part: [round(value, 3) for value in values] for part, values in all_s.items()},
    }


if __name__ == "__main__":
    main()
