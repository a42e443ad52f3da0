"""Where the time of a world's start went, by phases. Kept by the world, told by the supervisor when it serves."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

from launcher.watch import Phase

_PARTS = {
    Phase.STARTING: "processes_s",
    Phase.IMPORTING: "imports_s",
    Phase.JOINING: "join_s",
    Phase.PARKED: "parked_s",
    Phase.LOADING: "load_s",
    Phase.IDLE: "front_s",
}
"""What passes while the slowest rank is in a phase: mpirun, guards and interpreters come up; torch is imported; MPI
joins the ranks; a spare waits for its turn; weights are mapped; the front meets rank 0."""


class StartTimes:
    """When the last rank of a world had come to each phase."""

    def __init__(self, started: float) -> None:
        """`started`: on the monotonic clock, in seconds."""
        self._moments = [(Phase.STARTING, started)]

    def note(self, phases: Collection[Phase], size: int, now: float) -> None:
        """Where the ranks that have reported are; `size`: how many there will be."""
        if len(phases) < size:
            return
        phase = min(phases, key=_order)
        phase = Phase.IDLE if phase is Phase.STEPPING else phase
        if phase in _PARTS and phase is not self._moments[-1][0]:
            self._moments.append((phase, now))

    def parts(self, now: float) -> dict[str, float]:
        """Seconds of each phase that was seen, until it serves `now`. One that passed between two beats of a guard
        counts into the one before it."""
        found: dict[str, float] = {}
        for (phase, begin), (_, end) in pairwise([*self._moments, (Phase.IDLE, now)]):
            # A hot spare loads, parks, and goes on from there.
            found[_PARTS[phase]] = found.get(_PARTS[phase], 0.0) + end - begin
        return found


def _order(phase: Phase) -> float:
    """Who is parked has still to join, or to load."""
    return Phase.IMPORTING + 0.5 if phase is Phase.PARKED else phase
