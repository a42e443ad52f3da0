"""One `phalanx serve` under chaos, as the campaign sees it: its worlds, its log, and what is left of it.

Everything here only looks; faults are injection.py's.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from benchmarks.supervisor_log import Event, events
from tests.recovery.chaos import schedule
from tests.recovery.chaos.history import Detection, Leftover, Recovery
from tests.recovery.chaos.surroundings import Surroundings
from tests.recovery.run_processes import is_left
from tests.recovery.served import Served

Table = dict[str, Any]

FLAGS = ("--max-model-len", "2048", "--kv-cache-memory", "192MiB", "--max-wait-s", "150")
FAULTS_VARIABLE = "PHALANX_FAULTS"
RUN_ID_VARIABLE = "PHALANX_RUN_ID"
POLL_S = 0.05
GONE_WITHIN_S = 5.0
"""What has nothing to do with the next world (a spare that died, an ended deployment) may take so long to go."""


class Deployment:
    """A running deployment."""

    def __init__(self, served: Served, model: str, flags: Sequence[str]) -> None:
        self.served = served
        self._model = model
        self._flags = flags
        self._adoptions: list[Detection] = []
        self.zmq = served.ready_line.split()[3]
        self._log = served.run_dir / "supervisor.log"
        self._client = httpx.AsyncClient(base_url=served.url, timeout=10)

    @classmethod
    async def start(
        cls,
        model: str,
        shape: schedule.Deployment,
        run_dir: Path,
        faults: Path,
        deterministic: bool,
        surroundings: Surroundings,
    ) -> Deployment:
        """Starts it and waits until it serves. `deterministic`: in bfloat16, with that flag; else in float32."""
        os.environ[FAULTS_VARIABLE] = f"@{faults}"
        os.environ.update(surroundings.variables)
        flags: tuple[str, ...] = (
            "--tp",
            str(shape.tp),
            "--pp",
            str(shape.pp),
            "--spare",
            shape.spare,
            *FLAGS,
            *surroundings.flags,
        )
        flags += ("--dtype", "bfloat16", "--deterministic") if deterministic else ("--dtype", "float32")
        return cls(await asyncio.to_thread(Served, model, run_dir, *flags), model, flags)

    async def start_again(self) -> None:
        """Another supervisor, as a user would start it, for what a killed one has left."""
        process = self.served.process
        await asyncio.to_thread(process.wait, 10)
        self.served = await asyncio.to_thread(Served, self._model, self.served.run_dir, *self._flags)
        self._adoptions.append(Detection(time.time(), None, "supervisor", "another one serves"))

    @property
    def has_ended(self) -> bool:
        return self.served.process.poll() is not None

    async def worlds(self) -> list[Table]:
        """What /cluster shows; empty while the front does not answer."""
        try:
            answer = await self._client.get("/cluster")
            worlds: list[Table] = answer.json()["worlds"]
        except (httpx.HTTPError, ValueError, KeyError):
            return []
        return worlds

    def log(self, since: float = 0.0) -> list[Event]:
        return list(events(self._log, since))

    def detections(self) -> list[Detection]:
        """All faults that the supervisor has found, and the supervisors that came after one that was killed."""
        found = list(self._adoptions)
        for event in self.log():
            if event.name in ("world fault", "spare fault"):
                kind, detail = event.fields.get("kind", ""), event.fields.get("detail", "")
                is_spare = event.name == "spare fault"
                found.append(Detection(event.at, event.epoch, kind, detail, is_spare))
            elif event.name == "front ended":
                found.append(Detection(event.at, None, "front", event.fields.get("exit_code", "")))
        return found

    def recoveries(self) -> list[Recovery]:
        """A supervisor that takes over says so when a world serves, whatever it found."""
        found = [Recovery(e.at, e.epoch or 0) for e in self.log() if e.name == "world recovered"]
        return found + [Recovery(adoption.at, 0) for adoption in self._adoptions]

    async def close(self) -> None:
        await self._client.aclose()


def active(worlds: Sequence[Table]) -> Table | None:
    """The world that serves."""
    return next((world for world in worlds if world["state"] == "active"), None)


def coming(worlds: Sequence[Table]) -> Table | None:
    """The world that serves or is to serve next."""
    return next((world for world in worlds if world["state"] in ("active", "starting")), None)


def spare_of(worlds: Sequence[Table]) -> Table | None:
    return next((world for world in worlds if world["state"] == "spare"), None)


def is_parked(world: Table) -> bool:
    states = {rank["state"] for rank in world["ranks"]}
    return len(world["ranks"]) == world["tp"] * world["pp"] and states == {"parked"}


async def leftovers_of_world(
    served: Served, epoch: int, doomed: Sequence[psutil.Process], gateway: str | None, within_s: float
) -> list[Leftover]:
    """What is still there of a dead world: its processes (zombies, too), shared memory, the port of its rank 0."""
    give_up_at = time.monotonic() + within_s
    folder = Path("/dev/shm", f"phalanx-{served.run_id}-{epoch}")
    while True:
        left = [
            f"process {_describe(process)}" for process in doomed if is_left(process) and not _waits(process)
        ]
        if folder.exists():
            left.append(str(folder))
        if gateway is not None and _listens(gateway):
            left.append(f"{gateway} is still open")
        if not left or time.monotonic() >= give_up_at:
            return [Leftover(time.time(), f"world {epoch}: {what}") for what in left]
        await asyncio.sleep(POLL_S)


def leftovers_of_deployment(served: Served, zmq: str) -> list[Leftover]:
    """What is still there of a deployment that has ended in order."""
    give_up_at = time.monotonic() + GONE_WITHIN_S
    while (left := processes_of_run(served.run_id)) and time.monotonic() < give_up_at:
        time.sleep(POLL_S)
    now = time.time()
    found = [Leftover(now, f"process {_describe(process)}") for process in left]
    found += [Leftover(now, f"/dev/shm/{name}") for name in served.shm_folders()]
    for name in ("control.sock", "processes.json"):
        if (served.run_dir / name).exists():
            found.append(Leftover(now, str(served.run_dir / name)))
    found += [
        Leftover(now, f"{endpoint} is still open") for endpoint in (served.url, zmq) if _listens(endpoint)
    ]
    return found


def processes_of_run(run_id: str) -> list[psutil.Process]:
    """All processes that carry the mark of this run in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_ID_VARIABLE) == run_id:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return found


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} ({process.status()}) {' '.join(process.cmdline()[:6])}"
    except psutil.ZombieProcess:
        return f"{process.pid} (zombie, child of {process.ppid()})"
    except psutil.NoSuchProcess:
        return f"{process.pid} (gone by now)"


def _waits(process: psutil.Process) -> bool:
    """Whether it is dead and waits for a parent that is stopped, which is none of ours but what the fault was."""
    try:
        parent = process.parent() if process.status() == psutil.STATUS_ZOMBIE else None
        return parent is not None and parent.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _listens(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    try:
        socket.create_connection((address.hostname or "", address.port or 0), timeout=1).close()
    except OSError:
        return False
    return True
