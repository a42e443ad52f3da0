"""How much memory a rank takes, measured as seldom as that costs. Used by the guard."""

from __future__ import annotations

from collections.abc import Callable

from launcher.post_mortem import memory_bytes, resident_bytes

MEMORY_INTERVAL_S = 30.0
"""How often the memory of a parked rank is measured, which takes milliseconds."""
RESIDENT_INTERVAL_S = 2.0
"""How often that of another one is, more roughly: its resident pages, which the kernel has counted."""


class RankMemory:
    """Of one rank, by its pid."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._at = -MEMORY_INTERVAL_S
        self._measured_by: Callable[[int], int] | None = None
        self.num_bytes = 0
        """As measured last; 0 before."""

    def check(self, parked: bool, now: float) -> bool:
        """Measures it if it is time to, and says so."""
        measure, interval_s = (
            (memory_bytes, MEMORY_INTERVAL_S) if parked else (resident_bytes, RESIDENT_INTERVAL_S)
        )
        if measure is self._measured_by and now - self._at < interval_s:
            return False
        self._measured_by, self._at = measure, now
        self.num_bytes = measure(self._pid)
        return True
