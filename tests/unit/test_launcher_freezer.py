"""Real processes in real frozen cgroups, where this machine lets us make one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from launcher.freezer import CgroupFreezer
from tests.cgroups import Frozen, frozen_cgroup


@pytest.fixture(params=[1, 2])
def cgroup(request: pytest.FixtureRequest) -> Iterator[Frozen]:
    with frozen_cgroup(request.param) as made:
        yield made


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
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with frozen_cgroup(1) as cgroup, subprocess.Popen(sleep) as other:
        cgroup.add(other.pid)
        cgroup.set(True)
        assert cgroup.wait(True)
        CgroupFreezer(cgroup.process.pid).thaw({cgroup.process.pid})
        assert cgroup.wait(True)
        cgroup.set(False)
        other.kill()


def test_what_is_gone_is_not_frozen() -> None:
    assert not CgroupFreezer(2**22 + 1).is_frozen()
