"""Processes of this machine by pid and start time: are they there, in which state, and how to end them for
certain. Called by guard and supervisor; must never signal a process whose start time it has not checked."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class ProcessStat:
    """A line of /proc/PID/stat, as far as it is used (see proc_pid_stat(5))."""

    pid: int
    state: str
    """R running, S sleeping, D disk, T stopped, t traced, Z zombie, X dead."""
    parent: int
    session: int
    start: int
    """Start time in clock ticks since boot."""
    threads: int


@dataclass(frozen=True)
class ProcessId:
    """A process for good: a pid alone may come to mean another one."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process that has this pid now; None if there is none."""
        stat = read_stat(pid)
        return None if stat is None else cls(pid, stat.start)


def read_stat(pid: int) -> ProcessStat | None:
    """State of a process; None if there is none (a zombie still counts as one)."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            line = file.read(4096)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name, in parentheses, may itself hold spaces and parentheses.
    values = line[line.rindex(b")") + 2 :].split()
    return ProcessStat(
        pid=pid,
        state=values[0].decode(),
        parent=int(values[1]),
        session=int(values[3]),
        start=int(values[19]),
        threads=int(values[17]),
    )


def ending_code(pid: int) -> int | None:
    """Exit code of a process that is ending or has ended and is not reaped; -N for signal N. None while it lives, and
    where it ended with 0. The kernel shows it (field 52 of /proc/PID/stat) as soon as the end has begun."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            line = file.read(4096)
    except (FileNotFoundError, ProcessLookupError):
        return None
    status = int(line[line.rindex(b")") + 2 :].split()[49])
    if status == 0:
        return None
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


class StateReader:
    """Reads one process's state letter again and again, for a fifth of what `read_stat` costs."""

    def __init__(self, pid: int) -> None:
        """Raises OSError if there is no such process."""
        self._descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> str:
        """R, S, D, T, t or Z; X once it is reaped. The file stays that of the process it was opened for."""
        try:
            line = os.pread(self._descriptor, 512, 0)
        except ProcessLookupError:
            return "X"
        return chr(line[line.rindex(b")") + 2])

    def close(self) -> None:
        os.close(self._descriptor)


def is_alive(process: ProcessId) -> bool:
    """Whether it is there and more than a zombie."""
    stat = read_stat(process.pid)
    return stat is not None and stat.start == process.start and stat.state not in "ZX"


def kill(process: ProcessId) -> bool:
    """SIGKILLs exactly this process; False if it is gone or not ours to kill."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        # The descriptor holds the process that has the pid now, so that after this check none can slip in.
        stat = read_stat(process.pid)
        if stat is None or stat.start != process.start:
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


class AdoptedProcess:
    """A process that an earlier supervisor started, used like a child: it is watched by a descriptor, and how it
    ended nobody can say any more."""

    UNKNOWN_CODE = 1 << 16
    """Its exit code once it has ended; no process has this one."""

    def __init__(self, process: ProcessId) -> None:
        """Raises ProcessLookupError if it is gone."""
        self.pid = process.pid
        self._id = process
        self.returncode: int | None = None
        self._descriptor = os.pidfd_open(process.pid)
        if not is_alive(process):
            os.close(self._descriptor)
            raise ProcessLookupError(f"process {process.pid} has ended")

    def poll(self) -> int | None:
        """UNKNOWN_CODE once it has ended, None before."""
        if self.returncode is None and select.select([self._descriptor], [], [], 0)[0]:
            self.returncode = self.UNKNOWN_CODE
            os.close(self._descriptor)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Until it has ended. Raises subprocess.TimeoutExpired after so many seconds."""
        if self.returncode is None and not select.select([self._descriptor], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        self.poll()
        return self.UNKNOWN_CODE

    def send_signal(self, number: int) -> None:
        """No effect once it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def all_processes() -> Iterator[ProcessStat]:
    """Every process that /proc shows."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            stat = read_stat(int(entry.name))
            if stat is not None:
                yield stat


def ancestors(process: ProcessId, up_to: Collection[int]) -> set[ProcessId]:
    """Its parent, the parent of that, and so on, below the nearest of these pids; none where none of them is met."""
    found: set[ProcessId] = set()
    stat = read_stat(process.pid)
    if stat is None or stat.start != process.start:
        return set()
    while stat.parent not in up_to:
        stat = read_stat(stat.parent)
        if stat is None or stat.pid <= 1:
            return set()
        found.add(ProcessId(stat.pid, stat.start))
    return found


def children(pid: int) -> set[ProcessId]:
    """Those that it has started and that live."""
    return {ProcessId(stat.pid, stat.start) for stat in all_processes() if stat.parent == pid}


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with; empty for one that is gone, a zombie or somebody else's."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    variables = (entry.decode(errors="replace").partition("=") for entry in content.split(b"\0"))
    return {name: value for name, separator, value in variables if separator}


def reap_orphan(pid: int) -> None:
    """Takes a dead child that this process adopted off the process table; no effect on anything else."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


@cache
def host_id() -> str:
    """Equal in two processes exactly where a pid means the same process to both."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # hidden in some sandboxes
        boot = socket.gethostname()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def host_name() -> str:
    """Name of this machine, for people."""
    return socket.gethostname()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))
