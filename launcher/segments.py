"""Shared memory that an MPI keeps in /dev/shm under names of its own, outside the world's folder: MPICH can be told
no other place, and leaves it behind when its ranks are killed. Guards write down what their rank has mapped while it
lives; whoever removes the world's folder removes that, too. Where a rank was killed in MPI_Init before its guard
could see what it had, what was made meanwhile and is nobody's goes as well; never what anybody has."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.watch import Phase

SHARED_MEMORY = Path("/dev/shm")
_NAMES = re.compile(r"mpich_(?:shm|vci|ishm)_[0-9A-Za-z_]+|Intel_MPI_[0-9A-Za-z_]+|ucx_shm_posix_[0-9a-f]+")
"""Of MPICH, of UCX under it, and of Intel MPI. What else a rank may have mapped, as weights, is not MPI's."""
_SUFFIX = ".segments"
_JOINING_SUFFIX = ".joining"
_ALL_PROCESSES = 0xEFFFFFFC
"""Inode of the first namespace of process ids (PROC_PID_INIT_INO in the kernel's proc_ns.h), where all are seen."""
_MAPPED_WITHIN_S = 0.1
"""So long after a name has appeared the maps are looked at again and again: a file is made before it is mapped."""


@dataclass(frozen=True)
class Segment:
    """A file by what it is: its name may come to mean another one."""

    name: str
    device: int
    inode: int


def mapped_by(pid: int) -> set[Segment]:
    """Those of a living process; none of one that is gone. Takes milliseconds for a rank (proc_pid_maps(5))."""
    found = set()
    prefix = f"{SHARED_MEMORY}/"
    for (device, inode), path in _mapped_files(pid).items():
        name = path.removeprefix(prefix)
        if path.startswith(prefix) and _NAMES.fullmatch(name):
            found.add(Segment(name, device, inode))
    return found


def _mapped_files(pid: int) -> dict[tuple[int, int], str]:
    """Paths, as far as they are known here, by device and inode."""
    found = {}
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[4] != "0":
            major, minor = (int(part, 16) for part in words[3].split(":"))
            found[os.makedev(major, minor), int(words[4])] = words[5]
    return found


class SegmentWatch:
    """Keeps written down in the world's folder what one rank has mapped, and whether it is in MPI_Init: MPICH takes
    its names away at the end of that."""

    def __init__(self, shm_dir: Path, rank: int, pid: int) -> None:
        self._path = shm_dir / f"rank-{rank}{_SUFFIX}"
        self._pid = pid
        self._seen: tuple[Phase, set[str]] | None = None
        self._fresh_until = 0.0
        self._noted: set[Segment] = set()
        self._joining = shm_dir / f"rank-{rank}{_JOINING_SUFFIX}"
        self._was_joining = False

    def look(self, phase: Phase) -> None:
        """Looks at the names in one folder, and at the rank's maps only where there are new ones, or where it has
        entered another phase since: what MPI makes, it maps at once or before MPI_Init returns."""
        if (phase is Phase.JOINING) != self._was_joining:
            self._was_joining = phase is Phase.JOINING
            with contextlib.suppress(OSError):  # the folder is gone already, or full
                self._joining.touch() if self._was_joining else self._joining.unlink(missing_ok=True)
        try:
            names = {name for name in os.listdir(SHARED_MEMORY) if _NAMES.fullmatch(name)}
        except OSError:
            return
        phase = Phase.IDLE if phase is Phase.STEPPING else phase
        seen, self._seen = self._seen, (phase, names)
        now = time.monotonic()
        if seen is None or not names <= seen[1]:
            self._fresh_until = now + _MAPPED_WITHIN_S
        if names and (seen is None or seen[0] is not phase or now < self._fresh_until):
            self.note()

    def note(self) -> None:
        """Writes down what the rank has now, if it has anything new; what it had stays written down."""
        new = mapped_by(self._pid) - self._noted
        if not new:
            return
        self._noted |= new
        _write(self._path, self._noted)


def note_before_kill(shm_dir: Path, rank: int, pid: int) -> None:
    """For whoever is about to kill a rank of this host that may be in MPI_Init, beside what its guard has noted."""
    if segments := mapped_by(pid):
        _write(shm_dir / f"rank-{rank}.last{_SUFFIX}", segments)


def _write(path: Path, segments: set[Segment]) -> None:
    temporary = path.with_suffix(f"{_SUFFIX}.new")
    with contextlib.suppress(OSError):  # the folder is gone already, or full
        temporary.write_text(json.dumps([asdict(segment) for segment in segments]))
        temporary.rename(path)


def remove_shared_memory(shm_dir: Path) -> None:
    """The world's folder, and before it the segments that its ranks had. For a world all of whose ranks of this host
    are dead."""
    for path in shm_dir.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            for entry in json.loads(path.read_text()):
                _remove(Segment(entry["name"], entry["device"], entry["inode"]))
    joining_since = [path.stat().st_mtime for path in shm_dir.glob(f"*{_JOINING_SUFFIX}")]
    if joining_since:
        for segment in abandoned(min(joining_since)):
            _remove(segment)
    shutil.rmtree(shm_dir, ignore_errors=True)


def abandoned(since: float) -> set[Segment]:
    """Segments of this user that were made after that Unix time, and that no process has open or mapped: whoever
    makes one has it open until it is mapped, and mapped as long as it lives. None where there may be processes that
    are not seen here, as in a container, or that may not be looked into."""
    found: dict[tuple[int, int], Segment] = {}
    with contextlib.suppress(OSError):
        for path in SHARED_MEMORY.iterdir():
            if _NAMES.fullmatch(path.name):
                status = path.lstat()
                if status.st_uid == os.getuid() and status.st_mtime >= since:
                    found[status.st_dev, status.st_ino] = Segment(path.name, status.st_dev, status.st_ino)
    if not found or os.stat("/proc/self/ns/pid").st_ino != _ALL_PROCESSES:
        return set()
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        if pid == 1:  # the machine's own, which may be closed to everybody, and is no rank
            continue
        try:
            if os.stat(f"/proc/{pid}").st_uid != os.getuid() and os.getuid() != 0:
                continue  # no other user can have opened them
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(f"/proc/{pid}/fd/{name}")
                    found.pop((status.st_dev, status.st_ino), None)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        except OSError:
            return set()
        for file in _mapped_files(pid):  # after its open ones: who closes one has mapped it before
            found.pop(file, None)
        if not found:
            break
    return set(found.values())


def _remove(segment: Segment) -> None:
    if _NAMES.fullmatch(segment.name) is None:
        return
    path = SHARED_MEMORY / segment.name
    with contextlib.suppress(OSError):  # MPI has removed it itself
        status = path.lstat()
        if (status.st_dev, status.st_ino) == (segment.device, segment.inode):
            path.unlink()
