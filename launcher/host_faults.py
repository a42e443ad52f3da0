"""Which hosts are left out of the next world: those with three faults in ten minutes, while the others suffice. Used
by the pool of hosts (hosts.py); it counts, and never leaves a world without room."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

FAULTS = 3
WINDOW_S = 600.0
NOT_OF_THE_HOST = ("start", "planned", "mismatch", "shortage")
"""Kinds of fault that do not speak against the host of the rank that is named."""


class HostFaults:
    """Faults by host, on the monotonic clock."""

    def __init__(self) -> None:
        self._at: dict[str, deque[float]] = {}
        self._kinds: dict[str, deque[str]] = {}

    def note(self, host: str | None, kind: str, now: float) -> None:
        """A rank of this host was what a world died of."""
        if host is not None and kind not in NOT_OF_THE_HOST:
            self._at.setdefault(host, deque(maxlen=FAULTS)).append(now)
            self._kinds.setdefault(host, deque(maxlen=FAULTS)).append(kind)

    def suspects(self, now: float) -> list[str]:
        """Hosts with so many faults in so short a time; the one that had its last fault most recently first."""
        found = [
            (times[-1], host)
            for host, times in self._at.items()
            if len(times) == FAULTS and now - times[0] <= WINDOW_S
        ]
        return [host for _, host in sorted(found, reverse=True)]

    def kinds(self, host: str) -> list[str]:
        """Its last faults, oldest first."""
        return list(self._kinds.get(host, ()))

    def until(self, host: str) -> float:
        """When it is no suspect any more, if nothing else happens. For suspects only."""
        return self._at[host][0] + WINDOW_S

    def choose(self, slots: Mapping[str, int], ranks: int, now: float) -> dict[str, int]:
        """The hosts for a world of so many ranks, with their slots, in the order given: without suspects as far as
        the rest suffices. Where it does not, the suspects whose faults are oldest are taken in again first; with a
        single host nothing is ever left out."""
        left_out = [host for host in self.suspects(now) if host in slots]
        while left_out and sum(count for host, count in slots.items() if host not in left_out) < ranks:
            left_out.pop()  # the longest quiet
        return {host: count for host, count in slots.items() if host not in left_out}
