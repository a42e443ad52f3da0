"""How long a guard goes on without a supervisor: the wait for one that takes over, and on other hosts the lease
that fences a rank nobody can reach. Pure time keeping, used by guard and supervisor; it kills nothing itself."""

from __future__ import annotations

import os
from collections.abc import Mapping

ADOPTION_WAIT_VARIABLE = "PHALANX_ADOPTION_WAIT_S"
"""Environment variable of a deployment; the front reads it, too."""

ADOPTION_WAIT_S = 60.0
"""How long guards and front go on after the end of their supervisor until another one has taken over."""

LEASE_S = 0.8
"""How long the rank of a guard on another host lives after the last beat that the supervisor answered, at least."""

LONGEST_LEASE_S = 5.0
"""The same where answers were late, as on crowded machines."""

LEASE_TIMES_DELAY = 4.0
"""A lease bears a delay so many times as long as the longest one of late."""

FENCE_MARGIN = 0.25
"""What the supervisor adds to a lease, as a part of it: for the guard's own turn, which comes later where it is
crowded, and for clocks that run unlike."""

FENCE_MARGIN_S = FENCE_MARGIN * LEASE_S

DELAYS_REMEMBERED_S = 60.0
"""A delay is forgotten after this, or at most twice this."""


def lease_s(delay_s: float) -> float:
    """The lease that a guard is given whose answers were late by so much. The supervisor decides it, so that it knows
    how long to wait for the end of each rank that it cannot reach; never the guard."""
    return max(LEASE_S, min(LEASE_TIMES_DELAY * delay_s, LONGEST_LEASE_S))


class AnswerDelays:
    """How late the answers to a guard's beats were lately: for want of a processor here or there, or for the network.
    What was late by half a lease and did no harm says that the next one may be late by a whole one."""

    def __init__(self) -> None:
        self._answered_at: float | None = None
        """When the newest beat that was answered had been sent."""
        self._longest_s = self._longest_before_s = 0.0
        self._turned_at = 0.0

    def on_gone(self) -> None:
        """Nobody is there who could answer."""
        self._answered_at = None

    def on_answer(self, beat_sent_at: float, planned_s: float, now: float) -> None:
        """`planned_s`: seconds between two beats."""
        if self._answered_at is None:
            self._answered_at = beat_sent_at
            return
        if now - self._turned_at > DELAYS_REMEMBERED_S:
            self._longest_before_s, self._longest_s = self._longest_s, 0.0
            self._turned_at = now
        self._longest_s = max(self._longest_s, now - self._answered_at - planned_s)
        self._answered_at = max(self._answered_at, beat_sent_at)

    @property
    def longest_s(self) -> float:
        return max(self._longest_s, self._longest_before_s)


def adoption_wait_s(environment: Mapping[str, str] = os.environ) -> float:
    """The wait of this deployment, in seconds; what is no positive number counts as not set."""
    try:
        wait_s = float(environment.get(ADOPTION_WAIT_VARIABLE, ""))
    except ValueError:
        return ADOPTION_WAIT_S
    return wait_s if wait_s > 0 else ADOPTION_WAIT_S


class Tether:
    """What ties one guard to a supervisor.

    On the supervisor's host the guard sees the supervisor's process: `on_held` and `on_gone`. From another host it
    sees only what arrives: `on_lease` for each beat that was answered, `on_gone` when the connection was closed,
    and nothing at all when the network was cut. Silence ends the lease, a closed connection begins the wait.
    """

    def __init__(self, wait_s: float, now: float) -> None:
        """Begins as if a supervisor had just gone: the first one has to be met within the wait."""
        self._wait_s = wait_s
        self._ends_at = now + wait_s
        self._is_waiting = True

    @property
    def is_waiting(self) -> bool:
        """Whether no supervisor is there as far as the guard knows."""
        return self._is_waiting

    def on_held(self) -> None:
        """A supervisor is there, and its end will be seen."""
        self._is_waiting = False
        self._ends_at = float("inf")

    def on_gone(self, now: float) -> None:
        """The supervisor has ended, or closed the connection; again and again changes nothing."""
        if not self._is_waiting:
            self._is_waiting = True
            self._ends_at = now + self._wait_s

    def on_lease(self, beat_sent_at: float, lease_s: float = LEASE_S) -> None:
        """The supervisor has answered the beat that was sent then, by this guard's own clock. An answer that
        took its time on the way therefore prolongs nothing."""
        ends_at = beat_sent_at + lease_s
        if self._is_waiting or ends_at > self._ends_at:
            self._is_waiting = False
            self._ends_at = ends_at

    def left_s(self, now: float) -> float:
        """Seconds until the rank must be dead; 0 or less: it must be killed now. The guard's own lateness
        prolongs nothing, since the supervisor counts on it."""
        return self._ends_at - now
