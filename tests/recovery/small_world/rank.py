"""A rank that joins MPI and synchronises with the others for ever, every 20 ms."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from launcher.lease_watch import die_with_lease
from launcher.watch import EXIT_CONFIG, Phase, ProgressPage, SpareKind, StartGate, die_with_parent


def main() -> None:
    die_with_parent()
    behaviour = os.environ.get("SMALL_WORLD", "")
    epoch = int(sys.argv[sys.argv.index("--epoch") + 1])
    gate = StartGate.from_environment()
    page = ProgressPage.open(Path(os.environ["PHALANX_PROGRESS_PAGE"]))
    die_with_lease(page)
    page.enter(Phase.IMPORTING)
    if behaviour == "crash" or (behaviour == "crash first" and epoch == 1):
        raise RuntimeError("the rank's own words")
    if behaviour == "spares crash" and gate.kind is not SpareKind.NONE:
        raise RuntimeError("the spare's own words")
    if behaviour == "config":
        print("phalanx: error: --kv-cache-memory 1 is too small", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    if behaviour == "slow start":
        time.sleep(60)
    if behaviour == "spares slow" and gate.kind is not SpareKind.NONE:
        time.sleep(2)
    if gate.kind is SpareKind.WARM:
        page.enter(Phase.PARKED)
        gate.wait()
    page.enter(Phase.JOINING)
    if behaviour == "join slow" and gate.kind is not SpareKind.NONE:
        time.sleep(1)
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    page.enter(Phase.LOADING)
    page.load(1, 1)
    world.Barrier()
    if gate.kind is SpareKind.HOT:
        page.enter(Phase.PARKED)
        gate.wait()
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
        work(behaviour, epoch, world.rank, step)


def work(behaviour: str, epoch: int, rank: int, step: int) -> None:
    """What one step takes."""
    time.sleep(0.02)
    if behaviour == "short lives" and (rank, step) == (1, 20):
        os._exit(3)  # at once: nothing waits for the others
    if behaviour == "hang" and (epoch, rank, step) == (1, 1, 50):
        time.sleep(3600)
    if behaviour == "slow" and rank == 1:
        # Long enough to be a hang, were the steps before it not slow too.
        time.sleep(6.0 if step == 5 else 0.9)


if __name__ == "__main__":
    main()
