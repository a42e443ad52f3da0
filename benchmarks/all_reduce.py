"""Sums over the ranks of a host: through shared memory beside MPI's, in turn, in the same processes.

`mpirun -np 2 python -m benchmarks.all_reduce`. Prints microseconds of a sum, medians of rounds, at rank 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from mpi4py import MPI

from benchmarks.common import median
from engine.collectives.shared_memory import SharedMemorySums

ROWS, WIDTH, ROUNDS = (1, 32, 512), 576, 30


def main() -> None:
    if not MPI.Is_initialized():
        MPI.Init_thread()
    comm = MPI.COMM_WORLD
    shared = SharedMemorySums.join(comm)
    assert shared is not None, "these ranks share no memory"
    torch.set_num_threads(1)
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "MPI": lambda data: comm.Allreduce(MPI.IN_PLACE, data.numpy(), MPI.SUM),
        "shared memory": shared.sum,
    }
    for rows in ROWS:
        data = torch.zeros(rows, WIDTH)
        repeats = max(20, 4000 // rows)
        figures: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, reduce in ways.items():
                comm.Barrier()
                begin = time.perf_counter()
                for _ in range(repeats):
                    reduce(data)
                figures[name].append((time.perf_counter() - begin) / repeats * 1e6)
        if comm.Get_rank() == 0:
            pairs = zip(figures["MPI"], figures["shared memory"], strict=True)
            medians = ", ".join(f"{name} {median(values):.1f} us" for name, values in figures.items())
            ratio = median([mpi / ours for mpi, ours in pairs])
            print(f"{comm.Get_size()} ranks, {rows} x {WIDTH}: {medians}, ratio {ratio:.2f}", flush=True)
    comm.Barrier()
    MPI.Finalize()


if __name__ == "__main__":
    main()
