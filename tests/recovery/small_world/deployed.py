"""A supervisor over small ranks, for tests: the process, the table that its front is sent, its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from launcher.leases import ADOPTION_WAIT_VARIABLE
from tests.recovery.run_processes import left_of

TP = 2


class Deployment:
    """One supervisor with its worlds, seen through the table that the front is sent."""

    def __init__(
        self,
        run_dir: Path,
        behaviour: str = "",
        spare: str = "none",
        tp: int = TP,
        wait_s: float = 60.0,
        hosts: str = "",
        pp: int = 1,
        elastic: bool = False,
        wait_for_hosts_s: float = 30.0,
        python: str = sys.executable,
        prefix: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """`wait_s`: how long guards and front wait for another supervisor after the end of this one. `prefix`: of
        the command, which it must become (exec)."""
        self.run_dir = run_dir
        self.errors = run_dir.parent / f"{run_dir.name}.stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [
                    *(*prefix, python, "-m", "tests.recovery.small_world.deployment"),
                    *(str(run_dir), str(tp), spare, hosts, str(pp), "elastic" if elastic else ""),
                ],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={
                    **os.environ,
                    "SMALL_WORLD": behaviour,
                    ADOPTION_WAIT_VARIABLE: str(wait_s),
                    "WAIT_FOR_HOSTS_S": str(wait_for_hosts_s),
                    **(variables or {}),
                },
            )
        assert self.process.stdout is not None
        self.has_started = self.process.stdout.readline() == "started\n"

    def wait_ready(self) -> int:
        """The epoch of the first world that serves."""
        assert self.process.stdout is not None
        word, epoch, self.run_id = self.process.stdout.readline().split()
        assert word == "ready"
        return int(epoch)

    def table(self) -> dict[str, Any]:
        try:
            table: dict[str, Any] = json.loads((self.run_dir / "table.json").read_text())
        except FileNotFoundError:
            return {"worlds": [], "faults": [], "epoch": 0}
        return table

    def wait_active(self, above: int = 0, timeout_s: float = 20.0) -> dict[str, Any]:
        """The active world, once there is one of a higher epoch and its faults are recovered."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            table = self.table()
            recovered = all(fault["recover_s"] is not None for fault in table["faults"])
            for world in table["worlds"]:
                if world["state"] == "active" and world["epoch"] > above and recovered:
                    assert isinstance(world, dict)
                    return world
            assert self.process.poll() is None, self.errors.read_text()
            time.sleep(0.02)
        raise AssertionError(f"no active world above {above}: {table}\n{self.errors.read_text()}")

    def wait_spare(
        self, above: int = 0, state: str | None = "parked", timeout_s: float = 20.0
    ) -> dict[str, Any]:
        """The spare, once there is one of a higher epoch all of whose ranks are in this state."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for world in self.table()["worlds"]:
                states = [rank["state"] for rank in world["ranks"]]
                if world["state"] == "spare" and world["epoch"] > above and states == [state] * TP:
                    assert isinstance(world, dict)
                    return world
            time.sleep(0.02)
        raise AssertionError(f"no spare above {above}: {self.table()}\n{self.errors.read_text()}")

    def kill_supervisor(self) -> None:
        self.process.kill()
        self.process.wait()

    def processes(self) -> list[psutil.Process]:
        """Everything under the supervisor."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def shm_folders(self) -> list[str]:
        return [path.name for path in Path("/dev/shm").glob(f"phalanx-{self.run_id}-*")]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


Start = Callable[..., Deployment]


def wait_gone(processes: list[psutil.Process], timeout_s: float = 5.0) -> list[psutil.Process]:
    """Those that are still there after this time, zombies of ours included."""
    deadline = time.monotonic() + timeout_s
    while (left := left_of(processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left
