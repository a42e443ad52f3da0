"""The supervisor against every fault that real processes can have, around small ranks (see small_world)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.recovery.run_processes import left_of
from tests.recovery.small_world.deployed import TP, Start, wait_gone

FAULTS = [
    ("pid", 0, signal.SIGKILL, {"killed"}),
    ("pid", 1, signal.SIGKILL, {"killed"}),
    ("pid", 0, signal.SIGSTOP, {"frozen"}),
    ("pid", 1, signal.SIGSTOP, {"frozen"}),
    ("pid", 1, signal.SIGSEGV, {"killed"}),
    ("guard_pid", 0, signal.SIGKILL, {"mpirun", "lost", "killed"}),
    ("guard_pid", 1, signal.SIGSTOP, {"lost"}),
    ("guard_pid", 1, signal.SIGTERM, {"killed"}),
    ("mpirun", 0, signal.SIGKILL, {"mpirun"}),
    ("mpirun", 0, signal.SIGTERM, {"mpirun", "killed"}),
]


def test_every_fault_is_recovered_and_nothing_is_left(start: Start) -> None:
    deployment = start()
    epoch = deployment.wait_ready()
    for what, rank, number, kinds in FAULTS:
        world = deployment.wait_active(above=epoch - 1)
        ranks = world["ranks"]
        guard = psutil.Process(ranks[0]["guard_pid"])
        mpirun = guard.parent()
        assert mpirun is not None
        dead = [psutil.Process(entry[key]) for entry in ranks for key in ("pid", "guard_pid")] + [mpirun]
        target = mpirun.pid if what == "mpirun" else ranks[rank][what]
        began = time.time()
        os.kill(target, number)
        assert not wait_gone(dead), (what, number)
        epoch += 1
        deployment.wait_active(above=epoch - 1)
        fault = deployment.table()["faults"][0]
        assert fault["kind"] in kinds, fault
        assert fault["epoch"] == epoch - 1
        assert fault["at"] - began < 2.0
        assert fault["recover_s"] < 10.0
        if what == "pid":
            assert fault["rank"] == rank and f"rank {rank}" in fault["detail"]
        assert deployment.shm_folders() == [f"phalanx-{deployment.run_id}-{epoch}"]
    everything = deployment.processes()
    assert len(everything) == 2 + 2 * TP
    assert deployment.stop() == 0
    assert left_of(everything) == []
    assert deployment.shm_folders() == []


def test_stopped_for_200_ms_is_no_fault(start: Start) -> None:
    deployment = start()
    deployment.wait_ready()
    world = deployment.wait_active()
    for entry in world["ranks"]:
        for key in ("pid", "guard_pid"):
            os.kill(entry[key], signal.SIGSTOP)
            time.sleep(0.2)
            os.kill(entry[key], signal.SIGCONT)
            time.sleep(0.1)
    time.sleep(0.5)
    assert deployment.table()["faults"] == []


def test_supervisor_that_was_stopped_itself_blames_nobody(start: Start) -> None:
    deployment = start()
    deployment.wait_ready()
    deployment.wait_active()
    deployment.process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    deployment.process.send_signal(signal.SIGCONT)
    time.sleep(1.5)
    assert deployment.table()["faults"] == []


def test_gives_up_after_three_failed_starts(start: Start) -> None:
    deployment = start("crash")
    assert deployment.process.wait(30) == 1
    errors = deployment.errors.read_text()
    assert "3 worlds in a row did not start" in errors
    assert "RuntimeError: the rank's own words" in errors
    assert (deployment.run_dir / "epoch").read_text() == "4\n"


def test_goes_on_after_one_failed_start(start: Start) -> None:
    deployment = start("crash first")
    assert deployment.wait_ready() == 2
    assert deployment.stop() == 0


def test_configuration_that_no_relaunch_can_help(start: Start) -> None:
    deployment = start("config")
    assert deployment.process.wait(30) == 1
    assert deployment.errors.read_text().splitlines()[-1] == (
        "phalanx: error: --kv-cache-memory 1 is too small"
    )
    assert "failed to start" not in deployment.errors.read_text()


def test_front_that_cannot_start(start: Start) -> None:
    deployment = start("front config")
    assert deployment.process.wait(30) == 1
    assert deployment.errors.read_text().splitlines()[-1] == "phalanx: error: --zmq tcp://x: is taken"


def test_front_that_crashes_again_and_again(start: Start) -> None:
    deployment = start("front crash")
    assert deployment.process.wait(30) == 1
    assert "the front ended 3 times in a row" in deployment.errors.read_text()


def test_front_is_restarted_and_the_world_stays(start: Start) -> None:
    deployment = start()
    deployment.wait_ready()
    world = deployment.wait_active()
    front = next(p for p in deployment.processes() if "tests.recovery.small_world.front" in p.cmdline())
    front.kill()
    assert not wait_gone([front])
    (deployment.run_dir / "table.json").unlink()
    again = deployment.wait_active()
    assert again["epoch"] == world["epoch"]
    assert [entry["pid"] for entry in again["ranks"]] == [entry["pid"] for entry in world["ranks"]]


def test_rank_that_hangs_in_a_step(start: Start) -> None:
    deployment = start("hang")
    assert deployment.wait_ready() == 1
    deployment.wait_active(above=1)
    [fault] = deployment.table()["faults"]
    assert (fault["kind"], fault["rank"]) == ("hung", 1), fault
    assert "in step 50" in fault["detail"] and 3.0 < fault["detect_s"] < 6.0, fault


def test_rank_that_is_slow_is_no_fault(start: Start) -> None:
    deployment = start("slow")
    deployment.wait_ready()
    deadline = time.monotonic() + 40
    while deployment.wait_active()["ranks"][1]["step"] < 7:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert deployment.table()["faults"] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stop_in_mid_start(start: Start, number: int) -> None:
    deployment = start("slow start")
    time.sleep(0.5)
    everything = deployment.processes()
    assert len(everything) >= 2
    began = time.monotonic()
    assert deployment.stop(number) == 0
    assert time.monotonic() - began < 5
    assert left_of(everything) == []


@pytest.mark.parametrize("what", ["stop", "guard"])
def test_rank_whose_guard_never_reported(start: Start, tmp_path: Path, what: str) -> None:
    """Its imports take long, as from a network drive, and it has asked for nothing yet."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nline = open('/proc/self/cmdline').read()\n"
        "if 'small_world.rank' in line and 'launcher.guard' not in line:\n    time.sleep(60)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    deployment = start(variables={"PYTHONPATH": path})
    give_up_at = time.monotonic() + 20
    guard = rank = None
    while rank is None:
        assert time.monotonic() < give_up_at
        for process in deployment.processes():
            with contextlib.suppress(psutil.Error):
                parent = process.parent()
                if parent is not None and parent.cmdline()[2:4] == ["-m", "launcher.guard"]:
                    parent.suspend()
                    guard, rank = parent, process
    assert guard is not None
    if what == "stop":
        assert deployment.stop() == 0
    else:
        guard.kill()
        while deployment.table()["epoch"] < 2:
            assert time.monotonic() < give_up_at
            time.sleep(0.01)
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE  # whose parent never named it


def test_supervisor_that_was_late_is_not_late_for_ever(start: Start, tmp_path: Path) -> None:
    """What it could not hear meanwhile is excused once: a guard that stops then is lost soon after."""
    held_s = 6.0
    (tmp_path / "sitecustomize.py").write_text(
        "import signal, time\n"
        "if 'small_world.deployment' in open('/proc/self/cmdline').read():\n"
        f"    signal.signal(signal.SIGUSR1, lambda *_: time.sleep({held_s}))\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    deployment = start(variables={"PYTHONPATH": path})
    deployment.wait_ready()
    world = deployment.wait_active()
    began = time.monotonic()
    deployment.process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    os.kill(world["ranks"][1]["guard_pid"], signal.SIGSTOP)
    deployment.wait_active(above=world["epoch"])
    fault = deployment.table()["faults"][0]
    assert (fault["kind"], fault["rank"]) == ("lost", 1), fault
    assert time.monotonic() - began < held_s + 5.0


def test_second_signal_cuts_the_grace_short(start: Start) -> None:
    deployment = start("front ignores SIGTERM")
    deployment.wait_ready()
    everything = deployment.processes()
    began = time.monotonic()
    deployment.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert deployment.process.poll() is None
    assert deployment.stop(signal.SIGINT) == 0
    assert time.monotonic() - began < 3
    assert left_of(everything) == []


def test_two_supervisors_never_share_a_run_folder(start: Start) -> None:
    deployment = start()
    deployment.wait_ready()
    second = subprocess.run(
        [sys.executable, "-m", "tests.recovery.small_world.deployment", str(deployment.run_dir), "2"],
        capture_output=True,
        text=True,
    )
    assert second.returncode != 0 and f"pid {deployment.process.pid}" in second.stderr
    assert deployment.wait_active()
