"""A rank that joins MPI and synchronises with the others for ever."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from launcher.watch import EXIT_CONFIG, Phase, ProgressPage, die_with_parent


def main() -> None:
    die_with_parent()
    behaviour = os.environ.get("SMALL_WORLD", "")
    epoch = int(sys.argv[sys.argv.index("--epoch") + 1])
    page = ProgressPage.open(Path(os.environ["PHALANX_PROGRESS_PAGE"]))
    page.enter(Phase.IMPORTING)
    if behaviour == "crash" or (behaviour == "crash first" and epoch == 1):
        raise RuntimeError("the rank's own words")
    if behaviour == "config":
        print("phalanx: error: --kv-cache-memory 1 is too small", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    if behaviour == "slow start":
        time.sleep(60)
    page.enter(Phase.JOINING)
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    page.enter(Phase.LOADING)
    page.load(1, 1)
    world.Barrier()
    if world.rank == 0:
        page.serve_at("tcp://127.0.0.1:1")
    step = 0
    while True:
        page.enter(Phase.IDLE)
        request = world.Ibarrier()
        while not request.Test():
            time.sleep(0.002)
        step += 1
        page.step(step)


if __name__ == "__main__":
    main()
