"""A supervisor that is late, as on a crowded machine, and the leases of the guards on other hosts: what was late and
did no harm makes them longer, and the next world waits for the longest of them."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from launcher.leases import LEASE_S
from tests.cluster.deployments import deployments
from tests.cluster.namespaces import cluster, why_not
from tests.cluster.test_hosts import RANK, check_end, epochs_alive, remote
from tests.recovery.run_processes import is_left
from tests.recovery.small_world.deployed import Deployment, wait_gone

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def stand_still(deployment: Deployment, for_s: float) -> None:
    deployment.process.send_signal(signal.SIGSTOP)
    time.sleep(for_s)
    deployment.process.send_signal(signal.SIGCONT)


def test_lease_grows_with_delays_and_fences_all_the_same(tmp_path: Path) -> None:
    with cluster(2, tmp_path) as hosts, deployments(tmp_path, hosts) as begin:
        deployment = begin("11")
        deployment.wait_ready()
        world = deployment.wait_active()
        behind = remote(hosts, 2, deployment, RANK)
        faults = deployment.table()["faults"]  # a start may have failed on a machine that has much to do
        stand_still(deployment, 0.5 * LEASE_S)
        time.sleep(0.5)  # for some beats and their answers
        stand_still(deployment, 1.3 * LEASE_S)
        time.sleep(2 * LEASE_S)
        assert deployment.table()["faults"] == faults, "a delay that was to be expected"
        assert deployment.wait_active()["epoch"] == world["epoch"]
        hosts.cut(2)
        served_since = None
        give_up_at = time.monotonic() + 20.0
        while any(is_left(process) for process in behind) and time.monotonic() < give_up_at:
            active = [w["epoch"] for w in deployment.table()["worlds"] if w["state"] == "active"]
            served_since = served_since or next((epoch for epoch in active if epoch != world["epoch"]), None)
            time.sleep(0.01)
        assert wait_gone(behind, 0.0) == [], "no lease lasts for ever"
        assert served_since is None, "two worlds at once"
        hosts.heal(2)
        after = deployment.wait_active(above=world["epoch"], timeout_s=60.0)
        assert epochs_alive(deployment) == {str(after["epoch"])}
        check_end(hosts, deployment)


def test_a_supervisor_that_is_stopped_as_by_ctrl_z(tmp_path: Path) -> None:
    """Here ranks would wait for it; those of other hosts end with their leases. It goes on with the next world."""
    with cluster(2, tmp_path) as hosts, deployments(tmp_path, hosts) as begin:
        deployment = begin("11")
        deployment.wait_ready()
        world = deployment.wait_active()
        behind = remote(hosts, 2, deployment, RANK)
        deployment.process.send_signal(signal.SIGSTOP)
        assert wait_gone(behind, 20.0) == []
        deployment.process.send_signal(signal.SIGCONT)
        after = deployment.wait_active(above=world["epoch"], timeout_s=60.0)
        assert epochs_alive(deployment) == {str(after["epoch"])}
        check_end(hosts, deployment)
