"""Ranks are killed in the middle of 8 streams: how long until each part of the recovery is done, with each kind of
spare, and whether a client could tell.

`python -m benchmarks.recovery [--kills N] [--tp N] [--cores N] [--spares none,warm,hot]`. bfloat16, SIGKILL of a
random rank of the world that serves, at a random token, all seeded. Times count from the kill. Tokens are counted at
a ZeroMQ client of the front, by position. A kill waits until the spare is ready, as it is within seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import zmq

import phalanx
from benchmarks.common import MODEL, machine, model_folder, percentile, pin, show, write
from benchmarks.peers.work import prompt
from benchmarks.supervisor_log import events
from benchmarks.targets import TARGETS
from gateway.connection import Connection
from gateway.protocol import Failed, SamplingParams, ServerMessage, Submit, Tokens, Welcome

STREAMS, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 200
FIRST_HIT, LAST_HIT = 10, 150
"""The kill comes when the slowest stream has this many tokens, drawn anew for each."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="with each kind of spare")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--spares", default="none,warm,hot")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    model_folder()
    cores = pin(arguments.cores)
    runs = {}
    for kind in arguments.spares.split(","):
        runs[kind] = asyncio.run(_measure(kind, arguments.tp, arguments.kills, random.Random(arguments.seed)))
    _report(runs, arguments.tp, arguments.kills, arguments.seed, cores)


@dataclass
class Run:
    """All kills with one kind of spare."""

    times_s: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    lost: int = 0
    repeated: int = 0
    failed: int = 0
    """Streams that did not bring all their tokens."""
    spare_bytes: int | None = None
    parked_cpu_percent: float | None = None
    """Of one core, by all parked ranks together."""


async def _measure(kind: str, tp: int, kills: int, dice: random.Random) -> Run:
    run = Run()
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as folder:
        run_dir = Path(folder, "run")
        log = run_dir / "supervisor.log"
        flags: dict[str, Any] = {"tp": tp, "spare": kind, "dtype": "bfloat16", "run_dir": run_dir}
        with phalanx.serve(MODEL, **flags) as server:
            epoch, killed_at = 0, 0.0
            for number in range(kills):
                world, spare = await _wait_ready(server.url, kind, above=epoch)
                epoch = world["epoch"]
                if spare is not None:
                    if number > 0:
                        run.times_s["spare"].append(_spare_ready_at(log, killed_at) - killed_at)
                    run.spare_bytes = sum(rank["memory_bytes"] for rank in spare["ranks"])
                    if number == 0:
                        run.parked_cpu_percent = await _cpu_percent(spare)
                victim = dice.choice(world["ranks"])["pid"]
                streams = _Streams(server.zmq, salt=number, hit_at=dice.randint(FIRST_HIT, LAST_HIT))
                killed_at = await streams.run(victim)
                _take(run, streams, killed_at, _moments(log, epoch, killed_at))
                serving_s = run.times_s["serving"][-1]
                print(
                    f"{kind}: kill {number + 1} of {kills}: serving after {serving_s:.2f} s", file=sys.stderr
                )
    return run


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
    return len(ranks) == world["tp"] * world["pp"] and all(rank["memory_bytes"] for rank in ranks)


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

    async def run(self, victim: int) -> float:
        """Kills in mid-stream, and returns the moment once every stream has ended."""
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
                os.kill(victim, signal.SIGKILL)
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


def _spare_ready_at(log: Path, killed_at: float) -> float:
    return next(event.at for event in events(log, killed_at) if event.name == "spare ready")


def _take(run: Run, streams: _Streams, killed_at: float, moments: dict[str, float]) -> None:
    for part in _EVENTS:
        run.times_s[part].append(max(0.0, moments[part] - killed_at))
    # What was under way when the rank died may still arrive; what comes after the next world serves is new.
    resumed = []
    for name, positions in streams.positions.items():
        run.lost += len(set(range(NEW_TOKENS)) - set(positions))
        run.repeated += len(positions) - len(set(positions))
        run.failed += positions != list(range(NEW_TOKENS))
        later = [at for at in streams.arrivals[name] if at >= moments["serving"] - 0.001]
        resumed += later[:1]
    run.times_s["first token"].append(min(resumed) - killed_at)
    run.times_s["all streams"].append(max(resumed) - killed_at)


# --------------------------------------------------------------------------- the report


def _report(runs: dict[str, Run], tp: int, kills: int, seed: int, cores: list[int]) -> None:
    summary = {kind: _summary(run) for kind, run in runs.items()}
    columns = [f"seconds from the kill, {kills} each"]
    for kind in runs:
        columns += [f"{kind} p50", "p99"]
    rows: list[list[object]] = []
    for part, what in PARTS.items():
        row: list[object] = [f"{part}: {what}"]
        for kind in runs:
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
        for kind in runs:
            value = summary[kind][name]
            row += ["-" if value is None else value, ""]
        rows.append(row)
    show(
        f"SmolLM2-135M, bfloat16, tp {tp}, {len(cores)} cores, {STREAMS} streams of {NEW_TOKENS} tokens",
        columns,
        rows,
    )
    verdicts = {}
    for target in TARGETS:
        for kind in runs if target.spare is None else [target.spare]:
            if kind not in summary or target.fault != "kill":
                continue
            value = summary[kind]["seconds"][target.part][target.share]
            verdicts[f"{kind}, {target.part}, {target.share}"] = {
                "target_s": target.limit_s,
                "measured_s": value,
            }
            met = "met" if value <= target.limit_s else "MISSED"
            print(
                f"target: {kind}, {target.part}, {target.share}: {target.limit_s:g} s: {met} ({value:.3f} s)"
            )
    write(
        "recovery",
        {
            "machine": machine(cores), "tp": tp, "streams": STREAMS, "new_tokens": NEW_TOKENS, "kills": kills,
            "seed": seed, "load_average": os.getloadavg()[0], "parts": PARTS, "spares": summary,
            "targets": verdicts,
        },
    )  # fmt: skip


def _summary(run: Run) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "max": max(values)}

    return {
        "seconds": {part: spread(values) for part, values in run.times_s.items() if values},
        "lost": run.lost,
        "repeated": run.repeated,
        "failed": run.failed,
        "spare_mb": None if run.spare_bytes is None else round(run.spare_bytes / 1e6),
        "parked_cpu_percent": run.parked_cpu_percent,
        "all_seconds": run.times_s,
    }


if __name__ == "__main__":
    main()
