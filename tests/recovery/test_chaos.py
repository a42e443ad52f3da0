"""Faults drawn from a seed, under load, over the kinds of spares and shapes of worlds; and the schedule they
come from. The long run is `make chaos`; see docs/recovery.md."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from tests.cluster.namespaces import why_not
from tests.recovery.chaos import campaign, oracle
from tests.recovery.chaos.schedule import Deployment, Place
from tests.recovery.chaos.surroundings import surroundings

LEGS = [
    pytest.param(Deployment("warm"), 7, id="tp 2, warm"),
    pytest.param(Deployment("hot"), 7, id="tp 2, hot", marks=pytest.mark.slow),
    pytest.param(Deployment("none", tp=1, pp=2), 6, id="pp 2, none", marks=pytest.mark.slow),
]
SEED = 20


@pytest.mark.parametrize(("shape", "num_faults"), LEGS)
def test_no_request_dies(tmp_path: Path, shape: Deployment, num_faults: int) -> None:
    plan = campaign.Plan(SEED, num_faults, tmp_path / "state", [shape], num_http=4, num_zmq=2)
    [leg] = asyncio.run(campaign.run(plan, oracle.load()))
    assert leg.violations == []
    # What found nothing has also looked at something.
    assert len(leg.numbers) == num_faults
    assert len(leg.history.injections) >= num_faults - 1
    assert len(leg.history.requests) > 2 * num_faults


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
@pytest.mark.parametrize(("place", "num_faults"), [(Place.CRAMPED, 4), (Place.HOSTS, 4)])
def test_no_request_dies_of_a_full_machine_or_a_cut(tmp_path: Path, place: Place, num_faults: int) -> None:
    shape = Deployment("none", place=place)
    plan = campaign.Plan(SEED, num_faults, tmp_path / "state", [shape], num_http=3, num_zmq=2)
    expected = oracle.load()
    legs: list[campaign.Leg] = []

    def run() -> None:  # in a thread of its own, which stays where it is
        with surroundings(place) as around:
            legs.extend(asyncio.run(campaign.run(plan, expected, around)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    [leg] = legs
    assert leg.violations == []
    assert len(leg.numbers) == num_faults and len(leg.history.injections) >= num_faults - 1
