"""What a step costs before anybody computes: encoding, broadcasting and decoding its plan; and a world at rest.

`python -m benchmarks.control_plane`. The peer in the same run is mpi4py's pickled `bcast` of the same plan.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time

from benchmarks.common import (
    ROOT,
    bare_world,
    machine,
    median,
    model_folder,
    mpi_environment,
    mpirun,
    percentile,
    pin,
    show,
    write,
)
from gateway.client import Client
from gateway.protocol import SamplingParams

SEQUENCES = 32
STEPS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        _rank()
        return
    cores = pin(arguments.cores)
    plans = {ranks: _plans(ranks) for ranks in (2, 4)}
    rows: list[list[object]] = []
    for ranks, parts in plans.items():
        for part, values in parts.items():
            rows.append([f"{ranks} ranks: {part}", median(values), percentile(values, 0.99)])
    show(f"plan of {SEQUENCES} decoding sequences, microseconds", ["", "p50", "p99"], rows)
    idle, wake = _idle(2)
    show(
        "world at rest, tp 2",
        ["", ""],
        [["CPU of a rank, percent of a core", f"{max(idle):.2f}"],
         ["first token from rest, beyond one from an awake world, ms p50", f"{wake:.2f}"]],
    )  # fmt: skip
    summary = {
        str(ranks): {
            part: {"p50": median(values), "p99": percentile(values, 0.99)} for part, values in parts.items()
        }
        for ranks, parts in plans.items()
    }
    write(
        "control_plane",
        {
            "machine": machine(cores),
            "plan_us": summary,
            "idle_percent_of_a_core": idle,
            "first_token_from_rest_extra_ms_p50": wake,
        },
    )


def _plans(ranks: int) -> dict[str, list[float]]:
    """Microseconds of each of STEPS plans, as rank 0 saw them."""
    segments = tempfile.mkdtemp(prefix="phalanx-bench-", dir="/dev/shm")
    try:
        command = [*mpirun(ranks, segments), sys.executable, "-m", "benchmarks.control_plane", "--rank"]
        done = subprocess.run(command, cwd=ROOT, env=mpi_environment(), capture_output=True, text=True)
    finally:
        shutil.rmtree(segments, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    parts: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return parts


def _rank() -> None:
    """Inside mpirun: plans of a steady decode, each answered by the last rank so that the way there is timed."""
    from mpi4py import MPI

    from engine.collectives.mpi import join_world
    from engine.plan import PlanCodec, StepPlan

    world = MPI.COMM_WORLD
    joined = join_world(world.Get_size(), 1)
    codec = PlanCodec(1)
    handles = list(range(SEQUENCES))
    answers = world.Dup()
    parts: dict[str, list[float]] = {
        "encode": [],
        "encode, broadcast, decode": [],
        "pickled bcast (peer)": [],
    }
    for step in range(STEPS + 100):
        tokens = [(step * 31 + row * 977) % 49152 for row in handles]
        # A sequence fills a block of 16 tokens every 16 steps: two new blocks a step.
        plan = StepPlan(
            step, 0, decode_handles=handles, decode_tokens=tokens, decode_blocks=[(1, step), (7, step)]
        )
        answers.Barrier()
        begin = time.perf_counter()
        if world.Get_rank() == 0:
            encoded = codec.encode(plan)
            parts["encode"].append((time.perf_counter() - begin) * 1e6)
            joined.control.broadcast_plan(encoded)
        else:
            decoded = codec.decode(joined.control.receive_plan())
            assert decoded.decode_tokens == tokens
        # All ranks have decoded when the barrier opens; its own price is taken off below.
        answers.Barrier()
        with_barrier = time.perf_counter() - begin
        begin = time.perf_counter()
        answers.Barrier()
        barrier = time.perf_counter() - begin
        parts["encode, broadcast, decode"].append((with_barrier - barrier) * 1e6)
        begin = time.perf_counter()
        world.bcast(plan if world.Get_rank() == 0 else None)
        answers.Barrier()
        parts["pickled bcast (peer)"].append((time.perf_counter() - begin - barrier) * 1e6)
    # From rest: the others have slept for a while when the plan comes.
    parts["wake from rest"] = []
    reply = bytearray(1)
    for step in range(60):
        if world.Get_rank() == 0:
            time.sleep(0.2)
            begin = time.perf_counter()
            joined.control.broadcast_plan(codec.encode(StepPlan(step, 0)))
            for rank in range(1, world.Get_size()):
                answers.Recv(reply, source=rank)
            parts["wake from rest"].append((time.perf_counter() - begin) * 1e6)
        else:
            codec.decode(joined.control.receive_plan())
            answers.Send(reply, dest=0)
    if world.Get_rank() == 0:
        print(json.dumps({name: values[100:] or values for name, values in parts.items()}))


def _idle(tp: int) -> tuple[list[float], float]:
    """CPU of each rank of an idle world in percent of a core, over 10 s; and how much longer the first token
    takes from rest than in a world that is awake (ms, p50)."""
    import psutil

    params = SamplingParams(max_tokens=1, temperature=0.0)
    with bare_world(model_folder(), tp) as endpoint, Client(endpoint) as client:

        def first_token() -> float:
            begin = time.perf_counter()
            client.generate([1, 2, 3], params)
            return (time.perf_counter() - begin) * 1e3

        for _ in range(20):
            first_token()
        awake, asleep = [], []
        for _ in range(40):
            time.sleep(0.2)
            asleep.append(first_token())
            awake.append(first_token())
        ranks = [p for p in psutil.process_iter(["cmdline"]) if endpoint in (p.info["cmdline"] or [])]
        ranks = [p for p in ranks if p.cmdline()[0] == sys.executable]
        time.sleep(1)
        before = [sum(p.cpu_times()[:2]) for p in ranks]
        time.sleep(10)
        used = [sum(p.cpu_times()[:2]) - old for p, old in zip(ranks, before, strict=True)]
    assert len(used) == tp, f"{len(used)} processes were taken for ranks"
    return [seconds * 10 for seconds in used], median(asleep) - median(awake)


if __name__ == "__main__":
    main()
