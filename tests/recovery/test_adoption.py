"""A supervisor that is killed: what it started serves on, and the next one takes it over. Around small ranks (see
small_world), and at the end around the real servers."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from typing import Any

import psutil
import pytest

from tests.recovery.small_world.deployed import TP, Deployment, Start, of_run, wait_gone


def pids(world: dict[str, Any]) -> list[int]:
    return [rank[key] for rank in world["ranks"] for key in ("pid", "guard_pid")]


def front_of(deployment: Deployment) -> int:
    pid: int = json.loads((deployment.run_dir / "processes.json").read_text())["front"]["pid"]
    return pid


def forget_table(deployment: Deployment) -> None:
    """What the front was told before says nothing about what it is told next."""
    (deployment.run_dir / "table.json").unlink(missing_ok=True)


def check_end(deployment: Deployment) -> None:
    """An adopting supervisor, too, leaves nothing behind."""
    assert deployment.stop() == 0
    assert wait_gone(of_run(deployment.run_id)) == []
    assert deployment.shm_folders() == []
    left = {path.name for path in deployment.run_dir.iterdir() if path.is_socket() or path.suffix == ".json"}
    assert left - {"table.json", "listen.sock"} == set()


def test_world_spare_and_front_are_taken_over(start: Start) -> None:
    first = start(spare="warm")
    first.wait_ready()
    world, spare, front = first.wait_active(), first.wait_spare(), front_of(first)
    for _ in range(2):  # the one that took over can be killed, too
        first.kill_supervisor()
        forget_table(first)
        time.sleep(1.0)
        assert sorted(pids(world) + pids(spare)) == sorted(
            process.pid for process in of_run(first.run_id) if process.pid in pids(world) + pids(spare)
        )
        second = start(spare="warm")
        assert second.wait_ready() == world["epoch"]
        assert second.run_id == first.run_id
        assert pids(second.wait_active()) == pids(world)
        assert pids(second.wait_spare()) == pids(spare)
        assert front_of(second) == front
        assert second.table()["faults"] == []
        first = second
    os.kill(world["ranks"][1]["pid"], signal.SIGKILL)
    promoted = second.wait_active(above=world["epoch"])
    assert pids(promoted) == pids(spare)
    assert second.table()["faults"][0]["kind"] == "killed"
    assert front_of(second) == front
    second.wait_spare(above=promoted["epoch"])
    check_end(second)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_adopted_world_recovers_without_a_spare(start: Start, number: int) -> None:
    first = start()
    first.wait_ready()
    world = first.wait_active()
    first.kill_supervisor()
    second = start()
    second.wait_ready()
    os.kill(world["ranks"][0]["pid"], number)
    next_world = second.wait_active(above=world["epoch"])
    assert wait_gone([psutil.Process(pid) for pid in pids(world) if psutil.pid_exists(pid)]) == []
    assert next_world["epoch"] == world["epoch"] + 1
    check_end(second)


@pytest.mark.parametrize("spare", ["none", "hot"])
def test_nobody_takes_over(start: Start, spare: str) -> None:
    deployment = start(spare=spare, wait_s=2.0)
    deployment.wait_ready()
    world = deployment.wait_active()
    if spare != "none":
        deployment.wait_spare()
    deployment.kill_supervisor()
    time.sleep(1.0)
    assert all(psutil.pid_exists(pid) for pid in pids(world))
    assert wait_gone(of_run(deployment.run_id), 10.0) == []
    assert deployment.shm_folders() == []
    sessions = [path for path in deployment.run_dir.glob("worlds/*/tmp/**/*") if path.is_socket()]
    assert sessions == []


def test_rank_that_dies_meanwhile(start: Start) -> None:
    first = start()
    first.wait_ready()
    world, front = first.wait_active(), front_of(first)
    first.kill_supervisor()
    forget_table(first)
    os.kill(world["ranks"][1]["pid"], signal.SIGKILL)
    second = start()
    assert second.wait_ready() == world["epoch"] + 1
    [fault] = second.table()["faults"]
    assert (fault["kind"], fault["rank"]) == ("killed", 1), fault
    assert front_of(second) == front
    check_end(second)


def test_everything_but_the_front_dies_meanwhile(start: Start) -> None:
    first = start()
    first.wait_ready()
    world, front = first.wait_active(), front_of(first)
    mpirun = psutil.Process(world["ranks"][0]["guard_pid"]).ppid()
    first.kill_supervisor()
    forget_table(first)
    dead = [psutil.Process(pid) for pid in [mpirun, *pids(world)]]
    os.kill(mpirun, signal.SIGKILL)
    assert wait_gone(dead) == []
    second = start()
    assert second.wait_ready() == world["epoch"] + 1
    assert front_of(second) == front
    check_end(second)


def test_front_dies_meanwhile(start: Start) -> None:
    first = start()
    first.wait_ready()
    world, front = first.wait_active(), psutil.Process(front_of(first))
    first.kill_supervisor()
    forget_table(first)
    front.kill()
    assert wait_gone([front]) == []
    second = start()
    assert second.wait_ready() == world["epoch"]
    assert pids(second.wait_active()) == pids(world)
    assert front_of(second) != front.pid
    check_end(second)


def test_spare_that_is_not_parked_is_built_anew(start: Start) -> None:
    first = start("spares slow", spare="warm")
    first.wait_ready()
    world = first.wait_active()
    spare = first.wait_spare(state="importing")
    first.kill_supervisor()
    forget_table(first)
    second = start(spare="warm")
    assert second.wait_ready() == world["epoch"]
    again = second.wait_spare()
    assert again["epoch"] == spare["epoch"] + 1
    assert wait_gone([psutil.Process(pid) for pid in pids(spare) if psutil.pid_exists(pid)]) == []
    check_end(second)


def test_other_settings_are_refused_and_harm_nothing(start: Start) -> None:
    first = start()
    first.wait_ready()
    world = first.wait_active()
    first.kill_supervisor()
    other = start(must_start=False, tp=3)
    assert other.process.wait(10) == 2
    [line] = other.errors.read_text().splitlines()
    assert "--tp 2 (now 3)" in line and "phalanx stop --run-dir" in line
    forget_table(first)
    second = start()
    assert second.wait_ready() == world["epoch"]
    assert pids(second.wait_active()) == pids(world)
    check_end(second)


def test_living_supervisor_is_not_replaced(start: Start) -> None:
    first = start()
    first.wait_ready()
    first.process.send_signal(signal.SIGSTOP)
    assert start(must_start=False).process.wait(10) == 1
    first.process.send_signal(signal.SIGCONT)
    assert first.wait_active()["epoch"] == 1
    check_end(first)


def test_killed_while_it_starts(start: Start) -> None:
    first = start("slow start")
    deadline = time.monotonic() + 10
    while not first.table()["worlds"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started = first.processes()
    first.kill_supervisor()
    forget_table(first)
    second = start()
    assert second.wait_ready() == 2
    assert [process for process in wait_gone(started, 1.0) if process.pid != front_of(second)] == []
    check_end(second)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_moment(start: Start, seed: int) -> None:
    """Ten supervisors in a row, each killed at a random moment of a start, a recovery or the building of a spare.
    In the end one world serves, and nothing else is there."""
    moments = random.Random(seed)
    spare = moments.choice(["none", "warm", "hot"])
    deployment = start(spare=spare)
    deployment.wait_ready()
    epoch = 0
    for _ in range(10):
        world = next((w for w in deployment.table()["worlds"] if w["state"] == "active"), None)
        if world is not None and moments.random() < 0.7:
            victim = moments.choice(pids(world))
            if psutil.pid_exists(victim):
                os.kill(victim, moments.choice([signal.SIGKILL, signal.SIGSTOP]))
        time.sleep(moments.choice([0.0, 0.05, 0.2, 0.5, 1.0, 3.0]))
        deployment.kill_supervisor()
        disk = int((deployment.run_dir / "epoch").read_text())
        assert disk >= epoch
        epoch = disk
        deployment = start(spare=spare)
    deployment.wait_ready()
    world = deployment.wait_active()
    expected = 1 + 1 + 2 * TP
    if spare != "none":
        deployment.wait_spare()
        expected += 1 + 2 * TP
    living = [p for p in of_run(deployment.run_id) if p.status() != psutil.STATUS_ZOMBIE]
    assert len(living) == expected, [(p.pid, p.cmdline()) for p in living]
    check_end(deployment)
