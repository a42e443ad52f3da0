"""What `phalanx doctor` starts on every host: joins MPI, says where it runs, and measures a ring and an all-reduce.
`python -m engine.collectives.check [--connect HOST:PORT]`: one JSON line a rank on standard output. No model."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

SEGMENTS_VARIABLE = "OMPI_MCA_btl_sm_backing_directory"
"""Names a folder for shared memory, which nobody has made on other hosts."""
SMALL_BYTES = 8
LARGE_BYTES = 1 << 20
ONE_ROW_FLOATS = 1024
"""As an all-reduce of one token's hidden state."""
FOR_S = 0.3
"""How long each figure is measured at least."""
CONNECT_TIMEOUT_S = 5.0


def repeated(work: Callable[[], object], agree: Callable[[float], float]) -> float:
    """Seconds a call, over so many calls that they take FOR_S; the same number of them on each rank."""
    for _ in range(3):
        work()
    began = time.perf_counter()
    for _ in range(3):
        work()
    once_s = agree((time.perf_counter() - began) / 3)
    count = max(3, min(10_000, int(FOR_S / max(once_s, 1e-7))))
    began = time.perf_counter()
    for _ in range(count):
        work()
    return agree((time.perf_counter() - began) / count)


def measure(world: Any, mpi: Any) -> dict[str, float]:
    """Seconds and bytes a second of a hop around the ring of all ranks, and of an all-reduce."""
    import numpy

    def agree(seconds: float) -> float:
        return float(world.allreduce(seconds, op=mpi.MAX))

    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    small, large = numpy.zeros(SMALL_BYTES, numpy.uint8), numpy.zeros(LARGE_BYTES, numpy.uint8)
    received = numpy.empty_like(large)

    def around() -> None:
        """A small message, from each to the next, one after the other."""
        if world.rank == 0:
            world.Send(small, after)
            world.Recv(small, before)
        else:
            world.Recv(small, before)
            world.Send(small, after)

    def shift() -> None:
        world.Sendrecv(large, after, recvbuf=received, source=before)

    row, rows = numpy.ones(ONE_ROW_FLOATS, numpy.float32), numpy.ones(LARGE_BYTES // 4, numpy.float32)
    sums = numpy.empty_like(row), numpy.empty_like(rows)
    figures = {
        "ring_hop_s": repeated(around, agree) / world.size,
        "ring_bytes_per_s": LARGE_BYTES / repeated(shift, agree),
        "all_reduce_s": repeated(lambda: world.Allreduce(row, sums[0]), agree),
        "all_reduce_bytes_per_s": LARGE_BYTES / repeated(lambda: world.Allreduce(rows, sums[1]), agree),
    }
    if not (sums[0] == world.size).all():
        raise SystemExit("the all-reduce gave a wrong sum")
    return figures


def connects(endpoint: str) -> str | None:
    """Why the port of the first host cannot be reached from here, as guards will have to; None if it can."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return str(error.strerror or error)
    return None


def main(connect: str) -> None:
    folder = os.environ.get(SEGMENTS_VARIABLE)
    is_own = folder is not None and not Path(folder).exists()
    if folder is not None:
        Path(folder).mkdir(mode=0o700, exist_ok=True)
    from mpi4py import MPI

    MPI.Init()
    world = MPI.COMM_WORLD
    try:
        facts: dict[str, Any] = {
            "rank": world.rank,
            "size": world.size,
            "host": socket.gethostname(),
            "python": platform.python_version(),
            "mpi4py": metadata.version("mpi4py"),
            "phalanx": metadata.version("phalanx-serve"),
            "mpi": MPI.Get_library_version().splitlines()[0].strip("\0 ")[:60],
            "cores": len(os.sched_getaffinity(0)),
            "shm_free": shutil.disk_usage("/dev/shm").free,
            "connects": connects(connect) if connect else None,
        }
        if world.size > 1:
            facts |= measure(world, MPI)
        for rank in range(world.size):  # one after the other, so that no two lines become one
            if rank == world.rank:
                sys.stdout.write(json.dumps(facts) + "\n")
                sys.stdout.flush()
            world.Barrier()
    finally:
        MPI.Finalize()
        if is_own and folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--connect", default="", metavar="HOST:PORT")
    main(parser.parse_args().connect)
