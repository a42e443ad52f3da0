"""Puts faults into a running deployment: finds the processes that are meant and does to them what the schedule says.

Used by the campaign, in threads: everything here may block for a moment. It signals only processes that the
deployment itself named, by pid and start time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from launcher.processes import environment_of
from launcher.run_dir import EPOCH_VARIABLE
from tests.recovery.chaos.history import Expects, Injection
from tests.recovery.chaos.schedule import CUTS, INSIDE, SHORTAGES, Fault, Kind, Target
from tests.recovery.chaos.surroundings import Surroundings
from tests.recovery.run_processes import of_run
from tests.recovery.served import Served

SHORT_STOP_S = 0.2
STOP_AND_GO_S = 1.5
HAPPENS_WITHIN_S = 20.0
"""A fault inside a rank comes with the next step that fits; after so long it will not come any more."""

Table = dict[str, Any]
"""A world as /cluster shows it."""


@dataclass(frozen=True)
class Struck:
    """A fault that was put in, and what must be gone once the next world serves."""

    injections: list[Injection]
    doomed: list[psutil.Process]


class Injector:
    """Faults for one deployment."""

    def __init__(self, served: Served, faults_file: Path, surroundings: Surroundings) -> None:
        """`faults_file`: what PHALANX_FAULTS of the deployment names."""
        self._surroundings = surroundings
        self.served = served
        """To be replaced when another supervisor takes over."""
        self._file = faults_file
        self._stopped: list[psutil.Process] = []

    def strike(self, fault: Fault, world: Table, spare: Table | None) -> Struck:
        """Puts a fault in. `world` is the one that serves, `spare` the spare if it is to be hit. Raises
        psutil.NoSuchProcess if the target is gone already."""
        if fault.kind in INSIDE:
            return self._strike_inside(fault, world)
        if fault.kind in SHORTAGES:
            return self._strike_in_shortage(fault, world)
        if fault.target in (Target.HOST, Target.DAEMON):
            return self._strike_host(fault, world, spare)
        injections = []
        doomed: list[psutil.Process] = []
        for target_world, processes in self._targets(fault, world, spare):
            expects = self._expects(fault)
            # Before it happens: afterwards a guard may be an orphan, whose parent is none of the world's.
            if target_world is not None and expects is Expects.WORLD_FAULT:
                doomed += processes_of(target_world)
            at = time.time()
            undone_at = self._do(fault.kind, processes)
            epoch = None if target_world is None else target_world["epoch"]
            injection = self._injection(fault, at, epoch, expects)
            injection.until = undone_at
            injections.append(injection)
        return Struck(injections, doomed)

    def strike_next(self, fault: Fault, epoch: int) -> Path | None:
        """Prepares the second fault where it comes in a phase of the next world. Returns where it leaves its
        mark."""
        second = fault.second
        if second is None or second.phase is None:
            return None
        return self._write(f"kill rank={second.rank} epoch={epoch} phase={second.phase}", f"{fault.number}b")

    def strike_second(self, fault: Fault, world: Table) -> Struck | None:
        """The second fault where it comes at a moment; None if the rank is not there (yet, or any more)."""
        assert fault.second is not None
        if fault.second.target is not Target.RANK:
            alone = replace(fault, kind=Kind.KILL, target=fault.second.target, second=None)
            return self.strike(alone, world, None)
        for rank in world["ranks"]:
            if rank["rank"] == fault.second.rank:
                doomed = processes_of(world)
                with contextlib.suppress(psutil.NoSuchProcess):
                    at = time.time()
                    _send(_process(rank["pid"]), signal.SIGKILL)
                    return Struck([self._second_injection(fault, at, world["epoch"])], doomed)
        return None

    def happened(self, fault: Fault, mark: Path, epoch: int) -> Injection | None:
        """The injection of a second fault that was prepared, if it has come."""
        at = _marked_at(mark)
        return None if at is None else self._second_injection(fault, at, epoch)

    def clear(self) -> None:
        """No fault waits any more; what is still stopped goes on (what was to die of it is dead)."""
        self._file.unlink(missing_ok=True)
        for process in self._stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                _send(process, signal.SIGCONT)
        self._stopped.clear()

    # ----------------------------------------------------------------------- inside

    def _targets(
        self, fault: Fault, world: Table, spare: Table | None
    ) -> list[tuple[Table | None, list[psutil.Process]]]:
        def ranks(of: Table) -> list[psutil.Process]:
            return [_process(rank["pid"]) for rank in of["ranks"]]

        target = fault.target
        if target is Target.FRONT:
            return [(None, [self.served.front()])]
        if target is Target.SUPERVISOR:
            return [(None, [psutil.Process(self.served.process.pid)])]
        if target is Target.BOTH_WORLDS:
            assert spare is not None
            return [(world, ranks(world)), (spare, ranks(spare))]
        if target is Target.ALL_RANKS:
            return [(world, ranks(world))]
        of = world
        if target in (Target.SPARE_RANK, Target.SPARE_GUARD, Target.SPARE_MPIRUN):
            assert spare is not None
            of = spare
        entry = of["ranks"][fault.rank]
        if target in (Target.MPIRUN, Target.SPARE_MPIRUN):
            return [(of, [_process(_process(entry["guard_pid"]).ppid())])]
        is_guard = target in (Target.GUARD, Target.SPARE_GUARD)
        return [(of, [_process(entry["guard_pid" if is_guard else "pid"])])]

    def _strike_in_shortage(self, fault: Fault, world: Table) -> Struck:
        """Nothing more can be written while ranks, or the front, are killed, and for some seconds after."""
        where = "/dev/shm" if fault.kind is Kind.FULL_SHARED_MEMORY else "disk"
        began = time.time()
        with self._surroundings.filled(shared_memory=fault.kind is Kind.FULL_SHARED_MEMORY):
            struck = self.strike(replace(fault, kind=Kind.KILL), world, None)
            time.sleep(fault.lasts_s)
        shortage = self._injection(fault, began, None, Expects.ANYTHING)
        shortage.kind, shortage.target, shortage.until = "full", where, time.time()
        return Struck([*struck.injections, shortage], struck.doomed)

    def _strike_host(self, fault: Fault, world: Table, spare: Table | None) -> Struck:
        """The other host of the world: cut off for some seconds, or its processes."""
        doomed = processes_of_epoch(self.served.run_id, world["epoch"])
        at = time.time()
        until = None
        if fault.kind in CUTS:
            towards, back = fault.kind is not Kind.CUT_BACK, fault.kind is not Kind.CUT_TOWARDS
            with self._surroundings.cut_off(towards, back):
                time.sleep(fault.lasts_s)
            until = time.time()
        elif fault.target is Target.DAEMON:
            daemons = self._surroundings.other_host("prted")
            number = signal.SIGSTOP if fault.kind is Kind.STOP_AND_KILL else signal.SIGKILL
            for daemon in daemons:
                _send(daemon, number)
            if fault.kind is Kind.STOP_AND_KILL:
                self._stopped += daemons
                time.sleep(STOP_AND_GO_S)  # by itself it harms nobody
                at = time.time()
                _send(_process(world["ranks"][0]["pid"]), signal.SIGKILL)
        else:
            for rank in self._surroundings.other_host("engine.rank", without="launcher.guard"):
                _send(rank, signal.SIGKILL)
        injections = [self._injection(fault, at, world["epoch"], Expects.WORLD_FAULT)]
        if until is not None or spare is not None:
            # A world that starts meanwhile, and a spare that is half on that host, may be lost, too.
            injections.append(self._injection(fault, at, None, Expects.ANYTHING))
        for injection in injections:
            injection.until = until
            injection.spare_parked = spare is not None
        return Struck(injections, doomed)

    @staticmethod
    def _expects(fault: Fault) -> Expects:
        if fault.kind is Kind.SHORT_STOP:
            return Expects.NOTHING
        others = {Target.FRONT: Expects.NEW_FRONT, Target.SUPERVISOR: Expects.NEW_SUPERVISOR}
        return others.get(fault.target, Expects.WORLD_FAULT)

    def _do(self, kind: Kind, processes: Sequence[psutil.Process]) -> float | None:
        """Unix time at which it was undone, if it was."""
        number = {Kind.KILL: signal.SIGKILL, Kind.SEGMENTATION_FAULT: signal.SIGSEGV}.get(
            kind, signal.SIGSTOP
        )
        for process in processes:
            _send(process, number)
        if number != signal.SIGSTOP:
            return None
        if kind is Kind.STOP:
            self._stopped += processes
            return None
        time.sleep(SHORT_STOP_S if kind is Kind.SHORT_STOP else STOP_AND_GO_S)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                _send(process, signal.SIGCONT)
        return time.time()

    def _strike_inside(self, fault: Fault, world: Table) -> Struck:
        action = INSIDE[fault.kind].format(collective=fault.collective)
        doomed = processes_of(world)
        mark = self._write(f"{action} rank={fault.rank} epoch={world['epoch']}", str(fault.number))
        give_up_at = time.monotonic() + HAPPENS_WITHIN_S
        while (at := _marked_at(mark)) is None:
            if time.monotonic() > give_up_at:
                return Struck([], [])
            time.sleep(0.005)
        return Struck([self._injection(fault, at, world["epoch"], Expects.WORLD_FAULT)], doomed)

    def _write(self, line: str, name: str) -> Path:
        """Ranks read the file in their next step; the mark makes it happen once only."""
        mark = self._file.parent / f"mark-{name}"
        temporary = self._file.with_suffix(".new")
        before = self._file.read_text() if self._file.exists() else ""
        temporary.write_text(f"{before}{line} mark={mark}\n")
        temporary.rename(self._file)
        return mark

    def _injection(self, fault: Fault, at: float, epoch: int | None, expects: Expects) -> Injection:
        return Injection(
            number=fault.number,
            at=at,
            kind=fault.kind.value,
            target=fault.target.value,
            expects=expects,
            epoch=epoch,
            rank=fault.rank,
            load_average=os.getloadavg()[0],
        )

    def _second_injection(self, fault: Fault, at: float, epoch: int) -> Injection:
        injection = self._injection(fault, at, epoch, Expects.WORLD_FAULT)
        assert fault.second is not None
        injection.kind, injection.target = "kill in recovery", "rank"
        injection.rank = fault.second.rank
        return injection


def processes_of(world: Table) -> list[psutil.Process]:
    """mpirun, guards and ranks of a world in /cluster, those that are there."""
    found: dict[int, psutil.Process] = {}
    for rank in world["ranks"]:
        for pid in (rank["guard_pid"], rank["pid"]):
            with contextlib.suppress(psutil.NoSuchProcess):
                found[pid] = psutil.Process(pid)
    for rank in world["ranks"][:1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            mpirun = psutil.Process(rank["guard_pid"]).parent()
            if mpirun is not None and mpirun.pid != 1:
                found[mpirun.pid] = mpirun
    return list(found.values())


def processes_of_epoch(run_id: str, epoch: int) -> list[psutil.Process]:
    """Everything that belongs to a world, on whichever host of this machine."""
    return [p for p in of_run(run_id) if environment_of(p.pid).get(EPOCH_VARIABLE) == str(epoch)]


def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)


def _send(process: psutil.Process, number: int) -> None:
    process.send_signal(number)  # psutil checks the start time first


def _marked_at(mark: Path) -> float | None:
    try:
        return mark.with_name(f"{mark.name}.1").stat().st_mtime
    except FileNotFoundError:
        return None
