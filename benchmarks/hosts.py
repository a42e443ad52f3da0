"""A host is cut off from the network without a word: how long until the supervisor knows, until the ranks behind the
cut are dead, and until the supervisor is certain of that, so that the next world may serve.

`python -m benchmarks.hosts [--cuts N] [--for SECONDS]`, as root: the hosts are network namespaces (tests/cluster),
the ranks small ones that only beat, since what is timed is the supervisor's and the guards' business. Each cut is
appended to the state, the next call goes on from there, and the figures are of all.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
from msgspec import Struct

from benchmarks.common import ROOT, machine, percentile, pin, show, write
from benchmarks.targets import TARGETS
from launcher.restarts import SHORT_LIFE_S
from tests.cluster.namespaces import Cluster, cluster, why_not
from tests.recovery.run_processes import is_left
from tests.recovery.small_world.deployed import Deployment

RANK = "small_world.rank"
TIMEOUT_S = 60.0
PARTS = {
    "detected": "the supervisor knows",
    "dead behind": "no rank lives behind the cut",
    "fenced": "the supervisor is certain of it",
}


class Cut(Struct):
    """One line of the state: seconds from the cut to each part."""

    at: float
    cores: int
    load_average: float
    seconds: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=int, default=20, help="those of earlier calls included")
    parser.add_argument("--for", type=float, default=math.inf, dest="for_s", metavar="SECONDS")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "cuts.jsonl")
    arguments = parser.parse_args()
    if (problem := why_not()) is not None:
        sys.exit(f"no hosts on this machine: {problem}")
    cores = pin(2)
    ends_at = time.monotonic() + arguments.for_s
    if len(_known(arguments.state, len(cores))) < arguments.cuts:
        with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as folder:
            _measure(Path(folder), arguments, len(cores), ends_at)
    _report(_known(arguments.state, len(cores)), cores)


def _known(state: Path, cores: int) -> list[Cut]:
    if not state.exists():
        return []
    cuts = [msgspec.json.decode(line, type=Cut) for line in state.read_bytes().splitlines()]
    return [cut for cut in cuts if cut.cores == cores]


def _measure(folder: Path, arguments: argparse.Namespace, cores: int, ends_at: float) -> None:
    arguments.state.parent.mkdir(parents=True, exist_ok=True)
    with cluster(3, folder) as hosts:
        names = ",".join(f"{name}:1" for name in hosts.names)
        deployment = Deployment(folder / "run", hosts=names, prefix=hosts.prefix, variables=hosts.variables)
        try:
            assert deployment.has_started, deployment.errors.read_text()
            deployment.wait_ready()
            epoch = 0
            for number in range(len(_known(arguments.state, cores)), arguments.cuts):
                world = deployment.wait_active(above=epoch, timeout_s=TIMEOUT_S)
                epoch = world["epoch"]
                if time.monotonic() >= ends_at:
                    break
                # At any moment between two beats, and late enough to be taken for no loop of worlds that die at once.
                time.sleep(SHORT_LIFE_S + random.uniform(0.1, 1.1))
                cut = _cut(hosts, deployment, world, cores)
                with arguments.state.open("ab") as file:
                    file.write(msgspec.json.encode(cut) + b"\n")
                told = ", ".join(f"{part} {seconds:.2f}" for part, seconds in cut.seconds.items())
                print(f"cut {number + 1} of {arguments.cuts}: {told} s", file=sys.stderr)
        finally:
            deployment.stop()


def _cut(hosts: Cluster, deployment: Deployment, world: dict[str, Any], cores: int) -> Cut:
    """Cuts off the host of rank 1, until its rank is known to be dead."""
    index = int(world["ranks"][1]["host"].removeprefix("host"))
    behind = [p for p in hosts.processes(index) if RANK in " ".join(p.cmdline())]
    assert behind, "no rank on that host"
    at, seconds = time.time(), {}
    hosts.cut(index)
    try:
        give_up_at = time.monotonic() + TIMEOUT_S
        while len(seconds) < len(PARTS) and time.monotonic() < give_up_at:
            if "dead behind" not in seconds and not any(_lives(process) for process in behind):
                seconds["dead behind"] = time.time() - at
            table = deployment.table()
            for fault in table["faults"]:
                if fault["epoch"] == world["epoch"]:
                    seconds["detected"] = fault["at"] - at
                    if fault["abort_s"] is not None:
                        seconds["fenced"] = fault["at"] - at + fault["abort_s"]
            time.sleep(0.005)
    finally:
        hosts.heal(index)
    return Cut(at, cores, os.getloadavg()[0], seconds)


def _lives(process: psutil.Process) -> bool:
    try:
        return is_left(process) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _report(cuts: list[Cut], cores: list[int]) -> None:
    spreads: dict[str, dict[str, float]] = {}
    for part in PARTS:
        values = [cut.seconds[part] for cut in cuts if part in cut.seconds]
        spreads[part] = {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "max": max(values)}
    title = f"A silent cut of the network, {len(cuts)} times, {len(cores)} cores"
    rows: list[list[object]] = [[f"{part}: {what}", *spreads[part].values()] for part, what in PARTS.items()]
    show(title, ["seconds from the cut", "p50", "p99", "max"], rows)
    [target] = [target for target in TARGETS if target.fault == "silent cut"]
    measured_s = spreads[target.part][target.share]
    met = "met" if measured_s <= target.limit_s else "MISSED"
    print(f"target: {target.label}, {target.share}: {target.limit_s:g} s: {met} ({measured_s:.3f} s)")
    write(
        "hosts",
        {
            "machine": machine(cores),
            "cuts": len(cuts),
            "load_average_p50": percentile([cut.load_average for cut in cuts], 0.5),
            "seconds": spreads,
            "target_s": target.limit_s,
            "all": [cut.seconds for cut in cuts],
        },
    )


if __name__ == "__main__":
    main()
