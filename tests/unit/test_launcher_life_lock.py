"""The lock that tells of a process's end in the first moment of it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launcher.life_lock import LifeLock
from launcher.processes import ending_code

HOLDER = """
import mmap, os, sys, time
from pathlib import Path
from launcher.life_lock import LifeLock
lock = LifeLock.hold(Path(sys.argv[1]))
assert lock is not None
memory = mmap.mmap(-1, 200 << 20)
for place in range(0, len(memory), 4096):
    memory[place] = 1
print("held", flush=True)
if sys.argv[2] == "exit":
    os._exit(7)
time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path: Path) -> LifeLock:
    made = LifeLock.create(tmp_path / "lock")
    assert made is not None
    return made


def start(tmp_path: Path, what: str = "wait") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock"), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_death_is_known_before_it_is_complete(tmp_path: Path, lock: LifeLock, number: int) -> None:
    process = start(tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    assert lock.is_held
    descriptor = os.pidfd_open(process.pid)
    seen: list[tuple[int | None, bool]] = []
    known = threading.Event()

    def on_end() -> None:
        is_over = bool(select.select([descriptor], [], [], 0)[0])
        seen.append((ending_code(process.pid), is_over))
        known.set()

    lock.watch(on_end)
    time.sleep(0.2)
    assert not known.is_set()
    os.kill(process.pid, number)
    assert known.wait(10)
    # Its 200 MB take milliseconds at the least to be given back.
    assert seen == [(-number, False)]
    assert process.wait(10) == -number
    os.close(descriptor)


def test_an_exit_code_is_known_too(tmp_path: Path, lock: LifeLock) -> None:
    process = start(tmp_path, "exit")
    known = threading.Event()
    codes: list[int | None] = []
    give_up_at = time.monotonic() + 10
    while not lock.is_held and time.monotonic() < give_up_at:
        time.sleep(0.001)

    def on_end() -> None:
        codes.append(ending_code(process.pid))
        known.set()

    lock.watch(on_end)
    assert known.wait(10)
    assert codes == [7] and process.wait(10) == 7


def test_a_process_that_lives_has_no_ending_code() -> None:
    assert ending_code(os.getpid()) is None
    assert ending_code(2**22 + 1) is None


def test_nothing_to_hold(tmp_path: Path, lock: LifeLock) -> None:
    assert LifeLock.hold(tmp_path / "none") is None
    held = LifeLock.hold(tmp_path / "lock")
    assert held is not None and lock.is_held
    # A second one in the same process gets nothing, and does not wait for itself.
    assert LifeLock.hold(tmp_path / "lock") is None
