"""Which of several fronts may have a world for itself, to try a request that may be what kills worlds.

Owned by fronts.py and fed with what the fronts say. It only gives turns; what is tried, and for how long, is the
fronts' business.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.control_messages import Claim, FrontState


class WorldClaims:
    """One turn at a time, in the order of the fronts' numbers."""

    def __init__(self) -> None:
        self._turn: tuple[int, int] | None = None
        """Front and epoch."""
        self._last = -1

    def judge(self, states: Sequence[FrontState | None]) -> Claim | None:
        """Whose turn it is, by the last words of the fronts; None for one that has said nothing yet: it is started
        again, and may have what it had in the world until it says otherwise."""
        wishes = {n: state.claims for n, state in enumerate(states) if state is not None and state.claims}
        if self._turn is not None and wishes.get(self._turn[0]) != self._turn[1]:
            self._turn = None
        if self._turn is None:
            if not wishes:
                return None
            self._last = min(wishes, key=lambda front: (front <= self._last, front))
            self._turn = (self._last, wishes[self._last])
        front, epoch = self._turn
        others = [state for number, state in enumerate(states) if number != front]
        return Claim(front, epoch, all(state is not None and state.out_of == epoch for state in others))
