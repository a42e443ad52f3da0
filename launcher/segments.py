"""Shared memory that an MPI keeps in /dev/shm under names of its own, outside the world's folder: MPICH can be told
no other place, and leaves it behind when its ranks are killed. Guards write down what their rank has mapped while it
lives; whoever removes the world's folder removes that, too, and never anything that no rank of the world had."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.watch import Phase

SHARED_MEMORY = Path("/dev/shm")
_NAMES = re.compile(r"mpich_shm_[0-9A-Za-z_]+|mpich_ishm_[0-9A-Za-z_]+|Intel_MPI_[0-9A-Za-z_]+")
"""Of MPICH and Intel MPI. What else a rank may have mapped from there, as weights, is not MPI's."""
_SUFFIX = ".segments"


@dataclass(frozen=True)
class Segment:
    """A file by what it is: its name may come to mean another one."""

    name: str
    device: int
    inode: int


def mapped_by(pid: int) -> set[Segment]:
    """Those of a living process; none of one that is gone. Takes milliseconds for a rank (proc_pid_maps(5))."""
    found = set()
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    prefix = f"{SHARED_MEMORY}/"
    for line in lines:
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[5].startswith(prefix):
            name = words[5].removeprefix(prefix)
            if _NAMES.fullmatch(name):
                major, minor = (int(part, 16) for part in words[3].split(":"))
                found.add(Segment(name, os.makedev(major, minor), int(words[4])))
    return found


class SegmentWatch:
    """Keeps written down in the world's folder what one rank has mapped."""

    def __init__(self, shm_dir: Path, rank: int, pid: int) -> None:
        self._path = shm_dir / f"rank-{rank}{_SUFFIX}"
        self._pid = pid
        self._seen: tuple[Phase, set[str]] | None = None

    def look(self, phase: Phase) -> None:
        """Looks at the names in one folder, and at the rank's maps only where there are new ones, or where it has
        entered another phase since: what MPI makes, it maps at once or before MPI_Init returns."""
        try:
            names = {name for name in os.listdir(SHARED_MEMORY) if _NAMES.fullmatch(name)}
        except OSError:
            return
        phase = Phase.IDLE if phase is Phase.STEPPING else phase
        seen, self._seen = self._seen, (phase, names)
        if not names or (seen is not None and seen[0] is phase and names <= seen[1]):
            return
        if segments := mapped_by(self._pid):
            with contextlib.suppress(OSError):  # the folder is gone already, or full
                self._path.write_text(json.dumps([asdict(segment) for segment in segments]))


def remove_shared_memory(shm_dir: Path) -> None:
    """The world's folder, and before it the segments that its ranks had. For a world all of whose ranks of this host
    are dead."""
    for path in shm_dir.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            for entry in json.loads(path.read_text()):
                _remove(Segment(entry["name"], entry["device"], entry["inode"]))
    shutil.rmtree(shm_dir, ignore_errors=True)


def _remove(segment: Segment) -> None:
    if _NAMES.fullmatch(segment.name) is None:
        return
    path = SHARED_MEMORY / segment.name
    with contextlib.suppress(OSError):  # MPI has removed it itself
        status = path.lstat()
        if (status.st_dev, status.st_ino) == (segment.device, segment.inode):
            path.unlink()
