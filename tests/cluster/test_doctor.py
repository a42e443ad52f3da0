"""`phalanx doctor --hosts` over the hosts of namespaces: what it measures, and what it says of what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.namespaces import Cluster, cluster, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(3, tmp_path_factory.mktemp("agent")) as three:
        yield three


def doctor(hosts: Cluster, *flags: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Its exit code, and its findings by part."""
    command = [*hosts.prefix, sys.executable, "-m", "launcher.cli", "doctor", "--json", *flags]
    answer = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **hosts.variables}
    )
    report = json.loads(answer.stdout)
    assert report["ready"] is (answer.returncode == 0), report
    return answer.returncode, {finding["part"]: finding for finding in report["findings"]}


def test_hosts_that_are_well(hosts: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "hosts.txt"
    file.write_text("".join(f"{name} slots=2\n" for name in hosts.names))
    code, found = doctor(hosts, "--hosts", str(file), "--interface", "10.77.0.0/16")
    assert code == 0, found
    assert [found[f"host {name}"]["level"] for name in hosts.names[1:]] == ["ok", "ok"]
    assert "3 ranks on" in found["mpi world"]["text"] and "host2, host3" in found["mpi world"]["text"]
    ring, reduce = found["ring"]["figures"], found["all-reduce"]["figures"]
    assert 0 < ring["ring_hop_s"] < 1 and ring["ring_bytes_per_s"] > 1e5
    assert 0 < reduce["all_reduce_s"] < 1 and reduce["all_reduce_bytes_per_s"] > 1e5
    assert "can be reached from every host" in found["guards' port"]["text"]


def test_a_host_that_does_not_answer_is_named(hosts: Cluster) -> None:
    hosts.cut(3)
    try:
        code, found = doctor(hosts, "--hosts", ",".join(hosts.names))
    finally:
        hosts.heal(3)
    assert code == 1 and "mpi world" not in found, found
    assert found[f"host {hosts.names[1]}"]["level"] == "ok"
    silent = found[f"host {hosts.names[2]}"]
    assert silent["level"] == "missing" and "true` work without a question" in silent["remedy"]


def test_one_machine_by_two_names_is_found_out(hosts: Cluster) -> None:
    """As where a variable of MPI's puts all ranks on one host."""
    code, found = doctor(hosts, "--hosts", f"{hosts.names[0]},{hosts.names[1]},{hosts.names[1]}:2")
    assert code == 0 and "2 ranks on" in found["mpi world"]["text"], (
        "named twice it is one host with more slots"
    )
    code, found = doctor(hosts, "--hosts", f"{hosts.names[0]},127.0.0.1")
    assert code == 1, found
