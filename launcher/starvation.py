"""How long the ranks of this host have waited for a processor: time in which a silent rank is no hung one. Used by
the guard while its rank is silent; it reads /proc, and knows nothing of steps and limits."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WATCHED_AFTER_S = 0.5
"""A silence that is shorter is nobody's business: to look costs some 30 us a thread."""
LOOK_INTERVAL_S = 0.2
PID_SUFFIX = ".pid"


@dataclass(frozen=True)
class _Thread:
    """One look at a thread (proc_pid_schedstat(5) and proc_pid_stat(5))."""

    ran_ns: int
    waited_ns: int
    """Counted when the wait ends."""
    turns: int
    state: str


class Starvation:
    """Fed with every check of a silent rank; a rank of this host that waits for a processor holds all up."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of the world on this host, where each guard has left the pid of its rank."""
        self._folder = folder
        self._seen: dict[str, _Thread] = {}
        self._ahead_ns: dict[str, int] = {}
        """Of waits that go on: what was told of them already."""
        self._looked_at: float | None = None
        self._late_s = 0.0

    def tell_pid(self, rank: int, pid: int) -> None:
        """For the guards of the other ranks of this host."""
        with contextlib.suppress(OSError):  # without it its waits are not excused
            (self._folder / f"rank-{rank}{PID_SUFFIX}").write_text(str(pid))

    def new_wait_s(self, silence_s: float, now: float, late_s: float) -> float:
        """Seconds since the last call for which a thread of some rank of this host wanted to run and could not; some
        later call may tell them. `late_s`: what is excused for this time anyway."""
        if silence_s < WATCHED_AFTER_S:
            if self._looked_at is not None:
                self._looked_at = None
                self._seen.clear()
                self._ahead_ns.clear()
            return 0.0
        if self._looked_at is None:
            self._looked_at, self._late_s = now, 0.0
            self._seen = self._look()
            return 0.0
        self._late_s += late_s
        passed_s = now - self._looked_at
        if passed_s < LOOK_INTERVAL_S:
            return 0.0
        before, self._seen = self._seen, self._look()
        waits_ns = [self._wait_ns(name, before.get(name), passed_s) for name in self._seen]
        excused_s, self._looked_at, self._late_s = self._late_s, now, 0.0
        return max(0.0, min(passed_s, max(waits_ns, default=0) / 1e9) - excused_s)

    def _wait_ns(self, name: str, before: _Thread | None, passed_s: float) -> int:
        """How long one thread has waited since it was looked at."""
        after = self._seen[name]
        if before is None:
            return 0
        if (after.turns, after.ran_ns) == (
            before.turns,
            before.ran_ns,
        ) and after.state == before.state == "R":
            wait_ns = round(passed_s * 1e9)  # it still waits
            self._ahead_ns[name] = self._ahead_ns.get(name, 0) + wait_ns
            return wait_ns
        return max(0, after.waited_ns - before.waited_ns - self._ahead_ns.pop(name, 0))

    def _pids(self) -> Iterator[int]:
        for file in self._folder.glob(f"rank-*{PID_SUFFIX}"):
            with contextlib.suppress(OSError, ValueError):
                yield int(file.read_text())

    def _look(self) -> dict[str, _Thread]:
        found = {}
        this = str(threading.get_native_id())  # runs; what it was late is excused by its caller
        for pid in self._pids():
            tasks = f"/proc/{pid}/task"
            with contextlib.suppress(OSError):
                for name in os.listdir(tasks):
                    if name == this:
                        continue
                    with contextlib.suppress(OSError, ValueError, IndexError):
                        found[name] = _read(f"{tasks}/{name}")
        return found


class StarvationOf(Starvation):
    """Of these processes of this host, whichever: the supervisor asks it of a guard and of itself."""

    def __init__(self, *pids: int) -> None:
        super().__init__(Path())
        self._all_pids = pids

    def _pids(self) -> Iterator[int]:
        yield from self._all_pids


def _read(folder: str) -> _Thread:
    """Raises OSError, ValueError or IndexError for what is gone or not there on this kernel."""
    with open(f"{folder}/schedstat", "rb", buffering=0) as file:
        ran_ns, waited_ns, turns = map(int, file.read(128).split())
    with open(f"{folder}/stat", "rb", buffering=0) as file:
        line = file.read(512)
    return _Thread(ran_ns, waited_ns, turns, chr(line[line.rindex(b")") + 2]))
