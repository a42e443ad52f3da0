"""A world that is not what was asked for: `phalanx serve` over the hosts of namespaces, one of which really differs.
It says which and what to do, and ends with an error, unless another host can take its place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.namespaces import ROOT, Cluster, cluster, why_not
from tests.tiny_models import make_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(3, tmp_path) as three:
        yield three


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "model" / "tiny", max_model_len=256)


def on_second_host(hosts: Cluster, *command: str) -> None:
    """In its mounts, which nobody else sees."""
    pid = str(hosts.pid_of(2))
    subprocess.run(["nsenter", "--mount", "--target", pid, "--", *command], check=True)


def start(hosts: Cluster, model: Path, folder: Path, names: list[str], *flags: str) -> subprocess.Popen[str]:
    """With errors in `stderr` of the folder. Each host has a model cache of its own."""
    cache = folder / "cache"
    cache.mkdir()
    on_second_host(hosts, "mount", "-t", "tmpfs", "tmpfs", str(cache))
    command = [*hosts.prefix, sys.executable, "-m", "launcher.cli", "serve", str(model), "--tp", "2", *flags]
    if names:
        command += ["--hosts", ",".join(f"{name}:1" for name in names)]
    command += ["--run-dir", str(folder / "run")]
    command += ["--port", "0", "--grpc-port", "0", "--zmq", "tcp://127.0.0.1:*", "--spare", "none"]
    command += ["--dtype", "float32", "--kv-cache-memory", "16MiB"]
    variables = {"PYTHONPATH": str(ROOT), "PHALANX_CACHE": str(cache), **hosts.variables}
    with (folder / "stderr").open("w") as errors:
        return subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=errors, text=True
        )


def change_weights(hosts: Cluster, model: Path) -> None:
    """Of the copy of the second host: one byte of them, at the very end."""
    other = model.parent / "other"
    shutil.copytree(model, other)
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    on_second_host(hosts, "mount", "--bind", str(other), str(model))


def end_of(process: subprocess.Popen[str], folder: Path) -> tuple[int, str]:
    """Exit code and the last line on standard error."""
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "", "it serves"
        code = process.wait(10)
    finally:
        process.terminate()
        process.wait(30)
    return code, (folder / "stderr").read_text().splitlines()[-1]


def test_other_weights(hosts: Cluster, model: Path, tmp_path: Path) -> None:
    change_weights(hosts, model)
    code, line = end_of(start(hosts, model, tmp_path, hosts.names[:2]), tmp_path)
    assert code == 1
    assert (
        line.startswith("phalanx: error: 10.77.2.2 (host2) differs from 10.77.1.2 (")
        and " in the weights: " in line
        and str(model) in line
    ), line


def test_another_host_takes_the_place(hosts: Cluster, model: Path, tmp_path: Path) -> None:
    change_weights(hosts, model)
    process = start(hosts, model, tmp_path, hosts.names)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("ready  http://"), (tmp_path / "stderr").read_text()
        errors = (tmp_path / "stderr").read_text()
        assert "host does not fit the others, and is left out host=10.77.2.2" in errors, errors
        table = [line.split() for line in errors.splitlines() if line.startswith("   ")]
        assert ["1", "1", "0", "host2"] in [row[:4] for row in table], "as the first world had it"
        assert (tmp_path / "run" / "worlds" / "2" / "hosts").read_text().split() == [
            "10.77.1.2",
            "slots=1",
            "10.77.3.2",
            "slots=1",
        ]
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_other_code(hosts: Cluster, model: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.py"
    source = ROOT / "engine" / "facts.py"
    changed.write_text(source.read_text() + "\n# an older commit\n")
    on_second_host(hosts, "mount", "--bind", str(changed), str(source))
    code, line = end_of(start(hosts, model, tmp_path, hosts.names[:2]), tmp_path)
    assert code == 1
    assert (
        line.startswith("phalanx: error: 10.77.2.2 (host2) differs from 10.77.1.2 (")
        and " in Phalanx: " in line
    )


def test_too_little_shared_memory(hosts: Cluster, model: Path, tmp_path: Path) -> None:
    """Two ranks on the second host: one alone shares nothing."""
    on_second_host(hosts, "mount", "-o", "remount,size=4m", "/dev/shm")
    hosts_flag = f"{hosts.names[0]}:1,{hosts.names[1]}:2"
    process = start(hosts, model, tmp_path, [], "--pp", "1", "--tp", "3", "--hosts", hosts_flag)
    code, line = end_of(process, tmp_path)
    assert code == 1
    assert "/dev/shm of 10.77.2.2 (host2) has 4 MiB free, and MPI wants 17 MiB for 2 ranks" in line, line
    assert "--shm-size" in line


def test_all_ranks_on_one_host(hosts: Cluster, model: Path, tmp_path: Path) -> None:
    """An mpirun that is not told of the hosts, as by a variable that Open MPI 5 ignores, starts everything here."""
    wrapper = tmp_path / "mpirun"
    real = Path(sys.executable).parent / "mpirun"
    wrapper.write_text(
        f"""#!/bin/sh
[ "$3" = --hostfile ] || exec {real} "$@"
count=$2
shift 4
exec {real} -n "$count" --oversubscribe "$@"
"""
    )
    wrapper.chmod(0o755)
    code, line = end_of(start(hosts, model, tmp_path, hosts.names[:2], "--mpirun", str(wrapper)), tmp_path)
    assert code == 1
    assert "the ranks are not where --hosts puts them: rank 0 on " in line and "instead of" in line, line
