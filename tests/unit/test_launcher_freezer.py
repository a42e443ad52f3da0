"""Real processes in real frozen cgroups, where this machine lets us make one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.freezer import CgroupFreezer, _mounts


class Frozen:
    """A cgroup of one version with a sleeping process in it."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.folder = _mounts()[version] / f"phalanx-test-{os.getpid()}"
        self.folder.mkdir()
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        self.add(self.process.pid)

    def add(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

    def set(self, frozen: bool) -> None:
        if self.version == 2:
            (self.folder / "cgroup.freeze").write_text("1" if frozen else "0")
        else:
            (self.folder / "freezer.state").write_text("FROZEN" if frozen else "THAWED")

    def wait(self, frozen: bool) -> bool:
        deadline = time.monotonic() + 5
        freezer = CgroupFreezer(self.process.pid)
        while freezer.is_frozen() != frozen and time.monotonic() < deadline:
            time.sleep(0.01)
        return freezer.is_frozen() == frozen

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.set(False)
        self.process.kill()
        self.process.wait()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.01)


@pytest.fixture(params=[1, 2])
def cgroup(request: pytest.FixtureRequest) -> Iterator[Frozen]:
    if request.param not in _mounts():
        pytest.skip(f"no freezer of cgroup version {request.param} is mounted here")
    try:
        made = Frozen(request.param)
    except OSError as error:
        pytest.skip(f"cannot make a cgroup here: {error}")
    yield made
    made.close()


def test_frozen_is_seen(cgroup: Frozen) -> None:
    assert cgroup.wait(False)
    cgroup.set(True)
    assert cgroup.wait(True)
    cgroup.set(False)
    assert cgroup.wait(False)


def test_killed_one_dies(cgroup: Frozen) -> None:
    cgroup.set(True)
    assert cgroup.wait(True)
    cgroup.process.kill()
    CgroupFreezer(cgroup.process.pid).thaw({cgroup.process.pid})
    assert cgroup.process.wait(5) == -9


def test_cgroup_with_others_in_it_is_left_alone() -> None:
    if 1 not in _mounts():
        pytest.skip("no freezer of cgroup version 1 is mounted here")
    try:
        cgroup = Frozen(1)
    except OSError as error:
        pytest.skip(f"cannot make a cgroup here: {error}")
    with (
        contextlib.closing(cgroup),
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other,
    ):
        cgroup.add(other.pid)
        cgroup.set(True)
        assert cgroup.wait(True)
        CgroupFreezer(cgroup.process.pid).thaw({cgroup.process.pid})
        assert cgroup.wait(True)
        cgroup.set(False)
        other.kill()


def test_what_is_gone_is_not_frozen(tmp_path: Path) -> None:
    assert not CgroupFreezer(2**22 + 1).is_frozen()
