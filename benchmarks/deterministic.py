"""What `--deterministic` costs: sums over the ranks as MPI takes them and in rank order, in turn, in one world.

`python -m benchmarks.deterministic [--calls N] [--cores N] [--tp N ...]`. Nothing else differs: the kernels are the
same with and without the flag, and two ranks' sums are, too. A layer has two such sums.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks.common import ROOT, machine, median, mpi_environment, mpirun, pin, show, write
from engine.collectives.mpi import MpiTensorGroup, join_world

HIDDEN_SIZE, LAYERS = 576, 30  # of SmolLM2-135M
ROWS = (1, 8, 32, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--cores", type=int, default=4)
    parser.add_argument("--tp", type=int, nargs="+", default=[3, 4])
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
    write("deterministic", {"machine": machine(cores), "seconds_and_ratio": results})


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
