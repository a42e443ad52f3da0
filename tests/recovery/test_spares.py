"""Spares that take over, spares that die, and worlds that die at every stage of a promotion, around small ranks
(see small_world)."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

import psutil
import pytest

from launcher.spares import BACK_OFF_S
from tests.recovery.run_processes import left_of
from tests.recovery.small_world.deployed import TP, Deployment, Start, wait_gone

KINDS = ["warm", "hot"]
IDLE_CPU_SHARE = 0.02
"""Of a core, that a parked rank may use at most."""


def pids(world: dict[str, Any]) -> list[int]:
    return [rank["pid"] for rank in world["ranks"]]


def processes_of(world: dict[str, Any]) -> list[psutil.Process]:
    mpirun = psutil.Process(world["ranks"][0]["guard_pid"]).ppid()
    return [
        psutil.Process(p) for p in [mpirun, *pids(world), *(rank["guard_pid"] for rank in world["ranks"])]
    ]


def check_end(deployment: Deployment) -> None:
    """Nothing of it outlives its end."""
    everything = deployment.processes()
    assert deployment.stop() == 0
    assert left_of(everything) == []
    assert deployment.shm_folders() == []


@pytest.mark.parametrize("kind", KINDS)
def test_spare_takes_over(start: Start, kind: str) -> None:
    deployment = start(spare=kind)
    deployment.wait_ready()
    for number, fault_kind in [
        (signal.SIGKILL, "killed"),
        (signal.SIGSTOP, "frozen"),
        (signal.SIGKILL, "killed"),
    ]:
        world = deployment.wait_active()
        spare = deployment.wait_spare(above=world["epoch"])
        assert (spare["epoch"], spare["spare"], spare["gateway"]) == (world["epoch"] + 1, kind, None)
        assert all(rank["memory_bytes"] > 1e6 for rank in spare["ranks"])
        assert [other["state"] for other in deployment.table()["worlds"]] == ["active", "spare"]
        dead = processes_of(world)
        os.kill(world["ranks"][1]["pid"], number)
        promoted = deployment.wait_active(above=world["epoch"])
        assert not wait_gone(dead)
        assert (promoted["epoch"], pids(promoted)) == (spare["epoch"], pids(spare))
        assert promoted["spare"] is None
        fault = deployment.table()["faults"][0]
        assert (fault["kind"], fault["epoch"]) == (fault_kind, world["epoch"])
    spare = deployment.wait_spare(above=promoted["epoch"])
    assert len(deployment.processes()) == 1 + 2 * (1 + 2 * TP)
    folders = {f"phalanx-{deployment.run_id}-{world['epoch']}" for world in (promoted, spare)}
    assert set(deployment.shm_folders()) == folders
    check_end(deployment)


@pytest.mark.parametrize("kind", KINDS)
def test_parked_ranks_use_no_processor_time(start: Start, kind: str) -> None:
    deployment = start(spare=kind)
    deployment.wait_ready()
    ranks = [psutil.Process(pid) for pid in pids(deployment.wait_spare())]

    def used_s() -> float:
        return sum(sum(rank.cpu_times()[:2]) for rank in ranks)

    before_s = used_s()
    time.sleep(3)
    assert used_s() - before_s < 3 * TP * IDLE_CPU_SHARE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("pid", signal.SIGKILL),
        ("pid", signal.SIGSTOP),
        ("guard_pid", signal.SIGKILL),
        ("guard_pid", signal.SIGSTOP),
        ("mpirun", signal.SIGKILL),
    ],
)
def test_spare_that_dies_is_replaced(start: Start, kind: str, what: str, number: signal.Signals) -> None:
    deployment = start(spare=kind)
    deployment.wait_ready()
    world = deployment.wait_active()
    spare = deployment.wait_spare()
    dead = processes_of(spare)
    os.kill(dead[0].pid if what == "mpirun" else spare["ranks"][0][what], number)
    assert not wait_gone(dead)
    deployment.wait_spare(above=spare["epoch"])
    assert pids(deployment.wait_active()) == pids(world)
    [fault] = deployment.table()["faults"]
    assert fault["detail"].startswith("spare: ") and fault["recover_s"] == 0.0
    assert fault["epoch"] == spare["epoch"]
    check_end(deployment)


def test_spares_that_never_come_up_do_not_disturb(start: Start) -> None:
    deployment = start("spares crash", spare="warm")
    deployment.wait_ready()
    world = deployment.wait_active()
    began = time.monotonic()
    while len(deployment.table()["faults"]) < 3:
        assert time.monotonic() - began < 20
        time.sleep(0.05)
    assert time.monotonic() - began > BACK_OFF_S * (1 + 2)
    assert pids(deployment.wait_active()) == pids(world)
    # Without a spare the next world is a cold one.
    os.kill(world["ranks"][0]["pid"], signal.SIGKILL)
    deployment.wait_active(above=world["epoch"])
    check_end(deployment)


def test_spare_that_is_not_ready_yet_goes_on_to_serve(start: Start) -> None:
    deployment = start("spares slow", spare="warm")
    deployment.wait_ready()
    world = deployment.wait_active()
    spare = deployment.wait_spare(state="importing")
    os.kill(world["ranks"][0]["pid"], signal.SIGKILL)
    promoted = deployment.wait_active(above=world["epoch"])
    assert (promoted["epoch"], pids(promoted)) == (spare["epoch"], pids(spare))
    check_end(deployment)


@pytest.mark.parametrize("wait_s", [0.0, 0.1, 0.5])
def test_kill_during_promotion(start: Start, wait_s: float) -> None:
    deployment = start("join slow", spare="warm")
    deployment.wait_ready()
    world = deployment.wait_active()
    spare = deployment.wait_spare()
    os.kill(world["ranks"][0]["pid"], signal.SIGKILL)
    time.sleep(wait_s)
    os.kill(spare["ranks"][1]["pid"], signal.SIGKILL)
    last = deployment.wait_active(above=spare["epoch"])
    deployment.wait_spare(above=last["epoch"])
    assert deployment.shm_folders()
    assert len(deployment.processes()) == 1 + 2 * (1 + 2 * TP)
    check_end(deployment)


def test_both_worlds_die_at_once(start: Start) -> None:
    deployment = start(spare="hot")
    deployment.wait_ready()
    spare = deployment.wait_spare()
    for world in (deployment.wait_active(), spare):
        for pid in pids(world):
            with contextlib.suppress(ProcessLookupError):  # the supervisor was faster
                os.kill(pid, signal.SIGKILL)
    last = deployment.wait_active(above=spare["epoch"])
    deployment.wait_spare(above=last["epoch"])
    check_end(deployment)


def test_a_spare_that_cannot_be_started_ends_nothing(start: Start) -> None:
    deployment = start(spare="warm")
    world = deployment.wait_active(above=deployment.wait_ready() - 1)
    spare = deployment.wait_spare(above=world["epoch"])
    # Where the folder of the next world has to be made: as with a full disk, it cannot be.
    (deployment.run_dir / "worlds" / str(spare["epoch"] + 1)).write_text("in the way")
    os.kill(world["ranks"][1]["pid"], signal.SIGKILL)
    promoted = deployment.wait_active(above=world["epoch"])
    assert promoted["epoch"] == spare["epoch"]
    assert deployment.wait_spare(above=promoted["epoch"])["epoch"] == spare["epoch"] + 2
    assert deployment.wait_active()["epoch"] == promoted["epoch"]
    assert "spare not started" in deployment.errors.read_text()
    check_end(deployment)
