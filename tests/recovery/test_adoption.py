"""A supervisor that is killed: what it started serves on, and the next one takes it over. Around small ranks (see
small_world), and at the end around the real servers."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.recovery.run_processes import of_run
from tests.recovery.served import Served, Streams, still_there
from tests.recovery.small_world.deployed import TP, Deployment, Start, wait_gone
from tests.tiny_models import make_tiny_llama


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_living_supervisor_is_not_replaced(start: Start) -> None:
    first = start()
    first.wait_ready()
    first.process.send_signal(signal.SIGSTOP)
    assert start(must_start=False).process.wait(10) == 1
    first.process.send_signal(signal.SIGCONT)
    assert first.wait_active()["epoch"] == 1
    check_end(first)


@pytest.mark.slow
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
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))])
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


# --------------------------------------------------------------------------- the real servers

PROMPTS = ["Once", "upon", "a time", "there was"]
NUM_TOKENS = 1200
TINY = ("--tp", "2", "--kv-cache-memory", "64MiB", "--dtype", "float32")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_model_len=2048))


def phalanx(*arguments: str) -> str:
    command = [sys.executable, "-m", "launcher.cli", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert answer.stderr == "", answer.stderr
    return answer.stdout


def texts(streams: Streams) -> list[str]:
    """What complete streams brought."""
    for stream in streams.finish():
        assert (stream.error, stream.done, stream.finish_reason) == (None, True, "length"), stream
        assert stream.usage is not None and stream.usage["completion_tokens"] == NUM_TOKENS
    return [stream.text for stream in streams.all]


def port_is_free(url: str) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) != 0


def test_streams_do_not_notice_the_supervisor(tiny_model: str, tmp_path: Path) -> None:
    """It is killed in mid-stream; the next one takes over and recovers from faults as ever."""
    with Served(tiny_model, tmp_path, *TINY) as first:
        world = first.active_world()
        spare = first.parked_spare(above=world["epoch"])
        streams = Streams(first, PROMPTS, NUM_TOKENS)
        streams.wait_begun(20)
        first.kill_supervisor()
        expected = texts(streams)
        assert texts(Streams(first, PROMPTS, NUM_TOKENS)) == expected, "new requests are answered, too"
        told = phalanx("status", "--url", first.url)
        assert told.startswith("the supervisor ended ") and "active" in told

        with Served(tiny_model, tmp_path, *TINY) as second:
            assert second.ready_line == first.ready_line
            assert second.active_world()["ranks"][1]["pid"] == world["ranks"][1]["pid"]
            assert "the supervisor ended" not in phalanx("status", "--url", second.url)
            second.parked_spare()
            streams = Streams(second, PROMPTS, NUM_TOKENS)
            streams.wait_begun(20)
            os.kill(world["ranks"][1]["pid"], signal.SIGKILL)
            assert texts(streams) == expected
            assert second.active_world(above=world["epoch"])["epoch"] == spare["epoch"]

            streams = Streams(second, PROMPTS, NUM_TOKENS)
            streams.wait_begun(20)
            os.kill(second.active_world()["ranks"][0]["pid"], signal.SIGKILL)
            second.kill_supervisor()  # in the middle of a recovery
            with Served(tiny_model, tmp_path, *TINY) as third:
                assert texts(streams) == expected
                third.front().kill()  # its successor gets the same socket: nobody is refused
                answer = httpx.get(f"{third.url}/health/live", timeout=30)
                assert answer.status_code == 200
                third.active_world()
                third.kill_supervisor()
                everything = third.processes()
                assert phalanx("stop", "--run-dir", str(tmp_path)).startswith("ended ")
                left = [p for p in still_there(everything) if p.status() != psutil.STATUS_ZOMBIE]
                assert left == [] and third.shm_folders() == [] and port_is_free(third.url)


@pytest.mark.slow
def test_nobody_takes_over_the_real_ones(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHALANX_ADOPTION_WAIT_S", "3")
    with Served(tiny_model, tmp_path, *TINY) as served:
        served.parked_spare()
        everything = served.processes()
        served.kill_supervisor()
        time.sleep(1)
        assert httpx.get(f"{served.url}/health/ready").status_code == 200
        assert still_there(everything, 20.0) == []
    assert served.shm_folders() == [] and port_is_free(served.url)
    assert [path.name for path in tmp_path.rglob("*") if path.is_socket()] == []


@pytest.mark.slow
def test_stop_and_other_flags(tiny_model: str, tmp_path: Path) -> None:
    with Served(tiny_model, tmp_path, *TINY, "--spare", "none") as served:
        served.kill_supervisor()
        command = [sys.executable, "-m", "launcher.cli", "serve", tiny_model, "--run-dir", str(tmp_path)]
        refused = subprocess.run([*command, "--tp", "1"], capture_output=True, text=True, timeout=60)
        assert refused.returncode == 2
        assert "--tp 2 (now 1)" in refused.stderr and "phalanx stop --run-dir" in refused.stderr
        with Served(tiny_model, tmp_path, *TINY, "--spare", "none") as second:
            everything = second.processes()
            assert phalanx("stop", "--run-dir", str(tmp_path)) == "stopped\n"
            assert second.process.wait(10) == 0
            assert still_there(everything, 1.0) == []
    assert phalanx("stop", "--run-dir", str(tmp_path)) == "nothing runs there\n"
