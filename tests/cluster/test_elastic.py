"""Hosts that die and come back: with spare hosts, with --elastic, and with neither. Real mpirun, guards and
supervisor around small ranks, on the hosts of namespaces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.deployments import Begin, deployments
from tests.cluster.namespaces import Cluster, cluster, why_not
from tests.cluster.test_hosts import check_end, epochs_alive, names
from tests.recovery.small_world.deployed import Deployment

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(3, tmp_path) as three:
        yield three


@pytest.fixture
def begin(tmp_path: Path, hosts: Cluster) -> Iterator[Begin]:
    with deployments(tmp_path, hosts) as start:
        yield start


def wait_until(
    deployment: Deployment, is_so: Callable[[dict[str, Any]], Any], timeout_s: float = 60.0
) -> Any:
    """What the table says once it is so."""
    deadline = time.monotonic() + timeout_s
    while not (found := is_so(table := deployment.table())):
        assert time.monotonic() < deadline, f"{table}\n{deployment.errors.read_text()}"
        time.sleep(0.02)
    return found


def shape(world: dict[str, Any]) -> tuple[int, int]:
    return world["tp"], world["pp"]


def states(table: dict[str, Any]) -> list[str]:
    return [host["state"] for host in table["hosts"]]


@pytest.mark.parametrize(
    ("tp", "pp", "smaller"), [(1, 3, (1, 2)), (3, 1, (2, 1))], ids=["pipeline", "tensor"]
)
@pytest.mark.parametrize("at_once", [True, False], ids=["silently", "with-last-words"])
def test_elastic_world_shrinks_and_grows(
    hosts: Cluster, begin: Begin, tp: int, pp: int, smaller: tuple[int, int], at_once: bool
) -> None:
    deployment = begin("111", tp=tp, pp=pp, elastic=True)
    deployment.wait_ready()
    world = deployment.wait_active()
    assert deployment.table()["notice"] is None and states(deployment.table()) == ["in use"] * 3
    began = time.monotonic()
    hosts.kill(3, at_once)
    less = deployment.wait_active(above=world["epoch"], timeout_s=60.0)
    print(f"served again with fewer ranks after {time.monotonic() - began:.2f} s")
    assert shape(less) == smaller and names(less) == ["host2"]
    assert epochs_alive(deployment) == {str(less["epoch"])}
    table = wait_until(deployment, lambda table: "instead of" in (table["notice"] or "") and table)
    assert states(table) == ["in use", "in use", "lost"] and table["hosts"][2]["since"] > 0
    assert (table["tp"], table["pp"]) == (tp, pp) and hosts.names[2] in table["notice"], table
    faults = len(table["faults"])
    hosts.revive(3)
    began = time.monotonic()
    whole = wait_until(
        deployment,
        lambda table: [w for w in table["worlds"] if w["state"] == "active" and shape(w) == (tp, pp)],
    )[0]
    print(f"full size again {time.monotonic() - began:.2f} s after the host was back")
    assert names(whole) == ["host2", "host3"]
    wait_until(deployment, lambda table: len(table["worlds"]) == 1 and table["notice"] is None)
    assert len(deployment.table()["faults"]) == faults, "to grow is no fault"
    assert epochs_alive(deployment) == {str(whole["epoch"])}
    check_end(hosts, deployment)


def test_spare_host_takes_over_and_the_dead_one_is_not_tried(hosts: Cluster, begin: Begin) -> None:
    deployment = begin("111", tp=2)
    deployment.wait_ready()
    world = deployment.wait_active()
    assert states(deployment.table()) == ["in use", "in use", "spare"]
    hosts.kill(2)
    after = deployment.wait_active(above=world["epoch"], timeout_s=60.0)
    assert names(after) == ["host3"] and deployment.table()["notice"] is None
    for process in hosts.processes(3):
        process.kill()
    again = deployment.wait_active(above=after["epoch"], timeout_s=60.0)
    assert names(again) == ["host3"] and states(deployment.table()) == ["in use", "lost", "in use"]
    hosts.revive(2)
    wait_until(deployment, lambda table: states(table) == ["in use", "spare", "in use"])
    hosts.kill(3)
    last = deployment.wait_active(above=again["epoch"], timeout_s=60.0)
    assert names(last) == ["host2"]
    check_end(hosts, deployment)


def test_without_either_the_host_is_waited_for(hosts: Cluster, begin: Begin) -> None:
    deployment = begin("11", tp=2)
    deployment.wait_ready()
    world = deployment.wait_active()
    hosts.kill(2)
    notice = wait_until(deployment, lambda table: "waited for" in (table["notice"] or "") and table["notice"])
    assert hosts.names[1] in notice and "--elastic" in notice and "room for 1 of 2 ranks" in notice
    assert not [w for w in deployment.table()["worlds"] if w["state"] == "active"]
    hosts.revive(2)
    after = deployment.wait_active(above=world["epoch"], timeout_s=60.0)
    assert names(after) == ["host2"] and shape(after) == (2, 1)
    wait_until(deployment, lambda table: table["notice"] is None)
    check_end(hosts, deployment)


def test_smaller_world_is_taken_over_and_grows_then(hosts: Cluster, begin: Begin) -> None:
    """The next supervisor knows how small the world is, finds out who is lost, and grows it."""
    first = begin("111", tp=3, elastic=True)
    first.wait_ready()
    world = first.wait_active()
    hosts.kill(3)
    less = first.wait_active(above=world["epoch"], timeout_s=60.0)
    first.kill_supervisor()
    second = begin("111", tp=3, elastic=True)
    assert second.wait_ready() == less["epoch"]
    wait_until(second, lambda table: "lost" in states(table) and "instead of" in (table["notice"] or ""))
    hosts.revive(3)
    whole = wait_until(
        second, lambda table: [w for w in table["worlds"] if w["state"] == "active" and w["tp"] == 3]
    )[0]
    assert names(whole) == ["host2", "host3"] and second.table()["faults"] == []
    check_end(hosts, second)


def test_first_start_with_a_dead_host(hosts: Cluster, begin: Begin) -> None:
    """With --elastic it serves with those that are there; without, it says in one line who is not."""
    hosts.kill(3)
    plain = begin("111", tp=3, wait_for_hosts_s=3.0)
    assert plain.process.wait(120) == 1
    error = plain.errors.read_text().splitlines()
    assert any(line.startswith("phalanx: error:") for line in error), error
    assert any(hosts.names[2] in line for line in error), error
    elastic = begin("111", tp=3, elastic=True, wait_for_hosts_s=3.0)
    elastic.wait_ready()
    assert shape(elastic.wait_active(timeout_s=60.0)) == (2, 1)
    check_end(hosts, elastic)
