"""Ranks under MPICH that are killed in MPI_Init, at the moment at which their segment of shared memory is there: it
is gone when the next world serves."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from launcher.segments import SHARED_MEMORY, mapped_by
from tests.recovery.small_world.deployed import Deployment
from tests.recovery.test_other_mpis import environment_with

pytestmark = pytest.mark.slow

RANK = "tests.recovery.small_world.rank"
ROUNDS = 4


def segments() -> set[str]:
    return {path.name for kind in ("mpich_*", "ucx_*") for path in SHARED_MEMORY.glob(kind)}


def wait_for_ranks(supervisor: int) -> list[int]:
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        found = []
        for process in psutil.Process(supervisor).children(recursive=True):
            try:
                words = process.cmdline()
            except psutil.Error:  # it has just ended
                continue
            if RANK in words and "--" not in words:
                found.append(process.pid)
        if len(found) == 2:
            return found
    raise AssertionError("no ranks")


def kill_at_first_segment(ranks: list[int], before: set[str]) -> bool:
    """False if they were through MPI_Init already."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        if any(name.startswith("mpich_") for name in segments() - before):
            for rank in ranks:
                os.kill(rank, 9)
            return True
        time.sleep(0.0002)
    return False


def test_segments_of_ranks_killed_in_mpi_init(tmp_path: Path) -> None:
    python = environment_with("mpich")
    variables = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    for number in range(ROUNDS):
        before = segments()
        deployment = Deployment(tmp_path / f"run{number}", python=str(python), variables=variables)
        try:
            assert kill_at_first_segment(wait_for_ranks(deployment.process.pid), before)
            epoch = deployment.wait_ready()
            assert epoch > 1
            alive = {segment.name for process in deployment.processes() for segment in mapped_by(process.pid)}
            assert segments() - before <= alive, "what is there belongs to the world that serves"
        finally:
            deployment.stop()
        assert segments() - before == set()
