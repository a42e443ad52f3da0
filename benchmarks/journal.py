"""What the journal and the guards cost: one commit of a step, the throughput of a deployment with and without the
journal, and that of a world with and without guards and supervisor, its rank 0 asked directly.

    python -m benchmarks.journal [--rounds 6] [--steps-only | --guards-only | --journal-only]

Paired: both deployments run at once, each is loaded in turn while the other one rests, and the order changes from
round to round, so that whatever else the machine does hits both alike. Each part replaces its own figures in the
result and leaves the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
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
from benchmarks.common import MODEL, RESULTS, bare_world, machine, model_folder, percentile, show, write
from benchmarks.offline import phalanx_generate
from gateway.client import Client
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


def measure_guards(rounds: int, tp: int) -> dict[str, list[float]]:
    """Tokens per second, by round: of a world that mpirun alone has started, and of one with guards and a supervisor.
    Both are asked at the gateway of their rank 0, so that the front is in neither."""
    found: dict[str, list[float]] = {"guarded": [], "bare": []}
    flags = ("--kv-cache-memory", str(256 << 20))
    with (
        phalanx.serve(MODEL, journal="off", tp=tp, kv_cache_memory="256MiB", spare="none") as server,
        bare_world(model_folder(), tp, 1, *flags) as bare,
        Client(_gateway(server)) as guarded_client,
        Client(bare) as bare_client,
    ):
        generate = {"guarded": phalanx_generate(guarded_client), "bare": phalanx_generate(bare_client)}
        for one in generate.values():
            one(SEQUENCES, 16, 8)
        for number in range(rounds):
            for name in sorted(generate, reverse=number % 2 == 1):
                found[name].append(SEQUENCES * NEW_TOKENS / generate[name](SEQUENCES, 16, NEW_TOKENS))
            print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    return found


def _gateway(server: phalanx.Server) -> str:
    with urllib.request.urlopen(f"{server.url}/cluster", timeout=30) as response:
        worlds = json.load(response)["worlds"]
    return str(next(world["gateway"] for world in worlds if world["state"] == "active"))


def _known() -> dict[str, object]:
    """The result so far: parts that this call does not measure stay."""
    file = RESULTS / "journal.json"
    known: dict[str, object] = json.loads(file.read_text()) if file.exists() else {}
    return known


def _spread(ratios: list[float]) -> dict[str, float]:
    ordered = sorted(ratios)
    quarter = len(ordered) // 4
    return {
        "pairs": len(ordered),
        "median": statistics.median(ordered),
        "quartile_low": ordered[quarter],
        "quartile_high": ordered[-1 - quarter],
        "min": ordered[0],
        "max": ordered[-1],
    }


def _tell(what: str, spread: dict[str, float]) -> None:
    print(
        f"tokens/s {what}, {spread['pairs']:.0f} pairs: median {spread['median']:.3f}, half of them within "
        f"{spread['quartile_low']:.3f} to {spread['quartile_high']:.3f}, all within {spread['min']:.3f} to "
        f"{spread['max']:.3f}; load average {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tp", type=int, default=2)
    only = parser.add_mutually_exclusive_group()
    for part in ("steps", "journal", "guards"):
        only.add_argument(f"--{part}-only", dest="part", action="store_const", const=part)
    arguments = parser.parse_args()
    wanted = {arguments.part} if arguments.part else {"steps", "journal", "guards"}
    result = _known() | {
        "machine": machine(sorted(os.sched_getaffinity(0))),
        "sequences": SEQUENCES,
        "new_tokens": NEW_TOKENS,
        "tp": arguments.tp,
    }
    if "steps" in wanted:
        result |= _steps()
    if "journal" in wanted:
        result |= _journal(arguments.rounds, arguments.tp)
    if "guards" in wanted:
        found = measure_guards(arguments.rounds, arguments.tp)
        ratios = [on / off for on, off in zip(found["guarded"], found["bare"], strict=True)]
        result["guards"] = {"tokens_per_second": found, "ratios": ratios, "spread": _spread(ratios)}
        _tell("of a guarded world over those of a bare one", _spread(ratios))
    write("journal", result)


def _steps() -> dict[str, object]:
    result: dict[str, object] = {}
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
    return result


def _journal(rounds: int, tp: int) -> dict[str, object]:
    found = measure_servers(rounds, tp)
    pairs = list(zip(found["disk"], found["off"], strict=True))
    ratios = [on.tokens_per_second / off.tokens_per_second for on, off in pairs]
    rows: list[list[object]] = [
        [f"--journal {name}", *(statistics.median(getattr(one, what) for one in loads) for what in WHAT)]
        for name, loads in found.items()
    ]
    show(
        f"{SEQUENCES} streams, tp {tp}, medians",
        ["", "tokens/s", "front's CPU us/token", "share of time in commits, %"],
        [[*row[:3], f"{100 * float(str(row[3])):.3f}"] for row in rows],
    )
    _tell("with the journal over those without", _spread(ratios))
    return {
        "loads": {name: [asdict(one) for one in loads] for name, loads in found.items()},
        "ratio_disk_to_off": ratios,
        "spread_disk_to_off": _spread(ratios),
    }


if __name__ == "__main__":
    main()
