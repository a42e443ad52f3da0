"""A guard that is silent since it gets no processor is not lost; one that is silent for another reason is."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from launcher.guard_messages import GuardHello
from launcher.processes import host_id
from launcher.run_dir import RunDir
from launcher.starvation import StarvationOf
from launcher.world_records import RankWatch, WorldPlan, WorldState
from launcher.worlds import BEATS_STARVED_AFTER_S, World

BEGAN = 1000.0


class Folder:
    def world_dir(self, _epoch: int) -> Any:
        return Path("/nowhere")


@pytest.fixture
def sleeper() -> Iterator[psutil.Popen]:
    process = psutil.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def silent_world(guard: psutil.Popen) -> World:
    """A world whose only guard is this process, which has not been heard of since BEGAN."""
    world = World(1, cast(WorldPlan, None), cast(RunDir, Folder()), cast(Any, None))
    world.state = WorldState.ACTIVE
    world.ranks[0] = RankWatch(hello_of(guard), b"", BEGAN)
    return world


def hello_of(guard: psutil.Popen) -> GuardHello:
    start = int(Path(f"/proc/{guard.pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    return GuardHello(1, 0, "here", host_id(), guard.pid, start, guard.pid, start)


def lost_after_s(world: World) -> float:
    at = BEGAN
    while at < BEGAN + 100:
        at += 0.05
        if (fault := world._find_fault(at)) is not None:
            assert fault.kind == "lost"
            return at - BEGAN
    raise AssertionError("never")


def test_a_guard_that_sleeps_is_lost(sleeper: psutil.Popen) -> None:
    world = silent_world(sleeper)
    took_s = lost_after_s(world)
    # On a busy machine it may really have waited for a processor, before it slept.
    assert took_s == pytest.approx(BEATS_STARVED_AFTER_S + world.ranks[0].starved_s, abs=0.2)


def test_a_guard_that_waits_for_a_processor_is_not(
    sleeper: psutil.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StarvationOf, "new_wait_s", lambda *_: 0.025)  # half of the time between two looks
    took_s = lost_after_s(silent_world(sleeper))
    assert took_s == pytest.approx(2 * BEATS_STARVED_AFTER_S, abs=1.5)


@pytest.mark.slow
def test_a_supervisor_whose_thread_waits_for_a_processor_hears_no_guard(sleeper: psutil.Popen) -> None:
    """ZeroMQ reads in a thread of its own, which may wait while the supervisor's own does not."""
    core = max(os.sched_getaffinity(0))
    rival = subprocess.Popen(
        [sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"]
    )

    def starve() -> None:
        os.sched_setaffinity(0, {core})
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)  # a second of a processor; others run meanwhile

    reader = threading.Thread(target=starve)
    reader.start()
    watch = RankWatch(hello_of(sleeper), b"guard", time.monotonic())
    try:
        while (silent_s := time.monotonic() - watch.last_beat_at) < 3.0:
            blocked_s = watch.blocked_s(time.monotonic())
            time.sleep(0.05)
    finally:
        rival.kill()
        rival.wait()
        reader.join()
    assert watch.starved_s > 1.0 and blocked_s < silent_s - 1.0


def test_a_beat_begins_anew(sleeper: psutil.Popen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StarvationOf, "new_wait_s", lambda *_: 1.0)
    watch = silent_world(sleeper).ranks[0]
    assert watch.blocked_s(BEGAN + 3.0) == 2.0
    watch.hear(BEGAN + 4.0)
    assert watch.blocked_s(BEGAN + 5.0) == 0.0 and watch.starved_s == 1.0
