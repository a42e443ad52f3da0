"""What `--deterministic` costs: whole worlds with and without it, in pairs, and by themselves the sums over ranks, as
MPI takes them and in rank order.

`python -m benchmarks.deterministic [--calls N] [--rounds N] [--cores N] [--tp N ...]`. Only these sums differ: the
kernels are the same with and without the flag, and two ranks' sums are, too. A layer has two of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack

import torch

from benchmarks.common import (
    ROOT,
    bare_world,
    machine,
    median,
    model_folder,
    mpi_environment,
    mpirun,
    pin,
    show,
    write,
)
from benchmarks.offline import measure, phalanx_generate
from engine.collectives.mpi import MpiTensorGroup, join_world
from gateway.client import Client

HIDDEN_SIZE, LAYERS = 576, 30  # of SmolLM2-135M
ROWS = (1, 8, 32, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--cores", type=int, default=4)
    parser.add_argument("--tp", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--rounds", type=int, default=5, help="of whole worlds")
    parser.add_argument("--inside", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        _measure(arguments.inside, arguments.calls)
        return
    cores = pin(arguments.cores)
    rows: list[list[object]] = []
    results: dict[str, object] = {}
    for tp in arguments.tp:
        segments = tempfile.mkdtemp(prefix="phalanx-bench-", dir="/dev/shm")
        command = [*mpirun(tp, segments), sys.executable, "-m", "benchmarks.deterministic"]
        command += ["--inside", str(tp), "--calls", str(arguments.calls)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=mpi_environment(), capture_output=True, text=True, check=True
            )
        finally:
            shutil.rmtree(segments, ignore_errors=True)
        results[f"tp {tp}"] = figures = json.loads(done.stdout.splitlines()[-1])
        for count, (plain, ordered, ratio) in figures.items():
            step_ms = 2 * LAYERS * (ordered - plain) * 1e3
            rows.append([f"tp {tp}, {count} rows", plain * 1e6, ordered * 1e6, ratio, step_ms])
    columns = ["one sum", "MPI, us", "rank order, us", "ratio", "a step of 30 layers, ms more"]
    show("Sums over ranks, medians", columns, rows)
    worlds = {f"tp {tp}": _compare_worlds(tp, arguments.rounds) for tp in arguments.tp}
    rows = [
        [f"{tp}, {work}", *(median([pair[at] for pair in pairs]) for at in (0, 1)), _cost(pairs)]
        for tp, works in worlds.items()
        for work, pairs in works.items()
    ]
    title = f"bfloat16, tokens/s, {len(cores)} cores, medians of {arguments.rounds} pairs"
    show(title, ["", "without", "--deterministic", "slower by, %"], rows)
    result = {"machine": machine(cores), "seconds_and_ratio": results, "tokens_per_second": worlds}
    write("deterministic", result)


Pairs = list[tuple[float, float]]


def _cost(pairs: Pairs) -> float:
    """Median of the pairs' differences, in percent."""
    return 100 * (1 - median([ordered / plain for plain, ordered in pairs]))


def _compare_worlds(tp: int, rounds: int) -> dict[str, Pairs]:
    """By piece of work, tokens per second without and with the flag; both worlds live, one works at a time."""
    found: dict[str, Pairs] = {}
    folder = model_folder()
    with ExitStack() as stack:
        generate = []
        for flags in ((), ("--deterministic",)):
            endpoint = stack.enter_context(bare_world(folder, tp, 1, *flags))
            generate.append(phalanx_generate(stack.enter_context(Client(endpoint))))
            generate[-1](2, 64, 4)  # warm-up
        for number in range(rounds):
            speeds: dict[int, dict[str, float]] = {}
            for which in (0, 1) if number % 2 else (1, 0):
                speeds[which] = measure(generate[which])
            for work, plain in speeds[0].items():
                found.setdefault(work, []).append((plain, speeds[1][work]))
            print(f"tp {tp}: round {number + 1} of {rounds} done", file=sys.stderr)
    return found


def _measure(tp: int, calls: int) -> None:
    """On every rank; rank 0 prints, by rows: seconds of either kind, and the median of the pairs' ratios."""
    torch.set_num_threads(1)
    world = join_world(tp, 1)
    group = world.tensor_group
    assert isinstance(group, MpiTensorGroup)
    figures = {}
    for count in ROWS:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for call in range(calls):
            for in_order in (False, True) if call % 2 else (True, False):
                partial = torch.ones(count, HIDDEN_SIZE)
                group._in_rank_order = in_order
                world.control.barrier()
                begin = time.perf_counter()
                group.reduced(partial)
                seconds[in_order].append(time.perf_counter() - begin)
        pairs = [ordered / plain for plain, ordered in zip(seconds[False], seconds[True], strict=True)]
        figures[str(count)] = (median(seconds[False]), median(seconds[True]), median(pairs))
    if world.at.rank == 0:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
