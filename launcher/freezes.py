"""Tells a rank that stands still, stopped by a signal or frozen by its cgroup, from one that runs. Used by the guard;
it reads /proc and the files of cgroups, and knows nothing of steps."""

from __future__ import annotations

from launcher.freezer import CgroupFreezer
from launcher.processes import StateReader

FREEZER_INTERVAL_S = 0.25
"""How often the freezer of the rank's cgroup is looked at."""
FROZEN_AFTER_S = 0.45
"""A rank stopped for less goes on as if nothing had been (a debugger, a checkpoint, a busy cgroup)."""


class FreezeWatch:
    """Fed with every check of one rank."""

    def __init__(self, pid: int) -> None:
        self._reader = StateReader(pid)
        self._freezer = CgroupFreezer(pid)
        self.state = "S"
        """Letter of the process's state, as of the last check."""
        self.how = "stopped"
        self._since: float | None = None
        self._cgroup_frozen = False
        self._cgroup_at = 0.0

    def check(self, now: float, late_s: float) -> float | None:
        """For how many seconds it has stood still, if that is too long, and `how` it does; else None. `late_s`: how
        much later than planned this call comes, in which time it may have run."""
        self.state = self._reader.read()
        if now - self._cgroup_at >= FREEZER_INTERVAL_S:
            self._cgroup_at = now
            self._cgroup_frozen = self._freezer.is_frozen()
        if self.state not in "Tt" and not self._cgroup_frozen:
            self._since = None
            return None
        if self._since is None:
            self._since = now
            return None
        self._since += late_s
        self.how = "frozen by its cgroup" if self._cgroup_frozen else "stopped"
        stopped_s = now - self._since
        return stopped_s if stopped_s > FROZEN_AFTER_S else None
