"""When the next world may start, and when none should any more. Used by the supervisor alone; it counts, and starts
and ends nothing."""

from __future__ import annotations

FAILED_STARTS = 3
"""After so many worlds in a row that died before they served, another one helps nobody..."""
FAILED_STARTS_LATER = 8
"""...unless one has served before: then what is in the way may go by itself, and requests wait."""
BACK_OFF_S = 0.5
"""Wait before the start after a failed one; doubled each time."""
MAX_BACK_OFF_S = 30.0
MAX_HOST_BACK_OFF_S = 5.0
"""The same where a host may be back at any moment."""
MAX_OBSTACLE_BACK_OFF_S = 5.0
"""The same where a full disk is in the way: a try costs nothing, and requests wait."""
SHORT_LIFE_S = 5.0
"""A world that served for less has died at once."""
FREE_SHORT_LIVES = 10
"""So many of them in a row are replaced without a wait: faults may come together, a request that kills worlds is
found by three or four of them, and a world costs little."""
TOLD_S = 120.0
"""How long after the last of them it is told."""
LOOP_BACK_OFF_S = 1.0
"""Wait after one more; doubled each time."""


class Restarts:
    """Times on the monotonic clock, in seconds."""

    def __init__(self, waits_for_hosts: bool = False) -> None:
        """`waits_for_hosts`: the worlds need other hosts, which may be cut off and come back: once one has
        served, starts are tried for ever."""
        self._waits_for_hosts = waits_for_hosts
        self.not_before = 0.0
        """No world is started, and no spare promoted, before this."""
        self.failed_starts = 0
        """In a row."""
        self._short_lives = 0
        self._last_fault_at = 0.0
        self._has_served = False
        self._obstacle: str | None = None
        self._num_obstacles = 0

    def on_served(self) -> None:
        """A world serves."""
        self._has_served = True
        self.failed_starts = 0
        self._obstacle, self._num_obstacles = None, 0

    def on_obstacle(self, obstacle: str, now: float) -> float:
        """No world can be started for a reason that may pass by itself. Returns the wait before the next try in
        seconds; there always is one."""
        self._obstacle = obstacle
        back_off_s = min(BACK_OFF_S * 2 ** min(self._num_obstacles, 10), MAX_OBSTACLE_BACK_OFF_S)
        self._num_obstacles += 1
        self.not_before = now + back_off_s
        return back_off_s

    def on_host_back(self, now: float) -> None:
        """What was waited for is there again: the next start need not wait any more."""
        if self.failed_starts or self._obstacle is not None:
            self.not_before = min(self.not_before, now)
            self.failed_starts = min(self.failed_starts, 1)

    def on_failed_start(self, now: float) -> float | None:
        """A world has died that never served. Returns the wait before the next start in seconds; None if there
        should be no other."""
        self.failed_starts += 1
        self._obstacle = None
        if self._waits_for_hosts and self._has_served:
            back_off_s = min(BACK_OFF_S * 2 ** (self.failed_starts - 1), MAX_HOST_BACK_OFF_S)
            self.not_before = now + back_off_s
            return back_off_s
        if self.failed_starts >= (FAILED_STARTS_LATER if self._has_served else FAILED_STARTS):
            return None
        back_off_s = min(BACK_OFF_S * 2 ** (self.failed_starts - 1), MAX_BACK_OFF_S)
        self.not_before = now + back_off_s
        return back_off_s

    def on_hosts_away(self) -> None:
        """Hosts of the next world do not answer: that worlds did not start there says nothing about the worlds."""
        self.failed_starts = 0

    def on_fault(self, served_s: float, now: float) -> float:
        """A world that had served for so long dies of a fault. Returns the wait before the next one serves."""
        self._short_lives = self._short_lives + 1 if served_s < SHORT_LIFE_S else 0
        self._last_fault_at = now
        beyond = self._short_lives - FREE_SHORT_LIVES
        if beyond <= 0:
            return 0.0
        back_off_s = min(LOOP_BACK_OFF_S * 2 ** min(beyond - 1, 10), MAX_BACK_OFF_S)
        self.not_before = now + back_off_s
        return back_off_s

    def notice(self, now: float) -> str | None:
        """For people who ask why nothing serves, or what is wrong; None if nothing is."""
        wait_s = max(0.0, self.not_before - now)
        if self._short_lives > FREE_SHORT_LIVES and now - self._last_fault_at < TOLD_S:
            text = f"{self._short_lives} worlds in a row died within {SHORT_LIFE_S:.0f} s of serving"
        elif self._obstacle is not None:
            text = f"no world can be started: {self._obstacle}"
        elif self.failed_starts:
            text = f"{self.failed_starts} worlds in a row did not start"
        else:
            return None
        return f"{text}; the next one may start in {wait_s:.0f} s" if wait_s > 0 else text
