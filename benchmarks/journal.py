"""What the journal costs: one commit of a step, and the throughput of a deployment with and without it.

    python -m benchmarks.journal [--rounds 6] [--steps-only]

Paired: both deployments run at once, each is loaded in turn while the other one rests, and the order changes from
round to round, so that whatever else the machine does hits both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

import phalanx
from benchmarks.common import MODEL, machine, percentile, show, write
from gateway.disk_journal import DiskJournal
from gateway.journal import JournalCall, JournalEntry
from gateway.log import configure_log
from gateway.protocol import SamplingParams, TokenLogprobs

SEQUENCES = 32
STEPS = 3000
NEW_TOKENS = 64
WHAT = ("tokens_per_second", "front_cpu_us_per_token", "commit_share")
PROMPT = "The phalanx was a rectangular mass military formation, and number {} of its men said:"


def measure_steps(folder: Path, *, sync: bool = False, logprobs: bool = False) -> dict[str, float]:
    """Microseconds from the first token of a step to its commit, of 32 sequences."""
    journal = DiskJournal(folder / "journal.sqlite", configure_log(), sync=sync)
    for number in range(SEQUENCES):
        call = JournalCall(f"c{number}", "chat", time.time())
        journal.open_call(call)
        params = SamplingParams(seed=1, logprobs=5 if logprobs else None)
        journal.accept(JournalEntry(f"r{number}", list(range(100)), params, [], 0, time.time()), call)
        journal.commit(call)
    reported = (
        [TokenLogprobs(7, -0.5, 1, [1, 2, 3, 4, 5], [-0.5, -1.0, -2.0, -3.0, -4.0])] if logprobs else None
    )
    steps = 300 if sync else STEPS
    took = []
    for position in range(steps):
        began = time.perf_counter()
        for number in range(SEQUENCES):
            journal.append(f"r{number}", position, [31_000 + number], reported)
        journal.flush()
        took.append((time.perf_counter() - began) * 1e6)
        if position % 100 == 99:
            journal.tick(time.time())
    accepted = []
    for number in range(300):
        began = time.perf_counter()
        call = JournalCall(f"d{number}", "chat", time.time())
        journal.open_call(call)
        entry = JournalEntry(f"s{number}", list(range(500)), SamplingParams(seed=1), [], 0, time.time())
        journal.accept(entry, call)
        journal.commit(call)
        accepted.append((time.perf_counter() - began) * 1e6)
    journal.close()
    return {
        "p50": percentile(took, 0.5),
        "p99": percentile(took, 0.99),
        "max": max(took),
        "accept_p50": percentile(accepted, 0.5),
    }


@dataclass
class Load:
    """What one load of 32 streams that begin together showed."""

    tokens_per_second: float
    front_cpu_us_per_token: float
    commit_share: float
    """Of the elapsed time, what went by in commits. On a busy machine it says more than the throughput."""


async def load(server: phalanx.Server, new_tokens: int = NEW_TOKENS) -> Load:
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    front = _front(server)
    async with phalanx.AsyncClient(server.zmq) as client:
        commits, used = _commit_seconds(server), sum(front.cpu_times()[:2])
        began = time.perf_counter()
        prompts = (PROMPT.format(number) for number in range(SEQUENCES))
        done = await asyncio.gather(*(client.generate(prompt, params) for prompt in prompts))
        seconds = time.perf_counter() - began
    tokens = sum(len(generation.token_ids) for generation in done)
    used = sum(front.cpu_times()[:2]) - used
    return Load(tokens / seconds, 1e6 * used / tokens, (_commit_seconds(server) - commits) / seconds)


def _front(server: phalanx.Server) -> psutil.Process:
    children = psutil.Process(server._process.pid).children(recursive=True)
    return next(child for child in children if "gateway.front" in child.cmdline())


def _commit_seconds(server: phalanx.Server) -> float:
    """Spent in commits since the front's start; 0 without a file."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    name = "phalanx_journal_write_seconds_sum"
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def measure_servers(rounds: int, tp: int) -> dict[str, list[Load]]:
    """By round."""
    options = {"tp": tp, "kv_cache_memory": "256MiB", "spare": "none"}
    found: dict[str, list[Load]] = {"disk": [], "off": []}
    with (
        phalanx.serve(MODEL, journal="disk", **options) as disk,
        phalanx.serve(MODEL, journal="off", **options) as off,
    ):
        servers = {"disk": disk, "off": off}
        for server in servers.values():
            asyncio.run(load(server, 8))
        for number in range(rounds):
            for name in sorted(servers, reverse=number % 2 == 1):
                found[name].append(asyncio.run(load(servers[name])))
            print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--steps-only", action="store_true")
    arguments = parser.parse_args()
    result: dict[str, object] = {
        "machine": machine(sorted(os.sched_getaffinity(0))),
        "load_average": os.getloadavg(),
        "sequences": SEQUENCES,
    }
    rows: list[list[object]] = []
    kinds = {"plain": {}, "logprobs": {"logprobs": True}, "sync": {"sync": True}}
    for kind, options in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            figures = measure_steps(Path(folder), **options)
        result[f"step_us_{kind}"] = figures
        rows.append(
            [f"a step of {SEQUENCES} sequences, {kind}, us", *(figures[k] for k in ("p50", "p99", "max"))]
        )
    show("One commit", ["", "p50", "p99", "max"], rows)
    if not arguments.steps_only:
        found = measure_servers(arguments.rounds, arguments.tp)
        pairs = list(zip(found["disk"], found["off"], strict=True))
        ratios = [on.tokens_per_second / off.tokens_per_second for on, off in pairs]
        result["tp"] = arguments.tp
        result["loads"] = {name: [asdict(one) for one in loads] for name, loads in found.items()}
        result["ratio_disk_to_off"] = ratios
        rows = [
            [f"--journal {name}", *(statistics.median(getattr(one, what) for one in loads) for what in WHAT)]
            for name, loads in found.items()
        ]
        show(
            f"{SEQUENCES} streams, tp {arguments.tp}, medians",
            ["", "tokens/s", "front's CPU us/token", "share of time in commits, %"],
            [[*row[:3], f"{100 * float(str(row[3])):.3f}"] for row in rows],
        )
        print(
            f"tokens/s with the journal over those without, in pairs: median {statistics.median(ratios):.3f}, "
            f"{min(ratios):.3f} to {max(ratios):.3f}; load average {os.getloadavg()[0]:.1f}"
        )
        write("journal", result)


if __name__ == "__main__":
    main()
