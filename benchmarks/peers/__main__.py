"""Phalanx beside other engines: same weights, same cores, same run, in turn.

`python -m benchmarks.peers [--rounds N] [--cores N] [--peers NAME,...]`. Every engine stays loaded, and in each
round each does each piece of work, while the others are stopped, so that a slow minute of a shared machine hits
all of them; ratios are medians of the rounds' ratios. Peers are driven in their own processes by their own
Python interface, which spares them HTTP; Phalanx is measured at a ZeroMQ client of rank 0, so its scheduler and
gateway are in its figures. The first use installs each peer into an environment of its own, which takes some
minutes. Results: benchmarks/results/peers.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from benchmarks.common import bare_world, machine, median, model_folder, pin, show, write
from benchmarks.offline import phalanx_generate
from benchmarks.peers.driving import Contestant, alone, driven
from benchmarks.peers.environments import PEERS, Peer
from benchmarks.peers.work import Generate
from gateway.client import Client

BATCHES = (1, 8, 32)
PROMPT_TOKENS, DECODED_TOKENS = 64, 64
PREFILL_SEQUENCES, PREFILL_TOKENS = 8, 1024
KV_CACHE_BYTES = 512 * 2**20
"""Of each rank: all worlds are there at once."""


@dataclass(frozen=True)
class Ours:
    """Phalanx in one shape."""

    label: str
    tp: int
    cores: int | None = None
    """Of the cores that all have; None: all."""
    options: tuple[str, ...] = ()


OURS = (
    Ours("phalanx bfloat16, tp 1", 1),
    Ours("phalanx bfloat16, tp 2", 2),
    Ours("phalanx bfloat16, tp 1, one core", 1, cores=1),
    Ours("phalanx int8, tp 1", 1, options=("--quantization", "int8")),
    Ours("phalanx int8, tp 2", 2, options=("--quantization", "int8")),
    Ours("phalanx int4, tp 1", 1, options=("--quantization", "int4")),
    Ours("phalanx int4, tp 2", 2, options=("--quantization", "int4")),
)

DECODE_1, DECODE_32, PREFILL = "decode, 1 sequence", "decode, 32 sequences", "prefill, 8 x 1024"
TARGETS = (
    (DECODE_1, "bfloat16", "vllm bfloat16", 2.0),
    (DECODE_32, "bfloat16", "vllm bfloat16", 1.5),
    (PREFILL, "bfloat16", "vllm bfloat16", 1.5),
    (DECODE_1, "int8", "ctranslate2 int8", 1.5),
    (DECODE_1, "int4", "llama-cpp Q4_1", 1.5),
)
"""(work, our weights, peer, ratio). The better of our shapes on all cores counts."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--peers", help="names, by commas; default: all")
    arguments = parser.parse_args()
    wanted = arguments.peers.split(",") if arguments.peers else [peer.name for peer in PEERS]
    missing: dict[str, str] = {}
    peers = [peer for peer in PEERS if peer.name in wanted and _installed(peer, missing)]
    cores = pin(arguments.cores)
    folder = model_folder()
    bandwidth = _bandwidth()
    figures: dict[str, dict[str, list[float]]] = {}
    starts: dict[str, float] = {}
    with ExitStack() as stack:
        contestants: dict[str, Contestant] = {}
        for peer in peers:
            try:
                process = peer.start(folder, cores)
                generate, starts[peer.label] = stack.enter_context(driven(peer.label, process))
            except RuntimeError as error:
                missing[peer.label] = f"{error}; see {peer.log}"
                continue
            contestants[peer.label] = Contestant(
                partial(nullcontext, generate), peer.max_sequences, psutil.Process(process.pid)
            )
            print(f"{peer.label}: loaded after {starts[peer.label]:.1f} s", file=sys.stderr)
        for ours in OURS:
            begin = time.perf_counter()
            before = {child.pid for child in psutil.Process().children()}
            options = ("--kv-cache-memory", str(KV_CACHE_BYTES), *ours.options)
            world = bare_world(folder, ours.tp, 1, *options, cores=cores[: ours.cores])
            asked = partial(_asked, stack.enter_context(world))
            with asked() as generate:
                generate(2, PROMPT_TOKENS, 4)
            starts[ours.label] = time.perf_counter() - begin
            (mpirun,) = (child for child in psutil.Process().children() if child.pid not in before)
            contestants[ours.label] = Contestant(asked, None, mpirun)
        for number in range(arguments.rounds):
            for label, contestant in contestants.items():
                with alone(contestant, contestants.values()), contestant.asked() as generate:
                    measured = measure(generate, contestant.max_sequences)
                for work, value in measured.items():
                    figures.setdefault(label, {}).setdefault(work, []).append(value)
            print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr)
    report(figures, starts, missing, bandwidth, cores)


@contextmanager
def _asked(endpoint: str) -> Iterator[Generate]:
    """A client for one turn: it would miss a world that is stopped."""
    with Client(endpoint) as client:
        yield phalanx_generate(client)


def measure(generate: Generate, max_sequences: int | None) -> dict[str, float]:
    """Tokens per second of each piece of work that the engine can do."""
    speeds = {}
    for batch in BATCHES:
        if max_sequences is None or batch <= max_sequences:
            first = generate(batch, PROMPT_TOKENS, 1)
            whole = generate(batch, PROMPT_TOKENS, 1 + DECODED_TOKENS)
            speeds[f"decode, {batch} sequence{'s' * (batch > 1)}"] = batch * DECODED_TOKENS / (whole - first)
    sequences = PREFILL_SEQUENCES if max_sequences is None else min(PREFILL_SEQUENCES, max_sequences)
    speeds[PREFILL] = sequences * PREFILL_TOKENS / generate(sequences, PREFILL_TOKENS, 1)
    return speeds


def _installed(peer: Peer, missing: dict[str, str]) -> bool:
    try:
        peer.install()
    except (OSError, subprocess.CalledProcessError) as error:
        missing[peer.label] = f"cannot be installed: {error}"
        print(f"{peer.label} {missing[peer.label]}", file=sys.stderr)
        return False
    return True


def _bandwidth() -> float:
    """Bytes per second that the cores read together, measured before anything is loaded."""
    program = "from benchmarks.profile import memory_bandwidth as m; print(m())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


def ratios(figures: dict[str, dict[str, list[float]]], ours: str, peer: str) -> dict[str, float]:
    """By work that both did: the median of the rounds' ratios."""
    return {
        work: median([mine / other for mine, other in zip(figures[ours][work], theirs, strict=True)])
        for work, theirs in figures[peer].items()
        if work in figures[ours]
    }


def report(
    figures: dict[str, dict[str, list[float]]],
    starts: dict[str, float],
    missing: dict[str, str],
    bandwidth: float,
    cores: list[int],
) -> None:
    works = [f"decode, {batch} sequence{'s' * (batch > 1)}" for batch in BATCHES] + [PREFILL]
    rows: list[list[object]] = [
        [label, *(median(done[work]) if work in done else "" for work in works), starts[label]]
        for label, done in figures.items()
    ]
    show(f"SmolLM2-135M, {len(cores)} cores, tokens/s, medians", ["", *works, "loaded after, s"], rows)
    for label, why in missing.items():
        print(f"left out: {label}: {why}")
    print(f"memory reads {bandwidth / 1e9:.1f} GB/s")
    ours = [label for label in figures if label.startswith("phalanx") and "one core" not in label]
    peers = [label for label in figures if not label.startswith("phalanx")]
    targets = []
    for work, weights, peer, target in TARGETS:
        mine = [label for label in ours if f" {weights}," in label]
        if peer in figures and mine:
            best = max(ratios(figures, label, peer)[work] for label in mine)
            targets.append({"work": work, "weights": weights, "peer": peer, "target": target, "ratio": best})
            print(f"{work}, {weights} / {peer}: {best:.2f} (target {target})")
    one, two = OURS[2].label, OURS[1].label
    scaling = ratios(figures, two, one)
    print("tp 2 / tp 1 with one core: " + ", ".join(f"{work} {ratio:.2f}" for work, ratio in scaling.items()))
    write(
        "peers",
        {
            "machine": machine(cores),
            "load": Path("/proc/loadavg").read_text().split()[:3],
            "versions": {peer.name: _versions(peer) for peer in PEERS if peer.label in figures},
            "bytes_per_second": bandwidth,
            "tokens_per_second": figures,
            "loaded_after_s": starts,
            "left_out": missing,
            "ratios": {label: {peer: ratios(figures, label, peer) for peer in peers} for label in ours},
            "tp2_to_one_core": scaling,
            "targets": targets,
        },
    )


def _versions(peer: Peer) -> str:
    """Version of the peer's main package."""
    package = peer.packages[-1][0]
    program = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([str(peer.python), "-c", program], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
