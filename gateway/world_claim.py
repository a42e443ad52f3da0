"""A front's wish to have the world for itself, and what it knows of the wishes of others.

Made by front.py where there are several fronts, and used by quarantine.py. The supervisor gives the turns: wishes go
to it with the front's state, turns come with the world table.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.control_messages import Claim


class WorldClaim:
    """Of one front. The only front of a deployment is always alone."""

    def __init__(self, front: int = 0, fronts: int = 1) -> None:
        self.say: Callable[[], None] = lambda: None
        """Sends the front's state to the supervisor; called whenever `wanted` or `out_of` has changed."""
        self.wanted: int | None = None
        """Epoch of the world that this front wants for itself."""
        self.out_of: int | None = None
        """Epoch of the world that this front has left to another one."""
        self._front = front
        self._fronts = fronts
        self._turn: Claim | None = None

    def want(self, epoch: int | None) -> None:
        """None: no more."""
        if self._fronts > 1 and epoch != self.wanted:
            self.wanted = epoch
            self.say()

    def leave_to_other(self, epoch: int | None) -> None:
        """This front has nothing in that world, and puts nothing there. None: that is over."""
        if epoch != self.out_of:
            self.out_of = epoch
            self.say()

    def note(self, turn: Claim | None) -> None:
        """What the supervisor says."""
        self._turn = turn

    @property
    def is_alone(self) -> bool:
        """The world that this front wants is its own."""
        if self._fronts == 1:
            return True
        turn = self._turn
        return turn is not None and turn.is_alone and (turn.front, turn.epoch) == (self._front, self.wanted)

    @property
    def of_other(self) -> int | None:
        """Epoch of the world that another front has, or is about to have, for itself."""
        turn = self._turn
        return turn.epoch if turn is not None and turn.front != self._front else None
