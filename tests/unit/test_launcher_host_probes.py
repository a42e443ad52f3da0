"""Probes of hosts: what they find, when they ask again, and that they leave no process."""

from __future__ import annotations

import subprocess
import time
from typing import IO

import psutil

from launcher.host_probes import MAX_PAUSE_S, PAUSE_S, TIMEOUT_S, Answer, HostProbes

SCRIPTS = {
    "up": "exit 0",
    "down": "echo one moment; echo 'connect to down: no route'; exit 255",
    "silent": "sleep 600 & wait",
}


class Shells:
    """Starts a shell for each host, and counts."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[bytes]] = []

    def __call__(self, host: str, output: IO[bytes]) -> subprocess.Popen[bytes]:
        command = ["sh", "-c", SCRIPTS[host]]
        self.started.append(subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True))
        return self.started[-1]


def answers(probes: HostProbes, lost: list[str], now: float) -> list[Answer]:
    """The first ones that come in at this moment of the probes' clock."""
    deadline = time.monotonic() + 10.0
    while not (found := probes.poll(lost, now)):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found


def test_what_probes_find() -> None:
    shells = Shells()
    probes = HostProbes(shells)
    probes.ask(["up"], 0.0)
    probes.ask(["up"], 0.0)
    assert answers(probes, [], 0.0) == [Answer("up", None)] and len(shells.started) == 1
    probes.ask(["down"], 0.0)
    assert answers(probes, [], 0.0) == [Answer("down", "connect to down: no route")]
    assert probes.poll([], 1e9) == [] and not probes.is_asking, "nobody is lost: nobody is asked"


def test_a_lost_host_is_asked_again_and_again_less_often() -> None:
    shells = Shells()
    probes = HostProbes(shells)
    now = 0.0
    pauses = []
    for _ in range(12):
        before, count, found = now, len(shells.started), []
        while len(shells.started) == count:
            now += 0.25
            found = probes.poll(["down"], now)
        pauses.append(now - before)
        assert found or answers(probes, ["down"], now)
    assert PAUSE_S <= pauses[0] < pauses[5] <= pauses[-1] <= MAX_PAUSE_S + 0.25


def test_one_that_never_answers_is_ended_with_its_children() -> None:
    shells = Shells()
    probes = HostProbes(shells)
    probes.ask(["silent"], 0.0)
    [shell] = shells.started
    deadline = time.monotonic() + 10.0
    while not (children := psutil.Process(shell.pid).children()):
        assert time.monotonic() < deadline
    assert probes.poll(["silent"], TIMEOUT_S - 0.1) == []
    [answer] = probes.poll(["silent"], TIMEOUT_S)
    assert answer.reason is not None and "no answer within" in answer.reason
    probes.poll([], TIMEOUT_S + 1.0)
    for child in children:
        child.wait(10.0)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    probes.ask(["silent"], 0.0)
    probes.close()
    assert shells.started[1].returncode is not None
