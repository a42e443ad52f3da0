"""Processes that are frozen by their cgroup: `/proc/PID/stat` shows them asleep, and nothing else tells. Used by the
guard to see it and by the supervisor to let killed ones die; changes no cgroup that holds anything else."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from functools import cache
from pathlib import Path

_UNESCAPED = {r"\040": " ", r"\011": "\t", r"\134": "\\"}


class CgroupFreezer:
    """The freezer of the cgroup that one process is in: version 2's `cgroup.freeze`, or version 1's freezer, where
    they are mounted (cgroups(7))."""

    def __init__(self, pid: int) -> None:
        self._cgroup_file = Path(f"/proc/{pid}/cgroup")

    def is_frozen(self) -> bool:
        """Whether the kernel keeps it from running; False where that cannot be read. Takes some 50 us."""
        return any(self._frozen_in(folder, version) for folder, version in self._folders())

    def thaw(self, own: Collection[int]) -> None:
        """Lets a killed process die: in version 1 a frozen one hears no signal, not even SIGKILL. Only where every
        process of the cgroup is one of `own`."""
        for folder, version in self._folders():
            if version != 1 or not self._frozen_in(folder, version):
                continue
            with contextlib.suppress(OSError, ValueError):
                if {int(line) for line in (folder / "cgroup.procs").read_text().split()} <= set(own):
                    (folder / "freezer.state").write_text("THAWED")

    def _folders(self) -> list[tuple[Path, int]]:
        try:
            lines = self._cgroup_file.read_text().splitlines()
        except OSError:
            return []
        mounts = _mounts()
        folders = []
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if not controllers and 2 in mounts:
                folders.append((mounts[2] / path.lstrip("/"), 2))
            elif "freezer" in controllers.split(",") and 1 in mounts:
                folders.append((mounts[1] / path.lstrip("/"), 1))
        return folders

    @staticmethod
    def _frozen_in(folder: Path, version: int) -> bool:
        try:
            if version == 2:
                return "frozen 1" in (folder / "cgroup.events").read_text()
            return (folder / "freezer.state").read_text().strip() in ("FROZEN", "FREEZING")
        except OSError:  # the root has no such file
            return False


@cache
def _mounts() -> dict[int, Path]:
    """Where version 2 and version 1's freezer are mounted."""
    found: dict[int, Path] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, target, kind, options, *_ = line.split(" ")
            for escape, character in _UNESCAPED.items():
                target = target.replace(escape, character)
            if kind == "cgroup2":
                found.setdefault(2, Path(target))
            elif kind == "cgroup" and "freezer" in options.split(","):
                found.setdefault(1, Path(target))
    return found
