"""Real cgroups with a freezer, for tests, where this machine lets us make one; else a test says why it is skipped."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from launcher.freezer import CgroupFreezer, _mounts


class Frozen:
    """A cgroup of one version with a sleeping process in it."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.folder = _mounts()[version] / f"phalanx-test-{uuid.uuid4().hex[:8]}"
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
        for pid in (self.folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # it ends by itself, in the cgroup that all others are in
                (self.folder.parent / "cgroup.procs").write_text(pid)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.01)


@contextmanager
def frozen_cgroup(version: int) -> Iterator[Frozen]:
    """Skips the test where there is none."""
    if version not in _mounts():
        pytest.skip(f"no freezer of cgroup version {version} is mounted here")
    try:
        made = Frozen(version)
    except OSError as error:
        pytest.skip(f"cannot make a cgroup here: {error}")
    try:
        yield made
    finally:
        made.close()
