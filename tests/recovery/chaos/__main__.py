"""`python -m tests.recovery.chaos`: a campaign of faults, which goes on where it was cut off."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from tests.recovery.chaos import campaign, oracle, report
from tests.recovery.chaos.history import Oracle
from tests.recovery.chaos.schedule import Deployment, Place
from tests.recovery.chaos.surroundings import Surroundings, surroundings
from tests.references import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.recovery.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument(
        "--calm",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="with --faults 0: load without faults, to see that none is found",
    )
    parser.add_argument("--clients", type=int, default=8, help="of which three in eight speak ZeroMQ")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults-a-leg", type=int, default=20, help="before the deployment is started anew")
    parser.add_argument("--spares", help="only these: none,warm,hot, with --tp and --pp")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument(
        "--deterministic", action="store_true", help="in bfloat16, bit for bit what it is undisturbed"
    )
    parser.add_argument(
        "--place",
        type=Place,
        default=Place.USUAL,
        help="usual, cramped (a small /dev/shm and disk, which get full) or hosts (rank 1 on another one); as root",
    )
    parser.add_argument(
        "--state", type=Path, help="folder of state and logs (default: build/chaos/SEED, -PLACE)"
    )
    parser.add_argument("--name", default="chaos", help="of the report's files in benchmarks/results")
    parser.add_argument("--report-only", action="store_true", help="of what has been done so far; no faults")
    parser.add_argument(
        "--also",
        type=Path,
        nargs="*",
        default=[],
        help="states of other runs, for the report of all together",
    )
    arguments = parser.parse_args()
    place: Place = arguments.place
    shapes = campaign.SHAPES if place is Place.USUAL else campaign.ELSEWHERE[place]
    if arguments.spares:
        kinds = arguments.spares.split(",")
        shapes = [Deployment(kind, arguments.tp, arguments.pp, place) for kind in kinds]
    folder = arguments.state or ROOT / "build" / "chaos" / _state_name(arguments)
    num_zmq = arguments.clients * 3 // 8
    plan = campaign.Plan(
        arguments.seed,
        arguments.faults,
        folder,
        shapes,
        arguments.faults_a_leg,
        num_http=arguments.clients - num_zmq,
        num_zmq=num_zmq,
        deterministic=arguments.deterministic,
        calm_s=arguments.calm,
    )
    if arguments.report_only:
        legs = list(campaign.load_legs(folder))
    else:
        expected = oracle.load()
        with surroundings(place) as around:
            legs = asyncio.run(_run(plan, expected, around))
    for other in arguments.also:
        legs += campaign.load_legs(other)
    page = report.write(legs, arguments.seed, arguments.name)
    violations = [violation for leg in legs for violation in leg.violations]
    done = sum(len(leg.numbers) for leg in legs)
    requests = sum(len(leg.history.requests) for leg in legs)
    print(f"{done} faults, {requests} requests, {len(violations)} violations; logs in {folder}")
    print(f"written: {page}")
    return 1 if violations else 0


def _state_name(arguments: argparse.Namespace) -> str:
    place: Place = arguments.place
    return str(arguments.seed) if place is Place.USUAL else f"{arguments.seed}-{place.value}"


async def _run(plan: campaign.Plan, expected: Oracle, around: Surroundings) -> list[campaign.Leg]:
    """To be ended by SIGTERM as by Ctrl-C: what runs is ended in order, and another call goes on from there."""
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    try:
        return await campaign.run(plan, expected, around)
    except asyncio.CancelledError:
        return list(campaign.load_legs(plan.folder))


if __name__ == "__main__":
    sys.exit(main())
