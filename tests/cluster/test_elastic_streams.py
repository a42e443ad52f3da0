"""Streams of a served model go on while its world loses a host, serves with fewer ranks, and grows again."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.namespaces import Cluster, cluster, why_not
from tests.recovery.served import Served, Stream, Streams
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

NUM_TOKENS = 1500
PROMPTS = ["Once", "upon", "a time"]


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with cluster(3, tmp_path) as three, three.entered():
        for name, value in three.variables.items():
            monkeypatch.setenv(name, value)
        yield three


def wait_for_shape(served: Served, tp: int, pp: int, timeout_s: float = 60.0) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while True:
        cluster = served.cluster()
        for world in cluster["worlds"]:
            is_served = world["state"] == "active" and world["epoch"] == cluster["serving_epoch"]
            if is_served and (world["tp"], world["pp"]) == (tp, pp):
                return cluster
        assert time.monotonic() < deadline, f"{cluster}\n{served.errors()}"
        time.sleep(0.05)


def check_whole(streams: list[Stream]) -> list[str]:
    for stream in streams:
        assert (stream.error, stream.done, stream.finish_reason) == (None, True, "length")
        assert stream.usage is not None and stream.usage["completion_tokens"] == NUM_TOKENS
    return [stream.text for stream in streams]


@pytest.mark.parametrize(
    ("tp", "pp", "fewer"),
    [
        pytest.param(1, 3, (1, 2), id="pipeline"),
        # Two minutes; test_elastic has the shape with small ranks.
        pytest.param(3, 1, (2, 1), id="tensor", marks=pytest.mark.long),
    ],
)
def test_streams_go_on_with_fewer_ranks_and_with_all_again(
    hosts: Cluster, tmp_path: Path, tp: int, pp: int, fewer: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_streams(hosts, tmp_path, tp, pp, fewer, monkeypatch, sys.executable)


def check_streams(
    hosts: Cluster,
    tmp_path: Path,
    tp: int,
    pp: int,
    fewer: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    python: str,
) -> None:
    """`python`: beside the mpirun that starts the worlds."""
    make_tiny_llama(tmp_path / "model", max_model_len=2048)
    monkeypatch.setenv(
        "PHALANX_FAULTS", "sleep=0.01"
    )  # so that the streams are still there when hosts are back
    names = ",".join(f"{name}:1" for name in hosts.names)
    flags = ("--tp", str(tp), "--pp", str(pp), "--hosts", names, "--elastic", "--spare", "none")
    flags += ("--kv-cache-memory", "16MiB")
    with Served(str(tmp_path / "model"), tmp_path / "run", *flags, python=python) as served:
        cluster = wait_for_shape(served, tp, pp)
        assert cluster["asked"] == {"tp": tp, "pp": pp}
        assert [host["state"] for host in cluster["hosts"]] == ["in use"] * 3
        streams = Streams(served, PROMPTS, NUM_TOKENS)
        streams.wait_begun(3)
        hosts.kill(3)
        cluster = wait_for_shape(served, *fewer)
        assert [host["state"] for host in cluster["hosts"]] == ["in use", "in use", "lost"]
        assert f"instead of tp {tp}, pp {pp}" in cluster["notice"]
        command = [sys.executable, "-m", "launcher.cli", "status", "--url", served.url]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0 and f"asked for: tp {tp}, pp {pp}" in shown.stdout, shown
        assert f"{hosts.names[2]} (lost since " in shown.stdout, shown.stdout
        begun = [len(stream.pieces) for stream in streams.all]
        deadline = time.monotonic() + 60.0
        while any(len(stream.pieces) <= before for stream, before in zip(streams.all, begun, strict=True)):
            assert time.monotonic() < deadline, "no token in the smaller world"
            time.sleep(0.01)
        hosts.revive(3)
        cluster = wait_for_shape(served, tp, pp)
        assert not all(stream.done for stream in streams.all), "it grew under them"
        check_whole(streams.finish())
        cluster = wait_for_shape(served, tp, pp)
        # Ranks of other hosts may be lost once more on a machine that has much to do.
        assert cluster["notice"] is None and cluster["faults"][-1]["kind"] == "lost", cluster
        log = (tmp_path / "run" / "supervisor.log").read_text()
        assert "a larger world starts" in log and "world ends as planned" in log, log
        assert httpx.get(f"{served.url}/health/ready", timeout=10).status_code == 200
        assert served.stop() == 0
