"""Worlds over several hosts that die, are cut off and come back: real mpirun, guards and supervisor around small
ranks (see small_world), on the hosts of namespaces."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.leases import LEASE_S
from tests.cluster.deployments import Begin, deployments
from tests.cluster.namespaces import Cluster, cluster, why_not
from tests.recovery.run_processes import left_of, of_run
from tests.recovery.small_world.deployed import Deployment, wait_gone

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

FENCED_AFTER_S = 1.5
"""A silent cut is found out and the rank behind it dead after so long, on a machine at rest; tests allow for more."""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(3, tmp_path) as three:
        yield three


@pytest.fixture
def begin(tmp_path: Path, hosts: Cluster) -> Iterator[Begin]:
    with deployments(tmp_path, hosts) as start:
        yield start


def names(world: dict[str, Any]) -> list[str]:
    return [rank["host"] for rank in world["ranks"]][1:]


def remote(hosts: Cluster, host: int, deployment: Deployment, what: str) -> list[psutil.Process]:
    """Processes of this deployment on another host whose command line has this in it."""
    found = []
    for process in hosts.processes(host):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if any(what in part for part in process.cmdline()):
                found.append(process)
    return found


RANK, GUARD, DAEMON = "small_world.rank", "launcher.guard", "prted"


def epochs_alive(deployment: Deployment) -> set[str]:
    """Of the ranks that live, on any host."""
    epochs = set()
    for process in of_run(deployment.run_id):
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if RANK in line and GUARD not in line and "mpirun" not in line:
                words = process.cmdline()
                epochs.add(words[words.index("--epoch") + 1])
    return epochs


def check_end(hosts: Cluster, deployment: Deployment) -> None:
    assert deployment.stop() == 0
    assert wait_gone(of_run(deployment.run_id), 10.0) == []
    assert deployment.shm_folders() == []
    for host in range(2, len(hosts.names) + 1):
        assert remote(hosts, host, deployment, GUARD) == []


def test_remote_rank_that_is_killed(hosts: Cluster, begin: Begin) -> None:
    deployment = begin("11")
    deployment.wait_ready()
    world = deployment.wait_active()
    assert names(world) == ["host2"]
    keys = json.loads((deployment.run_dir / "deployment.json").read_text())["keys"].values()
    lines = [" ".join(process.cmdline()) for process in hosts.processes(2) + of_run(deployment.run_id)]
    assert any(GUARD in line for line in lines)
    assert not [line for line in lines if any(key in line for key in keys)], "a key on a command line"
    for process in remote(hosts, 2, deployment, RANK):
        if GUARD not in " ".join(process.cmdline()):
            process.kill()
    after = deployment.wait_active(above=world["epoch"])
    fault = deployment.table()["faults"][0]
    assert (fault["kind"], fault["rank"], fault["host"]) == ("killed", 1, "host2"), fault
    assert names(after) == ["host2"] and epochs_alive(deployment) == {str(after["epoch"])}
    check_end(hosts, deployment)


def test_silent_cut_and_the_host_that_is_left(hosts: Cluster, begin: Begin) -> None:
    """The rank behind the cut is dead before the next world starts, and the third host takes its place."""
    deployment = begin("111")
    deployment.wait_ready()
    world = deployment.wait_active()
    behind = remote(hosts, 2, deployment, RANK)
    began = time.monotonic()
    hosts.cut(2)
    assert wait_gone(behind, 10.0) == []
    fenced_s = time.monotonic() - began
    after = deployment.wait_active(above=world["epoch"])
    served_s = time.monotonic() - began
    print(f"fenced after {fenced_s:.2f} s, served again after {served_s:.2f} s")
    assert names(after) == ["host3"]
    fault = next(fault for fault in deployment.table()["faults"] if fault["kind"] == "lost")
    assert (fault["kind"], fault["rank"], fault["host"]) == ("lost", 1, "host2"), fault
    assert 0.9 < fault["detect_s"] < 3 * FENCED_AFTER_S and LEASE_S / 2 < fenced_s < 4 * FENCED_AFTER_S
    assert epochs_alive(deployment) == {str(after["epoch"])}
    hosts.heal(2)
    time.sleep(2.0)
    assert deployment.wait_active()["epoch"] == after["epoch"]
    assert epochs_alive(deployment) == {str(after["epoch"])}
    check_end(hosts, deployment)


def test_a_lease_binds_the_rank_of_a_guard_that_is_stopped(hosts: Cluster, begin: Begin) -> None:
    """The fence does not wait for guards that it cannot reach, so a rank must not need its own one to die in time."""
    deployment = begin("111")
    deployment.wait_ready()
    world = deployment.wait_active()
    guards = [p for p in remote(hosts, 2, deployment, GUARD) if "mpirun" not in " ".join(p.cmdline())]
    ranks = [p for p in remote(hosts, 2, deployment, RANK) if GUARD not in " ".join(p.cmdline())]
    assert guards and ranks
    stopped = guards + remote(hosts, 2, deployment, DAEMON)  # the daemon would let guards go on, to end them
    for process in stopped:
        process.suspend()
    hosts.cut(2)
    began = time.monotonic()
    while any(rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):  # its guard cannot reap it
        assert time.monotonic() - began < 10.0
        time.sleep(0.05)
    assert [guard.status() for guard in guards] == [psutil.STATUS_STOPPED] * len(guards)
    after = deployment.wait_active(above=world["epoch"])
    assert names(after) == ["host3"] and epochs_alive(deployment) == {str(after["epoch"])}
    for process in stopped:
        process.resume()
    assert wait_gone(guards, 10.0) == []
    hosts.heal(2)
    check_end(hosts, deployment)


def test_a_closed_connection_prolongs_no_lease_behind_a_cut(hosts: Cluster, begin: Begin) -> None:
    """Something between may close it, as a firewall that is loaded anew. That is no sign of the supervisor's end."""
    deployment = begin("111")
    deployment.wait_ready()
    world = deployment.wait_active()
    ranks = [p for p in remote(hosts, 2, deployment, RANK) if GUARD not in " ".join(p.cmdline())]
    guards = [p for p in remote(hosts, 2, deployment, GUARD) if "mpirun" not in " ".join(p.cmdline())]
    inside = ["nsenter", "--net", "--target", str(hosts.pid_of(2)), "--", "ss"]
    sockets = subprocess.run(
        [*inside, "-tnpH"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    (peer,) = {line.split()[4] for line in sockets for guard in guards if f"pid={guard.pid}," in line}
    hosts.cut(2)
    address, port = peer.rsplit(":", 1)
    subprocess.run([*inside, "-K", "dst", address, "dport", "=", f":{port}"], check=True, capture_output=True)
    after = deployment.wait_active(above=world["epoch"])
    assert not [rank for rank in left_of(ranks) if rank.status() != psutil.STATUS_ZOMBIE]
    assert names(after) == ["host3"] and epochs_alive(deployment) == {str(after["epoch"])}
    hosts.heal(2)
    check_end(hosts, deployment)


@pytest.mark.parametrize(
    "cut", [{"towards": True, "back": False}, {"towards": False, "back": True}], ids=["towards", "back"]
)
def test_one_way_cut_and_heal(hosts: Cluster, begin: Begin, cut: dict[str, bool]) -> None:
    """With no other host the next world comes when the network is back, and nothing of the old one does."""
    deployment = begin("11")
    deployment.wait_ready()
    world = deployment.wait_active()
    behind = remote(hosts, 2, deployment, RANK)
    hosts.cut(2, **cut)
    assert wait_gone(behind, 10.0) == []
    time.sleep(8.0)  # for some starts that fail
    assert deployment.process.poll() is None, deployment.errors.read_text()
    hosts.heal(2)
    after = deployment.wait_active(above=world["epoch"], timeout_s=60.0)
    assert names(after) == ["host2"] and epochs_alive(deployment) == {str(after["epoch"])}
    faults = deployment.table()["faults"]
    # Where cores are crowded, mpirun may end rank 0, after its other rank, before the silence is long enough.
    assert [fault["host"] for fault in faults if fault["kind"] == "lost"] == ["host2"] or [
        (fault["kind"], fault["rank"]) for fault in faults
    ] == [("killed", 0)], faults
    check_end(hosts, deployment)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_daemon_of_mpi(hosts: Cluster, begin: Begin, number: int) -> None:
    """A killed daemon takes its ranks with it; a stopped one harms nothing until the world has to end."""
    deployment = begin("11")
    deployment.wait_ready()
    world = deployment.wait_active()
    faults = deployment.table()["faults"]  # a start may have failed on a machine that has much to do
    for daemon in remote(hosts, 2, deployment, DAEMON):
        os.kill(daemon.pid, number)
    if number == signal.SIGSTOP:
        time.sleep(3.0)
        assert deployment.wait_active()["epoch"] == world["epoch"]
        assert deployment.table()["faults"] == faults
        os.kill(deployment.table()["worlds"][0]["ranks"][0]["pid"], signal.SIGKILL)
    after = deployment.wait_active(above=world["epoch"], timeout_s=60.0)
    assert names(after) == ["host2"] and epochs_alive(deployment) == {str(after["epoch"])}
    check_end(hosts, deployment)


def test_supervisor_that_is_killed(hosts: Cluster, begin: Begin) -> None:
    """Its closed connections tell the guards of other hosts to wait; the next one takes them over."""
    first = begin("11")
    first.wait_ready()
    world = first.wait_active()
    first.kill_supervisor()
    time.sleep(3 * LEASE_S)
    assert epochs_alive(first) == {str(world["epoch"])}
    second = begin("11")
    assert second.wait_ready() == world["epoch"]
    behind = remote(hosts, 2, second, RANK)
    hosts.cut(2)
    assert wait_gone(behind, 10.0) == []
    hosts.heal(2)
    after = second.wait_active(above=world["epoch"], timeout_s=60.0)
    assert names(after) == ["host2"]
    check_end(hosts, second)
