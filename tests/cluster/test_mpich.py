"""The same under MPICH, in an environment of its own: ranks and hosts that are killed, cut off and back, spare hosts,
and elastic worlds over three hosts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import test_elastic, test_hosts
from tests.cluster.deployments import Begin, deployments
from tests.cluster.namespaces import Cluster, cluster, why_not
from tests.recovery.test_other_mpis import environment_with

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


NETWORK = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "FI_TCP_IFACE": "up0"}
"""UCX looks for networks in /sys, which the namespaces share with their machine."""


@pytest.fixture(scope="module")
def python() -> Path:
    """Of the environment with MPICH; skipped where its wheel cannot be had."""
    return environment_with("mpich")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(3, tmp_path) as three:
        yield three


@pytest.fixture
def begin(tmp_path: Path, hosts: Cluster, python: Path) -> Iterator[Begin]:
    variables = {**hosts.variables, **NETWORK, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    with deployments(tmp_path, hosts, variables=variables, python=str(python)) as start:
        yield start


def test_remote_rank_that_is_killed(hosts: Cluster, begin: Begin) -> None:
    test_hosts.test_remote_rank_that_is_killed(hosts, begin)


def test_host_that_is_cut_off_and_the_one_that_is_left(hosts: Cluster, begin: Begin) -> None:
    test_hosts.test_silent_cut_and_the_host_that_is_left(hosts, begin)


def test_one_way_cut_and_heal(hosts: Cluster, begin: Begin) -> None:
    test_hosts.test_one_way_cut_and_heal(hosts, begin, {"towards": True, "back": False})


def test_host_that_is_killed_is_waited_for(hosts: Cluster, begin: Begin) -> None:
    test_elastic.test_without_either_the_host_is_waited_for(hosts, begin)


@pytest.mark.parametrize(("tp", "pp", "fewer"), [(1, 3, (1, 2)), (3, 1, (2, 1))], ids=["pipeline", "tensor"])
def test_elastic_world_shrinks_and_grows(
    hosts: Cluster, begin: Begin, tp: int, pp: int, fewer: tuple[int, int]
) -> None:
    test_elastic.test_elastic_world_shrinks_and_grows(hosts, begin, tp, pp, fewer, True)
