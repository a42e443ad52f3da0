"""A world that is smaller than asked for gives way to a larger one, as a planned change, when hosts are back. Used by
the supervisor; decides when, and starts nothing."""

from __future__ import annotations

from launcher.hosts import HostPool
from launcher.world_records import WorldPlan
from launcher.world_sizes import HostsMissing, WorldSizes
from launcher.worlds import World

SETTLE_S = 3.0
"""How long the smaller world has served before: it may have requests to compute again."""
BACK_OFF_S = 5.0
MAX_BACK_OFF_S = 300.0
"""Wait after a larger world that did not come up, doubled each time."""


class Growth:
    """Times on the monotonic clock, in seconds."""

    def __init__(self, pool: HostPool, sizes: WorldSizes) -> None:
        self._pool = pool
        self._sizes = sizes
        self._failures = 0
        self._not_before = 0.0

    def is_due(self, asked: WorldPlan, current: World | None, now: float) -> bool:
        """Whether a larger world is to be started beside the one that serves."""
        if current is None or current.size >= asked.size or now < self._not_before:
            return False
        if current.times.served is None or now - current.times.served < SETTLE_S:
            return False
        try:
            larger = self._sizes.fit(asked, now)
        except HostsMissing:
            return False
        # A host that has had several faults lately would soon bring the next one: it is waited for.
        return (
            larger.size > current.size and self._pool.slots_present(now, with_suspects=False) >= larger.size
        )

    def on_failed(self, now: float) -> float:
        """The larger world did not come up. Returns the seconds until the next try at the earliest."""
        back_off_s = min(BACK_OFF_S * 2**self._failures, MAX_BACK_OFF_S)
        self._failures = min(self._failures + 1, 10)
        self._not_before = now + back_off_s
        return back_off_s

    def on_done(self) -> None:
        """It serves."""
        self._failures = 0
