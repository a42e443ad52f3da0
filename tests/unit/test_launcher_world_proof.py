"""Whether a world is what was asked for, judged from what guards and ranks report."""

from __future__ import annotations

import dataclasses

import pytest

from launcher.guard_messages import GuardHello, RankFacts
from launcher.host_list import Host
from launcher.hosts import HostPool
from launcher.launchers.flavors import Flavor
from launcher.logs import EventLog
from launcher.processes import host_id
from launcher.watch import EXIT_CONFIG
from launcher.world_proof import MISMATCH, SHORTAGE, clock_warnings, find_mismatch
from launcher.world_records import RankWatch

HOSTS = (Host("a", 1), Host("b", 2))
FACTS = RankFacts(
    1,
    0,
    python="3.11.7",
    torch="2.13.0+cpu",
    mpi="Open MPI v5.0.11",
    mpi4py="4.1.2",
    phalanx="0.1.0 abc",
    prefix="/opt/venv",
    model="/models/m",
    weights="0011",
    config="2233",
)


def watch(
    machine: str, facts: RankFacts | None = FACTS, free_mib: int = 1000, ahead_s: float = 0.0
) -> RankWatch:
    hello = GuardHello(1, 0, f"name-{machine}", machine, 1, 1, 1, 1, shm_free_bytes=free_mib << 20)
    return RankWatch(hello, b"", 0.0, facts=facts, clock_ahead_s=ahead_s)


def world(**changes: str) -> dict[int, RankWatch]:
    """Rank 2, on host b, differs in these."""
    changed = dataclasses.replace(FACTS, **changes)
    return {0: watch(host_id()), 1: watch("y"), 2: watch("y", changed)}


def test_a_world_as_it_should_be() -> None:
    assert find_mismatch(HOSTS, world(), Flavor.OPEN_MPI) is None
    assert find_mismatch(HOSTS, world(python="3.11.9"), Flavor.OPEN_MPI) is None, "a patch release"
    assert find_mismatch(HOSTS, world(weights="", prefix="/elsewhere"), Flavor.OPEN_MPI) is None, "not known"
    assert find_mismatch(HOSTS, {1: watch("y")}, Flavor.OPEN_MPI) is None, "rank 0 has not reported"
    assert find_mismatch(HOSTS, {0: watch("x", None), 1: watch("y")}, Flavor.OPEN_MPI) is None
    assert (
        find_mismatch((), {0: watch("x"), 1: watch("x", world(torch="1")[2].facts)}, Flavor.OPEN_MPI) is None
    )


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("python", "3.12.1", "in Python: 3.12 instead of 3.11; start the same Python there"),
        ("torch", "2.12.0", "pip install torch==2.13.0+cpu` there"),
        (
            "mpi",
            "MPICH Version: 5.0.2",
            "in the MPI library: MPICH Version: 5.0.2 instead of Open MPI v5.0.11",
        ),
        ("mpi4py", "4.0.0", "`/opt/venv/bin/pip install mpi4py==4.1.2` there"),
        ("phalanx", "0.1.0 def", "in Phalanx: 0.1.0 def instead of 0.1.0 abc"),
        ("weights", "0012", "in the weights: 0012 instead of 0011; copy /models/m there again"),
        ("config", "2234", "in the config.json of the model"),
    ],
)
def test_what_differs_is_said_with_host_and_remedy(name: str, value: str, told: str) -> None:
    fault = find_mismatch(HOSTS, world(**{name: value}), Flavor.OPEN_MPI)
    assert fault is not None and (fault.kind, fault.rank, fault.host) == (MISMATCH, 2, "name-y")
    assert fault.exit_code == EXIT_CONFIG
    assert fault.detail.startswith("b (name-y) differs from a (") and told in fault.detail


@pytest.mark.parametrize(("flavor", "enough_mib"), [(Flavor.OPEN_MPI, 17), (Flavor.MPICH, 4)])
def test_shared_memory(flavor: Flavor, enough_mib: int) -> None:
    def ranks(free_mib: int) -> dict[int, RankWatch]:
        return {0: watch("x", free_mib=0), 1: watch("y", free_mib=free_mib), 2: watch("y", free_mib=free_mib)}

    assert find_mismatch(HOSTS, ranks(enough_mib), flavor) is None, "the one rank of x shares nothing"
    fault = find_mismatch(HOSTS, ranks(enough_mib - 1), flavor)
    assert fault is not None and fault.detail.startswith(
        f"/dev/shm of b (name-y) has {enough_mib - 1} MiB free"
    )
    assert fault.kind == SHORTAGE, "a deployment that has served waits"


def test_clocks() -> None:
    ranks = {0: watch(host_id(), ahead_s=-90.0), 1: watch("y", ahead_s=61.4), 2: watch("y", ahead_s=61.2)}
    assert clock_warnings(HOSTS, ranks) == [
        "the clock of b (name-y) is 61 s ahead of the clock here; times in logs do not agree, set up NTP"
    ]
    assert clock_warnings(HOSTS, {0: watch(host_id()), 1: watch("y", ahead_s=-1.5)}) == []
    assert "behind" in clock_warnings(HOSTS, {0: watch(host_id()), 1: watch("y", ahead_s=-5.0)})[0]


def test_a_host_that_does_not_fit_is_left_out_where_the_rest_suffices() -> None:
    pool = HostPool((*HOSTS, Host("c", 2)), EventLog())
    assert not pool.refuse("a", 1, "rank 0 lives there")
    assert not pool.refuse("b", 4, "too few are left")
    assert pool.refuse("b", 3, "other weights")
    assert [host.name for host in pool.choose(3, 0.0)] == ["a", "c"]
    assert not pool.refuse("c", 3, "too few are left")
