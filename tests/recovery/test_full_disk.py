"""A rank dies while the disk of the run folder takes nothing more. A hot spare takes over; without a spare no world
can be started, nothing is given up, and the next one starts when there is room again."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recovery.served import Served
from tests.recovery.small_world.deployed import Start
from tests.tiny_models import make_tiny_llama
from tests.unit.disks import fill, small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "run", "4m,nr_inodes=400") as folder:
        yield folder


def fill_wholly(disk: Path) -> None:
    """No block is left, and no file can be made."""
    fill(disk)
    (disk / "fillers").mkdir()
    with contextlib.suppress(OSError):
        for number in itertools.count():
            (disk / "fillers" / str(number)).touch()


def make_room(disk: Path) -> None:
    shutil.rmtree(disk / "fillers")
    (disk / "filler").unlink()


def test_worlds_start_again_when_there_is_room(disk: Path, start: Start) -> None:
    deployment = start(spare="none")
    deployment.wait_ready()
    world = deployment.wait_active()
    fill_wholly(disk)
    os.kill(world["ranks"][1]["pid"], signal.SIGKILL)
    give_up_at = time.monotonic() + 30
    while deployment.errors.read_text().count("world cannot be started") < 3:
        assert deployment.process.poll() is None and time.monotonic() < give_up_at, (
            deployment.errors.read_text()
        )
        time.sleep(0.05)
    make_room(disk)
    while "no world can be started" not in (deployment.table().get("notice") or ""):  # as /cluster shows it
        assert time.monotonic() < give_up_at, deployment.table()
        time.sleep(0.01)
    assert deployment.wait_active(above=world["epoch"])["epoch"] > world["epoch"]
    assert deployment.table()["notice"] is None
    assert deployment.stop() == 0


def test_what_cannot_be_started_the_first_time_is_said_at_once(disk: Path, start: Start) -> None:
    fill_wholly(disk)
    deployment = start(spare="none", must_start=False)
    assert deployment.process.wait(20) != 0
    assert "No space left on device" in deployment.errors.read_text()


def test_a_spare_takes_over_while_its_log_cannot_be_written(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "tiny", max_model_len=2048)
    flags = ("--tp", "2", "--spare", "hot", "--kv-cache-memory", "16MiB")
    with (
        small_disk(tmp_path / "run", "16m,nr_inodes=1000") as disk,
        Served(str(model), disk, *flags) as served,
    ):
        spare = served.parked_spare()
        fill_wholly(disk)
        os.kill(served.active_world()["ranks"][1]["pid"], signal.SIGKILL)
        assert served.active_world(above=spare["epoch"] - 1, timeout_s=20)["epoch"] == spare["epoch"]
        make_room(disk)
